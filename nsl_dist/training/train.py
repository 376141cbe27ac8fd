"""A run as a whole, as its driver sees it: data, cluster, training, evaluation, results."""

import dataclasses
import functools
import json
import logging
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import ControllerError, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nsl_dist import cluster, storage
from nsl_dist.config import TrainConfig, config_from_dict, differences
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import Manifest, layout_of, open_data
from nsl_dist.progress import Phases, duration, show_results
from nsl_dist.proxies.partition import Partition
from nsl_dist.retrieval.evaluation import (
    curves,
    evaluate,
    evaluate_checkpoint,
    metrics_by_name,
    recall_line,
    table,
)
from nsl_dist.retrieval.report import REPORT_FILE, write_report
from nsl_dist.retrieval.sharded_search import check_index
from nsl_dist.run import (
    BEST,
    CONFIG_FILE,
    DIGEST_FILE,
    MLFLOW_ID_FILE,
    MODEL_FILE,
    RESULTS_FILE,
    StoppedError,
    TrainingError,
    find_checkpoint,
    keep_best,
    left_out_shards,
    newest_checkpoint,
    prune_checkpoints,
    run_folder,
    step_of,
    unsent_file,
)
from nsl_dist.schedule import Schedule
from nsl_dist.training.preflight import check_model
from nsl_dist.training.reporting import Relay

if TYPE_CHECKING:
    from nsl_dist.tracking.tracker import Tracker

# CPUs beside the training workers: one to decode, and for evaluation in mid-run one to embed and one to decode for it.
DATA_CPUS = 1
MID_RUN_EVAL_CPUS = 2
RESIZE_SECONDS = 30.0  # how often an elastic run looks for nodes that came
# Of glibc: what a step frees stays for the next; the kernel filling new pages with zeros takes a twentieth of a step.
KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
LEAVE_SECONDS = 10.0  # that a training which was told to stop may take to end once its checkpoint is written
RAY_TRAIN_RECORD = "checkpoint_manager_snapshot.json"  # in the folder of a run
LASTING_ERRORS = (ValueError, FloatingPointError)  # found by workers; starting again would end in the same way


def train(config: TrainConfig, *, of_study: bool = False) -> dict[str, Any]:
    """Train and evaluate; show progress and results; return what is written to `results.json`.

    Args:
        config: of the run.
        of_study: one of many, which writes no report and does not monitor the nodes.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: configuration, data, storage or cluster cannot give this run; nothing was trained.
        StoppedError: by SIGTERM or SIGINT.
        TrainingError: what cannot be mended by starting again, or failed more often than `config.max_failures`.

    """
    called_at, started = time.time(), time.monotonic()
    seconds: dict[str, float] = {}
    config = dataclasses.replace(
        config,
        storage=storage.absolute(config.storage),  # the same place for every process
        run_name=config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
    )
    run_dir = run_folder(config.storage, str(config.run_name))
    layout = layout_of(config.data.root, config.data.layout) if config.data.root is not None else "sop"
    storage.check_writable(config.storage)
    config = _as_started(config, run_dir)
    opening = ThreadPoolExecutor(1).submit(_open_tracking, config, run_dir)  # takes as long as starting Ray
    _refuse_to_train_again(config, run_dir, opening)
    refuse_to_change(config, run_dir)
    _, most_workers = config.worker_range or (1, 1)
    check_index(config.eval, config.model.dim)
    cluster.connect(num_cpus=cpus_needed(config, most_workers))
    tracked = opening.result()  # a wrong URI comes out before nodes are asked for
    phases = Phases(began=cluster.submitted_at() or called_at)
    phases.end("job, Ray and MLflow")
    config = _settle(config)
    phases.end("nodes")
    check = ray.remote(check_model).remote(config) if newest_checkpoint(run_dir) is None else None

    if config.data.root is None:
        print(
            "No --data.root: training on built-in synthetic products, rendered once. For the real data set:\n"
            "  python jobs/train_sop.py --recipe sop_resnet50 --data.root /path/to/Stanford_Online_Products",
            flush=True,
        )
    manifest = open_data(
        config.data.root, layout=layout, storage_root=config.storage, max_undecodable=config.data.max_undecodable
    )
    if check is not None:
        cluster.get(check)
    phases.end("data and model")
    split = manifest.split("train")
    plan = ClassBalancedPlan(split.sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    schedule = Schedule(config.optim, plan.steps_per_epoch)
    _start_tracking(tracked, config, manifest, run_dir)
    _announce(config, manifest, schedule, run_dir, tracked)
    seconds["setup"] = time.monotonic() - started

    num_gpus = _worker_range(config)[0] if config.device == "cuda" else 0
    try:
        results: dict[str, Any] = {}
        if config.eval.untrained:
            results["untrained"] = evaluate(None, config, manifest, num_gpus=num_gpus)
            tracked.log(metrics_by_name(results["untrained"]), step=0)
            print(f"untrained: {recall_line(results['untrained'])}", flush=True)
            phases.end("untrained evaluation")

        started = time.monotonic()
        rates = _fit(config, manifest, tracked, run_dir, schedule, phases, monitor_nodes=not of_study)
        checkpoint = find_checkpoint(run_dir)
        seconds["train"] = time.monotonic() - started

        started = time.monotonic()
        results |= evaluate(storage.join(checkpoint, MODEL_FILE), config, manifest, num_gpus=num_gpus)
        keep_best(checkpoint, results, run_dir)
        tracked.log(metrics_by_name(results), step=schedule.num_steps)
        seconds["evaluate"] = time.monotonic() - started

        results["evaluation_seconds"] = results["seconds"]
        results |= {
            "run_name": config.run_name,
            "mlflow_run_id": tracked.run_id,
            "steps": schedule.num_steps,
            "seconds": seconds,
            "train_images_per_second": statistics.median(rates) if rates else None,
            "data": {"digest": manifest.digest, "source": manifest.source, **manifest.splits},
            "left_out_shards": left_out_shards(run_dir),
            "config": dataclasses.asdict(config),
        }
        files = {}
        if not of_study:
            files = write_report(
                run_dir,
                results,
                name=str(config.run_name),
                config=config,
                manifest=manifest,
                history=tracked.history(curves(results), run_id=tracked.run_id),
            )
        for path, text in files.items():
            tracked.log_file(path, text)
        content = json.dumps(results, indent=1)
        tracked.log_file(RESULTS_FILE, content)
        prune_checkpoints(run_dir, keep=config.checkpoint.keep)
        tracked.finish(status="FINISHED")
        storage.write_bytes(storage.join(run_dir, RESULTS_FILE), content.encode())  # last: with it the run is finished
    except BaseException as error:
        tracked.finish(status="KILLED" if isinstance(error, StoppedError) else "FAILED")
        if isinstance(error, (ValueError, FileNotFoundError)):  # no user's mistake any more: show where it happened
            raise RuntimeError(f"run {config.run_name} failed") from error
        raise
    if config.tracking.register is not None:
        _register(config.tracking.register, storage.join(run_dir, BEST), tracked)
    _show_results(results, run_dir, tracked.uri, has_report=bool(files))
    return results


def _as_started(config: TrainConfig, run_dir: str) -> TrainConfig:
    """Fill in what the command of a run that goes on leaves to the cluster, which may not have all of its nodes yet."""
    before = _started_with(run_dir)
    if before is None:
        return config
    return dataclasses.replace(
        config,
        device=config.device if config.device != "auto" else before.device,
        num_workers=config.num_workers or before.num_workers,
        threads=config.threads or before.threads,
    )


def _settle(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on the cluster, once it has room for the plan.

    Raises:
        ValueError: it has none, or does not say how many workers to start.

    """
    _, gpus = cluster.totals()
    device = cluster.settle_device(config.device)
    if device == "cpu" and config.model.batch_norm == "sync":
        raise ValueError("--model.batch-norm sync needs GPUs; choose local or frozen")
    if device == "cuda" and not gpus and config.num_workers is None:
        raise ValueError(
            "the cluster has no GPUs; if it can add nodes with them, say for how many --num-workers; else --device cpu"
        )
    batch_size = config.data.batch_size
    # Of the cluster's GPUs as many as share the batch evenly.
    most_workers = max(n for n in range(1, max(1, gpus) + 1) if batch_size % n == 0) if device == "cuda" else 1
    config = dataclasses.replace(config, device=device, num_workers=config.num_workers or most_workers)
    fewest, most = _worker_range(config)
    cluster.wait_for(
        {
            "training": (fewest, _worker_resources(config)),
            "reading": (DATA_CPUS, {"CPU": 1}),
            "evaluation in mid-run": (MID_RUN_EVAL_CPUS if config.eval.every else 0, {"CPU": 1}),
        },
        minutes=config.wait_for_nodes,
        fix="lower --num-workers or --cpus-per-worker, or add nodes",
    )
    if config.threads is None:
        # A node may be less than a machine, and a Ray of our own have more CPUs than its machine.
        cores, (cpus, _) = os.cpu_count() or 1, cluster.totals()
        threads = max(1, min(cores // math.ceil(most / len(cluster.live_nodes())), cpus // most))
        config = dataclasses.replace(config, threads=threads)
    return config


def _refuse_to_train_again(config: TrainConfig, run_dir: str, opening: "Future[Tracker]") -> None:
    """Refuse to go on with a run that is finished; MLflow is sent what it may still have to get of it.

    Raises:
        ValueError: the run is finished.

    """
    if storage.exists(storage.join(run_dir, RESULTS_FILE)):
        run_id = storage.read_bytes(storage.join(run_dir, MLFLOW_ID_FILE)).decode()
        if storage.exists(unsent_file(config.storage, run_id)):
            opening.result().add_to(run_id)
        raise ValueError(f"run {config.run_name} is finished: see {run_dir}/{RESULTS_FILE}; choose another --run-name")


def refuse_to_change(config: TrainConfig, run_dir: str) -> None:
    """Refuse to go on with a run that was started with what would make another run of it.

    Raises:
        ValueError: with the differences.

    """
    before = _started_with(run_dir)
    changed = differences(before, config) if before else []
    if changed:
        raise ValueError(
            f"run {config.run_name} was started otherwise: {'; '.join(changed)}; give the same to go on with it, or "
            "choose another --run-name"
        )


def _started_with(run_dir: str) -> TrainConfig | None:
    """Return what a run was started with; None: it was not yet."""
    location = storage.join(run_dir, CONFIG_FILE)
    if not storage.exists(location):
        return None
    return config_from_dict(json.loads(storage.read_bytes(location)), location=location)


def _worker_range(config: TrainConfig) -> tuple[int, int]:
    """Return the fewest and the most training workers of a settled configuration."""
    assert config.worker_range is not None
    return config.worker_range


def _worker_resources(config: TrainConfig) -> dict[str, float]:
    """Return what one training worker of a settled configuration reserves."""
    return {"CPU": float(config.cpus_per_worker)} | ({"GPU": 1.0} if config.device == "cuda" else {})


def cpus_needed(config: TrainConfig, num_workers: int) -> int:
    """Return the CPUs that a run needs: its training workers' and those beside."""
    return num_workers * config.cpus_per_worker + DATA_CPUS + (MID_RUN_EVAL_CPUS if config.eval.every else 0)


def _open_tracking(config: TrainConfig, run_dir: str) -> "Tracker":
    from nsl_dist.tracking.tracker import Tracker  # MLflow takes seconds to import

    goes_on = storage.exists(storage.join(run_dir, MLFLOW_ID_FILE))
    return Tracker(config.tracking.uri, storage_root=config.storage, may_be_away=goes_on)


def _start_tracking(tracked: "Tracker", config: TrainConfig, manifest: Manifest, run_dir: str) -> None:
    """Start the MLflow run, or go on with that of this run if it was interrupted before.

    Raises:
        ValueError: it trained on other data before.

    """
    location, of_data = (storage.join(run_dir, name) for name in (MLFLOW_ID_FILE, DIGEST_FILE))
    if storage.exists(location):
        digest = storage.read_bytes(of_data).decode()
        if digest != manifest.digest:
            raise ValueError(
                f"run {config.run_name} was started with data of digest {digest[:16]}, {manifest.root} has "
                f"{manifest.digest[:16]}; give the same --data.root, or choose another --run-name"
            )
        tracked.resume(storage.read_bytes(location).decode())
        return
    commit = cluster.job_metadata().get("git_commit") or None  # see Makefile
    tracked.start(config, manifest, cluster=cluster.described(), git_commit=commit)
    storage.write_bytes(storage.join(run_dir, CONFIG_FILE), json.dumps(dataclasses.asdict(config), indent=1).encode())
    storage.write_bytes(of_data, manifest.digest.encode())
    storage.write_bytes(location, tracked.run_id.encode())


def _announce(config: TrainConfig, manifest: Manifest, schedule: Schedule, run_dir: str, tracked: "Tracker") -> None:
    """Say what the run will do before it does it."""
    fewest, most = _worker_range(config)
    query, gallery = manifest.evaluation_splits
    train, test = manifest.splits["train"], manifest.splits[query]
    rows = Partition(train["num_classes"], 0, fewest).rows_per_rank
    checkpoint = newest_checkpoint(run_dir)
    proxies, per_class = config.proxies, config.data.images_per_class
    sampled = f"{proxies.sample_rate:.0%}" if proxies.num_sampled is None else f"{proxies.num_sampled:,}"
    numbers_per_row = 2 * config.model.dim if proxies.optimizer == "sgd" else config.model.dim + 1
    mib = rows * numbers_per_row * (2 if proxies.dtype == "bfloat16" else 4) / 2**20
    first_phase = (
        f"{config.optim.new_layers_epochs} epochs of the new layers, then " if config.optim.new_layers_epochs else ""
    )
    lines = {
        "run": f"{config.run_name} (recipe {config.recipe}, seed {config.seed})",
        "data": f"{manifest.root} (digest {manifest.digest[:16]})",
        "train": f"{train['num_images']:,} images of {train['num_classes']:,} classes",
        "test": f"{test['num_images']:,} images of {test['num_classes']:,} unseen classes"
        + (
            f", looked for among {manifest.splits[gallery]['num_images']:,} of the {gallery}"
            if query != gallery
            else f", {test['num_singletons']:,} with one image, sure misses"
            if test["num_singletons"]
            else ""
        ),
        "left out": f"{len(manifest.undecodable):,} undecodable images" if manifest.undecodable else "",
        "model": f"{config.model.backbone} ({config.model.weights or 'random weights'}), {config.model.dim} "
        f"dimensions, {config.data.image_size} x {config.data.image_size} pixels",
        "proxies": f"{train['num_classes']:,} x {config.model.dim}, {sampled} sampled in each iteration; each worker "
        f"keeps {rows:,} in {proxies.dtype}, {mib:,.1f} MiB with the state of {proxies.optimizer}, placed on "
        f"{config.device if proxies.placement == 'device' else proxies.placement}",
        "batches": (
            f"{config.data.batch_size // per_class} classes x {per_class} images = {config.data.batch_size}, "
            if per_class is not None
            else f"{config.data.batch_size} images of any classes, "
        )
        + (f"{config.data.batch_size // most} to " if most > fewest else "")
        + f"{config.data.batch_size // fewest} on each worker",
        "schedule": f"{first_phase}{config.optim.epochs} epochs of {schedule.steps_per_epoch} iterations = "
        f"{schedule.num_steps:,} in all; SGD {config.optim.lr}, {config.optim.schedule}",
        "workers": f"{config.num_workers} on {config.device}",
        "checkpoint": f"every {config.checkpoint.every}{'' if config.checkpoint.minutes else ' iterations'}"
        + (f"; goes on from {checkpoint}" if checkpoint else ""),
        "written to": run_dir,
        "MLflow": f"{tracked.uri}, run {tracked.run_id}",
    }
    print("\n".join(f"{name:>10}  {text}" for name, text in lines.items() if text), flush=True)


def _fit(
    config: TrainConfig,
    manifest: Manifest,
    tracked: "Tracker",
    run_dir: str,
    schedule: Schedule,
    phases: Phases,
    *,
    monitor_nodes: bool,
) -> list[float]:
    """Train on Ray Train to the last step; return the throughputs on the way, images/s.

    Raises:
        StoppedError: by SIGTERM or SIGINT.
        TrainingError: what cannot be mended by starting again, or failed too often.

    """
    fewest, most = _worker_range(config)
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # a notice may come 30 s before its node goes
    if most > fewest:
        # After the loss of a node Ray Train still counts it at first, and waits a minute for room for as many workers.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    from nsl_dist.tracking.nodes import NodeMetrics

    # On the driver's own node: the loss of another one must not take it away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress, orders = (Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2))
    filesystem, path = storage.resolve(storage.join(config.storage, "runs"))
    new_trainer = functools.partial(
        TorchTrainer,
        _train_worker,
        train_loop_config={
            "config": config,
            "manifest": manifest,
            "run_dir": run_dir,
            "progress": progress,
            "orders": orders,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, most) if most > fewest else fewest,
            use_gpu=config.device == "cuda",
            resources_per_worker=_worker_resources(config),
            # Gradients travel fastest within a node; threads of workers on CPUs share one.
            placement_strategy="PACK" if config.device == "cuda" else "SPREAD",
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=config.run_name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoint.keep),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY} if config.device == "cpu" else {},
            callbacks=[_StopAtLastingErrors()],
        ),
        validation_config=ray.train.ValidationConfig(
            functools.partial(
                evaluate_checkpoint, config=config, manifest=manifest, run_dir=run_dir, progress=progress
            ),
            ray_remote_kwargs={"num_cpus": 0},
        ),
    )
    relay = Relay(progress, tracked, schedule, phases)
    nodes = None
    if monitor_nodes:
        nodes = NodeMetrics(lambda metrics: progress.put({"step": 0, "node": metrics}))  # the relay knows the step

    def has_left() -> bool:
        if relay.left_at is None:
            return False
        checkpoint = storage.patiently(lambda: newest_checkpoint(run_dir))
        return checkpoint is not None and step_of(checkpoint) >= relay.left_at

    num_failures = 0
    try:
        while True:
            storage.patiently(lambda: _drop_damaged_record(run_dir))
            try:
                stopped_by = _run_until_stopped(new_trainer().fit, orders, has_left=has_left)
                break
            except TrainingFailedError as error:
                cause = error.controller_failure if isinstance(error, ControllerError) else error
                checkpoint = storage.patiently(lambda: newest_checkpoint(run_dir))
                if isinstance(cause, LASTING_ERRORS):
                    last = f"The last checkpoint is {checkpoint or 'none'}"
                    raise TrainingError(f"run {config.run_name}: {cause}\n{last}") from None
                num_failures += 1
                if not isinstance(cause, OSError) or 0 <= config.max_failures < num_failures:
                    raise TrainingError(
                        f"run {config.run_name} failed (--max-failures {config.max_failures}): {error}\n"
                        f"The same command with --run-name {config.run_name} goes on from {checkpoint or 'the start'}"
                    ) from error
                # Storage failed where Ray Train keeps its own record, which it does not try twice.
                print(f"Ray Train's controller failed: {cause}; it is started again", flush=True)
    finally:
        if nodes is not None:
            nodes.close()
        relay.close()
    checkpoint = storage.patiently(lambda: newest_checkpoint(run_dir))
    if stopped_by is not None and (checkpoint is None or step_of(checkpoint) < schedule.num_steps):
        raise StoppedError(
            stopped_by,
            f"run {config.run_name} was stopped; the same command with --run-name {config.run_name} goes on from "
            f"{checkpoint or 'the start'}",
        )
    return relay.rates


def _drop_damaged_record(run_dir: str) -> None:
    """Delete Ray Train's own record of a run's checkpoints if it was cut off or names one that is gone.

    Ray Train would refuse to go on. What it held, which of them to delete and which to evaluate, is not worth that.
    """
    location = storage.join(run_dir, RAY_TRAIN_RECORD)
    if not storage.exists(location):
        return
    try:
        results = json.loads(storage.read_bytes(location))["checkpoint_results"]
        damaged = not all(storage.exists(storage.join(run_dir, result["checkpoint_dir_name"])) for result in results)
    except ValueError:
        damaged = True
    if damaged:
        print(f"{location} is damaged; it is deleted, and the newest whole checkpoint looked for", flush=True)
        storage.delete(location)


def _train_worker(setup: dict[str, Any]) -> None:
    from nsl_dist.training.loop import train_worker  # here, so that driver and controller need not load it

    logging.getLogger().setLevel(logging.WARNING)  # Ray Train's own level spares the lines about each report
    train_worker(**setup)


class _StopAtLastingErrors(ray.train.UserCallback):
    """Ends a run, in Ray Train's controller, at errors that starting the workers again would not mend."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        for error in worker_exceptions.values():
            if isinstance(error, LASTING_ERRORS):
                raise error


def _run_until_stopped(work: Callable[[], Any], orders: Queue, *, has_left: Callable[[], bool]) -> int | None:
    """Call `work` in a thread; answer SIGTERM and SIGINT by telling the workers to leave.

    A second signal ends the driver at once. Once the workers have left `work` is not waited for much longer: Ray Train
    stays for all evaluations in mid-run, which are done when the run goes on.

    Returns:
        The signal, if there was one.

    """
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may answer signals
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        threading.Thread(target=run, daemon=True).start()
        ordered = False
        while not wait([done], timeout=0.5).done:
            if received and not ordered:
                print(
                    f"{signal.Signals(received[0]).name}: the workers write a checkpoint and leave; again: at once",
                    flush=True,
                )
                orders.put("leave")
                ordered = True
            if ordered and has_left():
                wait([done], timeout=LEAVE_SECONDS)
                break
        if done.done():
            done.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0] if received else None


def _register(name: str, best: str, tracked: "Tracker") -> None:
    try:
        print(f"registered: {tracked.register(best, name=name, step=step_of(best))}", flush=True)
    except ValueError as error:  # the run is finished all the same
        print(f"{error}; later: python jobs/export.py --checkpoint {best} --register {name}", flush=True)


def _show_results(results: dict[str, Any], run_dir: str, tracking_uri: str, *, has_report: bool) -> None:
    trained = results | {"seconds": results["evaluation_seconds"]}
    untrained = {"untrained": results["untrained"]} if "untrained" in results else {}
    seconds = ", ".join(f"{phase} {duration(value)}" for phase, value in results["seconds"].items())
    lines = [
        "\n" + table({"trained": trained} | untrained if untrained else {"": trained}),
        f"{seconds}; {results['train_images_per_second'] or 0:.0f} training images/s",
        *([f"report:  {run_dir}/{REPORT_FILE}"] if has_report else []),
        f"results: {run_dir}/{RESULTS_FILE}",
        f"MLflow:  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {tracking_uri}",
    ]
    show_results("\n".join(lines), results)

"""A complete training run on the driver, from the first checks to the results."""

import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nsl_dist import cluster, storage
from nsl_dist.background import in_background
from nsl_dist.config import BY_CLASSES, DataConfig, TrainConfig, differences
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import DataSource, Manifest, find_data, open_data, synthetic_data
from nsl_dist.progress import Phases, announce, doing, duration, show_results
from nsl_dist.proxies.partition import Partition
from nsl_dist.retrieval.evaluation import evaluate
from nsl_dist.retrieval.faiss_index import check_index
from nsl_dist.retrieval.report import REPORT_FILE, write_report
from nsl_dist.retrieval.results import EvaluationResults, table
from nsl_dist.run import FAILURES_FILE, MODEL_FILE, RESULTS_FILE, Run, RunFolder, StoppedError, unsent_file
from nsl_dist.schedule import Schedule
from nsl_dist.stopping import before_a_stop
from nsl_dist.training.fit import fit, worker_resources
from nsl_dist.training.preflight import check_model
from nsl_dist.training.results import TrainingResults

if TYPE_CHECKING:
    from nsl_dist.tracking.tracker import Tracker
    from nsl_dist.training.growth import Growth, Match

# CPUs besides the training workers': one to decode, and one for evaluation during training, which embeds on CPUs.
DATA_CPUS = 1
ADVISED_CLASSES = 50  # for training
MID_RUN_EVAL_CPUS = 1
CLASSES_SHOWN = 12


def train(config: TrainConfig, *, of_study: bool = False) -> TrainingResults:
    """Train and evaluate, show progress and results, and write `results.json`.

    Args:
        config: configuration of the run.
        of_study: the run is one of many, so it writes no report and does not monitor the nodes.

    Raises:
        FileNotFoundError: the data does not exist.
        ValueError: the configuration, data, storage or cluster does not allow this run; nothing was trained.
        StoppedError: SIGTERM or SIGINT was received.
        TrainingError: the failure is one that restarting would not fix, or there were more than `config.max_failures`.

    """
    called_at = time.time()
    spent = Phases()
    config, source = _check(config)
    folder = RunFolder.of(config)
    tracker, check = _connect(config, folder)
    start = Phases(began=cluster.submitted_at() or called_at)
    start.end("job, Ray and MLflow")
    config = _settle(config)
    start.end("nodes")
    manifest = _open_data(config, source, check)
    config = fit_batch(config, manifest.split("train").sizes)  # again: classes may have gone with undecodable images
    start.end("data and model")
    match = _match_classes(config, folder, manifest)
    run = begin(config, folder, manifest, tracker)
    with _tracking_the_end(run, tracker):
        _announce(run, tracker)
        spent.end("setup")
        growth = _start_from_another(run, match)
        if match is not None:
            start.end("new classes")
            spent.end("new classes")
        untrained = None
        if config.eval.untrained:
            untrained = _evaluate(run, tracker, step=0)
            start.end("untrained evaluation")
            spent.end("untrained")
        rates = fit(run, tracker, start, monitor_nodes=not of_study)
        spent.end("train")
        evaluation = _evaluate(run, tracker, step=run.schedule.num_steps)
        spent.end("evaluate")
        results = TrainingResults(
            evaluation=evaluation,
            untrained=untrained,
            run_name=folder.name,
            mlflow_run_id=run.mlflow_run_id,
            steps=run.schedule.num_steps,
            seconds=spent.seconds,
            train_images_per_second=statistics.median(rates) if rates else None,
            data={"digest": manifest.digest, "source": manifest.source, **manifest.splits},
            left_out_shards=folder.left_out_shards(),
            growth=dataclasses.asdict(growth) if growth is not None else None,
            config=dataclasses.asdict(config),
        )
        _finish(run, results, tracker)
    facts = {} if growth is None else {"Classes": growth.sentence()}
    has_report = not of_study and _report(run, results, tracker, facts=facts)
    if config.tracking.register is not None:
        _register(config.tracking.register, run, tracker)
    _show_results(run, results, tracker, has_report=has_report)
    return results


def _check(config: TrainConfig) -> tuple[TrainConfig, DataSource | None]:
    """Check whatever can be checked before starting anything.

    Returns:
        The configuration with its run name, absolute storage path and, if the run continues, the settings it was
        started with; and its data, None for synthetic products.

    """
    config = dataclasses.replace(
        config,
        storage=storage.absolute(config.storage),  # processes may have different working directories
        run_name=config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
    )
    if config.data.test_classes is not None:  # an evaluation reads it again, from another folder
        test_classes = storage.absolute(config.data.test_classes)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_classes=test_classes))
    if config.init_from is not None:
        config = dataclasses.replace(config, init_from=storage.absolute(config.init_from))
    source = find_source(config.data)
    storage.check_writable(config.storage)
    config = as_started(config)
    if config.init_from is not None and RunFolder.of(config).newest_checkpoint() is None:
        from nsl_dist.training.growth import check_source  # torch takes seconds to import

        check_source(config)
    check_index(config.eval, config.model.dim)
    if source is not None:
        sizes = source.training_sizes()
        config = fit_batch(config, sizes)
        advise(len(sizes))
        # Refuses what does not fit, before anything is decoded.
        ClassBalancedPlan(sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    return config, source


def find_source(config: DataConfig) -> DataSource | None:
    """Look at the configured data; None stands for synthetic products.

    Raises:
        FileNotFoundError, ValueError: see `find_data`; or a split is asked of shards.

    """
    if config.root is None:
        return None
    source = find_data(config.root, layout=config.layout, split=config.folder_split)
    if source.records is None and config.folder_split != BY_CLASSES:
        raise ValueError(
            f"{config.root} holds shards, which were split when they were prepared; give --data.split, "
            "--data.test-share and --data.test-classes to jobs/prepare_shards.py (there without data.)"
        )
    return source


def advise(num_classes: int) -> None:
    """Say so where there are few training classes."""
    if num_classes < ADVISED_CLASSES:
        print(
            f"{num_classes} training classes are few: {ADVISED_CLASSES} or more are advised for embeddings of classes "
            "that training has not seen",
            flush=True,
        )


def fit_batch(config: TrainConfig, sizes: NDArray[np.int64]) -> TrainConfig:
    """Make a recipe's batch smaller where there are too few training classes or images for it, and say so.

    Args:
        config: its batch is left as it is if the user chose it; `ClassBalancedPlan` refuses one that is too large.
        sizes: images of each training class.

    Raises:
        ValueError: there are fewer than two training classes.

    """
    num_classes, per_class, num_images = len(sizes), config.data.images_per_class, int(sizes.sum())
    if num_classes < 2:
        raise ValueError(
            f"{config.data.root}: too few training classes, {num_classes}; training by classification needs two or "
            f"more, and {ADVISED_CLASSES} or more to be of use for classes that it has not seen"
        )
    most = num_images if per_class is None else min(num_classes * per_class, num_images)
    step = math.lcm(per_class or 1, *range(*_counts_of_workers(config)))
    fitted = most // step * step
    if not config.data.fit_batch or config.data.batch_size <= most or fitted == 0:
        return config
    there = f"{num_images} training images" if most == num_images else f"{num_classes} training classes x {per_class}"
    print(f"batch {config.data.batch_size} -> {fitted}: {there}", flush=True)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=fitted))


def _counts_of_workers(config: TrainConfig) -> tuple[int, int]:
    """Return the bounds of a range of all numbers of workers that a configuration allows."""
    fewest, most = config.worker_range or (1, 1)
    return fewest, most + 1


def as_started(config: TrainConfig) -> TrainConfig:
    """Fill in a continued run's cluster-dependent settings as it was started, since some nodes may not be up yet."""
    before = RunFolder.of(config).started_with()
    if before is None:
        return config
    return dataclasses.replace(
        config,
        device=config.device if config.device != "auto" else before.device,
        num_workers=config.num_workers or before.num_workers,
        threads=config.threads or before.threads,
        data=dataclasses.replace(config.data, batch_size=before.data.batch_size)
        if config.data.fit_batch
        else config.data,
    )


def refuse_to_change(config: TrainConfig) -> None:
    """Refuse to continue a run with incompatible options.

    Raises:
        ValueError: the options differ; the message lists the differences.

    """
    before = RunFolder.of(config).started_with()
    changed = differences(before, config) if before else []
    if changed:
        raise ValueError(
            f"run {config.run_name} was started with other options: {'; '.join(changed)}; use the same ones to "
            "continue it, or choose another --run-name"
        )


def _connect(config: TrainConfig, folder: RunFolder) -> tuple["Tracker", Future[None]]:
    """Connect to MLflow and Ray, and begin to try out the model of a new run, all at the same time: each takes seconds.

    Returns:
        The connection to MLflow, and what fails if the model does.

    Raises:
        ValueError: the run is finished or was started with other options, or MLflow cannot be used.

    """

    def open_tracking() -> "Tracker":
        from nsl_dist.tracking.tracker import Tracker  # MLflow takes seconds to import

        goes_on = folder.mlflow_run_id() is not None
        return Tracker(config.tracking.uri, storage_root=config.storage, may_be_away=goes_on)

    def try_model() -> None:
        if folder.newest_checkpoint() is None:
            check_model(config)

    doing("starting Ray and MLflow")
    opening, check = in_background(open_tracking), in_background(try_model)
    _refuse_to_train_again(config, folder, opening)
    refuse_to_change(config)
    _, most_workers = config.worker_range or (1, 1)
    cluster.connect(num_cpus=cpus_needed(config, most_workers))
    return opening.result(), check  # reports a wrong URI before nodes are requested


def _refuse_to_train_again(config: TrainConfig, folder: RunFolder, opening: "Future[Tracker]") -> None:
    """Refuse to continue a finished run, after sending any unsent records to MLflow.

    Raises:
        ValueError: the run is finished.

    """
    if not folder.is_finished():
        return
    run_id = folder.mlflow_run_id()
    if run_id is not None and storage.exists(unsent_file(config.storage, run_id)):
        opening.result().add_to(run_id)
    raise ValueError(
        f"run {config.run_name} is finished: see {folder.results}; to train longer, start from it: "
        f"--init-from {folder.location} with another --run-name"
    )


def cpus_needed(config: TrainConfig, num_workers: int) -> int:
    """Return the CPUs that a run needs for training, decoding and evaluation."""
    return num_workers * config.cpus_per_worker + DATA_CPUS + (MID_RUN_EVAL_CPUS if config.eval.every else 0)


def _settle(config: TrainConfig) -> TrainConfig:
    """Wait until the cluster has room for the run, and fill in the settings that depend on the cluster.

    Raises:
        ValueError: there is no room, or the number of workers cannot be determined.

    """
    _, gpus = cluster.totals()
    device = cluster.settle_device(config.device)
    if device == "cpu" and config.model.batch_norm == "sync":
        raise ValueError("--model.batch-norm sync needs GPUs; choose local or frozen")
    if device == "cuda" and not gpus and config.num_workers is None:
        raise ValueError(
            "the cluster has no GPUs; if it can add GPU nodes, set --num-workers; otherwise use --device cpu"
        )
    batch_size = config.data.batch_size
    # Use as many GPUs as divide the batch evenly.
    most_workers = max(n for n in range(1, max(1, gpus) + 1) if batch_size % n == 0) if device == "cuda" else 1
    config = dataclasses.replace(config, device=device, num_workers=config.num_workers or most_workers)
    fewest, most = _worker_range(config)
    cluster.wait_for(
        {
            "training": (fewest, worker_resources(config)),
            "reading": (DATA_CPUS, {"CPU": 1}),
            "evaluation in mid-run": (MID_RUN_EVAL_CPUS if config.eval.every else 0, {"CPU": 1}),
        },
        minutes=config.wait_for_nodes,
        fix="lower --num-workers or --cpus-per-worker, or add nodes",
    )
    if config.threads is None:
        # A node may be only part of a machine, and a local Ray may have more CPUs than its machine has cores.
        cores, (cpus, _) = os.cpu_count() or 1, cluster.totals()
        threads = max(1, min(cores // math.ceil(most / len(cluster.live_nodes())), cpus // most))
        config = dataclasses.replace(config, threads=threads)
    return config


def _worker_range(config: TrainConfig) -> tuple[int, int]:
    """Return the minimum and maximum number of training workers of a settled configuration."""
    assert config.worker_range is not None
    return config.worker_range


def _open_data(config: TrainConfig, source: DataSource | None, check: Future[None]) -> Manifest:
    """Open the data, preparing it if needed, and wait for the check of the model."""
    doing("opening the data and trying out the model")
    if source is None:
        print(
            "No --data.root: training on built-in synthetic products, rendered once. To use the real data set:\n"
            "  python jobs/train_sop.py --recipe sop_resnet50 --data.root /path/to/Stanford_Online_Products",
            flush=True,
        )
        source = synthetic_data(config.storage)
    manifest = open_data(source, storage_root=config.storage, max_undecodable=config.data.max_undecodable)
    check.result()
    return manifest


def begin(config: TrainConfig, folder: RunFolder, manifest: Manifest, tracker: "Tracker") -> Run:
    """Start the run in MLflow, or resume it there if it was interrupted.

    Raises:
        ValueError: the interrupted run was trained on other data.

    """
    split = manifest.split("train")
    plan = ClassBalancedPlan(split.sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    schedule = Schedule(config.optim, plan.steps_per_epoch)
    mlflow_run_id = folder.mlflow_run_id()
    if mlflow_run_id is None:
        commit = cluster.job_metadata().get("git_commit") or None  # set in the Makefile
        tracker.start(config, manifest, cluster=cluster.described(), git_commit=commit)
        tracker.note(_description(config, manifest))
        folder.begin(config, digest=manifest.digest, mlflow_run_id=tracker.run_id)
    else:
        digest = folder.data_digest() or ""
        if digest != manifest.digest:
            raise ValueError(
                f"run {config.run_name} was started with data of digest {digest[:16]}, {manifest.root} has "
                f"{manifest.digest[:16]}; give the same --data.root, or choose another --run-name"
            )
        tracker.resume(mlflow_run_id)
        tracker.note(f"Continued {_now()}.")
    if not folder.has_classes():
        folder.record_classes(manifest)
    return Run(config, folder, manifest, schedule, tracker.run_id)


def _description(config: TrainConfig, manifest: Manifest) -> str:
    """Return what MLflow shows above the metrics of a run, in Markdown."""
    train, (query, _) = manifest.splits["train"], manifest.evaluation_splits
    command = f"\n\n    python {shlex.join(sys.argv)}" if config.tracking.parent is None else ""
    return (
        f"{config.model.backbone}, {config.model.dim} dimensions, {config.data.image_size} pixels, trained on "
        f"{train['num_images']:,} images of {train['num_classes']:,} classes of {manifest.name}, tested on "
        f"{manifest.splits[query]['num_images']:,} of {manifest.test_classes}.{command}"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def _announce(run: Run, tracker: "Tracker") -> None:
    """Print a summary of the run before it starts."""
    lines = {
        "run": f"{run.config.run_name} (recipe {run.config.recipe}, seed {run.config.seed})",
        **_described_data(run.manifest),
        **_described_model(run),
        **_described_work(run),
        "written to": run.folder.location,
        "MLflow": f"{tracker.uri}, run {tracker.run_id}",
    }
    announce(lines)


def _described_data(manifest: Manifest) -> dict[str, str]:
    query, gallery = manifest.evaluation_splits
    train, test = manifest.splits["train"], manifest.splits[query]
    searched = ""
    if query != gallery:
        searched = f", searched among {manifest.splits[gallery]['num_images']:,} of the {gallery}"
    elif test["num_singletons"]:
        searched = f", {test['num_singletons']:,} with a single image, always missed"
    return {
        "data": f"{manifest.root} (digest {manifest.digest[:16]})",
        "train": f"{train['num_images']:,} images of {train['num_classes']:,} classes{_named(manifest, 'train')}",
        "test": f"{test['num_images']:,} images of {test['num_classes']:,} {manifest.test_classes}{searched}"
        + _named(manifest, query),
        **manifest.account(),
    }


def _named(manifest: Manifest, split: str) -> str:
    """Return the names of the first class folders; classes of published data sets have numbers."""
    if manifest.layout != "folders":
        return ""
    names = manifest.class_ids(split).to_pylist()
    return f": {', '.join(names[:CLASSES_SHOWN])}{', ...' if len(names) > CLASSES_SHOWN else ''}"


def _described_model(run: Run) -> dict[str, str]:
    config, proxies = run.config, run.config.proxies
    num_classes = run.manifest.splits["train"]["num_classes"]
    rows = len(Partition(num_classes, 0, _worker_range(config)[0]).rows(proxies.per_class))
    sampled = f"{proxies.sample_rate:.0%}" if proxies.num_sampled is None else f"{proxies.num_sampled:,}"
    numbers_per_row = 2 * config.model.dim if proxies.optimizer == "sgd" else config.model.dim + 1
    mib = rows * numbers_per_row * (2 if proxies.dtype == "bfloat16" else 4) / 2**20
    loss = [
        f"temperature {proxies.temperature:g}",
        *([f"{proxies.margin_kind} margin {proxies.margin:g}"] if proxies.margin else []),
        *([f"the nearest of {proxies.per_class} proxies per class"] if proxies.per_class > 1 else []),
        *([f"without classes above {proxies.filter_above:g}"] if proxies.filter_above is not None else []),
        *([f"label smoothing {proxies.label_smoothing:g}"] if proxies.label_smoothing else []),
    ]
    return {
        "model": f"{config.model.backbone} ({config.init_from or config.model.weights or 'random weights'}), "
        f"{config.model.dim} "
        f"dimensions, {config.data.image_size} x {config.data.image_size} pixels",
        "proxies": f"{num_classes * proxies.per_class:,} x {config.model.dim}, {sampled} sampled in each iteration; "
        f"each worker keeps {rows:,} in {proxies.dtype}, {mib:,.1f} MiB with the state of {proxies.optimizer}, placed "
        f"on {config.device if proxies.placement == 'device' else proxies.placement}, multiplied in "
        f"{proxies.matmul_on(config.device)}",
        "loss": ", ".join(loss),
    }


def _described_work(run: Run) -> dict[str, str]:
    config, schedule = run.config, run.schedule
    fewest, most = _worker_range(config)
    batch_size, per_class, new_layers_epochs = (
        config.data.batch_size, config.data.images_per_class, config.optim.new_layers_epochs
    )  # fmt: skip
    newest = run.folder.newest_checkpoint()
    optimizer = {"sgd": "SGD", "adamw": "AdamW"}[config.optim.optimizer]
    return {
        "batches": (
            f"{batch_size // per_class} classes x {per_class} images = {batch_size}, "
            if per_class is not None
            else f"{batch_size} images of any classes, "
        )
        + (f"{batch_size // most} to " if most > fewest else "")
        + f"{batch_size // fewest} on each worker",
        "schedule": (f"{new_layers_epochs} epochs of the new layers, then " if new_layers_epochs else "")
        + f"{config.optim.epochs} epochs of {schedule.steps_per_epoch} iterations = {schedule.num_steps:,} in all; "
        f"{optimizer} {config.optim.lr}, {config.optim.schedule}",
        "workers": f"{config.num_workers} on {config.device}",
        "checkpoint": f"every {config.checkpoint.every}{'' if config.checkpoint.minutes else ' iterations'}"
        + (f"; continues from {newest[0]}" if newest else ""),
    }


@contextmanager
def _tracking_the_end(run: Run, tracker: "Tracker") -> Iterator[None]:
    """Report to MLflow if the run fails or is stopped."""

    def stop() -> None:
        tracker.note(f"Stopped {_now()}.")
        tracker.finish(status="KILLED")

    try:
        with before_a_stop(stop, said=f"the same command with --run-name {run.folder.name} continues"):
            yield
    except BaseException as error:
        if isinstance(error, (StoppedError, KeyboardInterrupt)):
            stop()
        else:
            tracker.finish(status="FAILED")
        if isinstance(error, (ValueError, FileNotFoundError)):  # no longer a user error: show the stack trace
            raise RuntimeError(f"run {run.folder.name} failed") from error
        raise


def _match_classes(config: TrainConfig, folder: RunFolder, manifest: Manifest) -> "Match | None":
    """Match the classes of a run that is about to start from another one; None for all others."""
    if config.init_from is None or folder.newest_checkpoint() is not None:
        return None
    from nsl_dist.training.growth import match_classes

    return match_classes(config, manifest)


def _start_from_another(run: Run, match: "Match | None") -> "Growth | None":
    """Write the checkpoint that a run starts from, unless it is there."""
    if run.config.init_from is None:
        return None
    from nsl_dist.training.growth import growth_of, write_start

    if match is not None:
        doing("copying the proxies of known classes, and embedding the images of new ones")
        write_start(run, match, num_gpus=_num_gpus(run.config))
        doing(None)
    return growth_of(run.folder)


def _num_gpus(config: TrainConfig) -> int:
    """Return the GPUs to embed with."""
    return _worker_range(config)[0] if config.device == "cuda" else 0


def _evaluate(run: Run, tracker: "Tracker", *, step: int) -> EvaluationResults:
    """Evaluate the checkpoint after `step` iterations; 0 is the model that training starts from."""
    num_gpus = _num_gpus(run.config)
    starts = step == 0 and run.config.init_from is None
    weights = None if starts else storage.join(run.folder.checkpoint(step), MODEL_FILE)
    doing("embedding the test images and searching")
    failures = run.folder.file(FAILURES_FILE) if step else None
    evaluation = evaluate(weights, run.config, run.manifest, num_gpus=num_gpus, failures=failures)
    doing(None)
    tracker.log(evaluation.metrics_by_name(), step=step)
    if step:
        run.folder.keep_best(step, recall=evaluation.recall["float"])
    else:
        print(f"untrained: {evaluation.recall_line()}", flush=True)
    return evaluation


def _finish(run: Run, results: TrainingResults, tracker: "Tracker") -> None:
    """Finish the run; the results are written last, so a run interrupted before that can continue."""
    content = json.dumps(results.to_json(), indent=1)
    tracker.log_file(RESULTS_FILE, content)
    tracker.note(f"Finished {_now()}: {results.evaluation.recall_line()}; the best model is in {run.folder.best}.")
    tracker.finish(status="FINISHED")
    storage.write_bytes(run.folder.results, content.encode())
    run.folder.prune_checkpoints(keep=run.config.checkpoint.keep)


def _report(run: Run, results: TrainingResults, tracker: "Tracker", *, facts: dict[str, str]) -> bool:
    """Write and track the report of a finished run; return whether there is one."""
    files = write_report(
        run.folder.location,
        results.evaluation,
        name=run.folder.name,
        config=run.config,
        manifest=run.manifest,
        history=tracker.history(results.evaluation.curves(), run_id=run.mlflow_run_id),
        untrained=results.untrained,
        facts=facts,
    )
    for path, text in files.items():
        tracker.log_file(path, text)
    tracker.wait()
    return bool(files)


def _register(name: str, run: Run, tracker: "Tracker") -> None:
    try:
        print(f"registered: {tracker.register(run.folder.best, name=name)}", flush=True)
    except ValueError as error:  # the run is finished anyway
        print(
            f"{error}; to register it later: python jobs/export.py --checkpoint {run.folder.best} --register {name}",
            flush=True,
        )


def _show_results(run: Run, results: TrainingResults, tracker: "Tracker", *, has_report: bool) -> None:
    evaluations = {"": results.evaluation}
    if results.untrained is not None:
        evaluations = {"trained": results.evaluation, "untrained": results.untrained}
    seconds = ", ".join(f"{phase} {duration(value)}" for phase, value in results.seconds.items())
    lines = [
        f"\n{table(evaluations)}",
        f"{seconds}; {results.train_images_per_second or 0:.0f} training images/s",
        *([f"report:  {run.folder.file(REPORT_FILE)}"] if has_report else []),
        f"misses:  {run.folder.file(FAILURES_FILE)}",
        f"results: {run.folder.results}",
        f"MLflow:  {tracker.where_to_look()}",
    ]
    show_results("\n".join(lines), results.to_json())

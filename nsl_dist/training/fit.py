"""The driver's side of training on Ray Train: start, signals, failures and end."""

import dataclasses
import functools
import json
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import ControllerError, TrainingFailedError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nsl_dist import cluster, storage
from nsl_dist.background import in_background
from nsl_dist.config import TrainConfig
from nsl_dist.progress import Phases, doing, output
from nsl_dist.retrieval.evaluation import evaluate
from nsl_dist.run import MODEL_FILE, Run, RunFolder, StoppedError, TrainingError
from nsl_dist.training.records import Evaluated, NodeMeasured
from nsl_dist.training.reporting import Reporter

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from nsl_dist.tracking.tracker import Tracker

RESIZE_SECONDS = 30.0  # how often an elastic run looks for new nodes
LEAVE_SECONDS = 10.0  # allowed for a stopped training to end once its checkpoint is written
RAY_TRAIN_RECORD = "checkpoint_manager_snapshot.json"  # in the folder of a run
LASTING_ERRORS = (ValueError, FloatingPointError)  # raised by workers; would recur after a restart


def fit(run: Run, tracker: "Tracker", phases: Phases, *, monitor_nodes: bool) -> list[float]:
    """Train on Ray Train to the last step; return the measured throughputs in images/s.

    Args:
        run: the run to train or continue.
        tracker: tracks the run in MLflow.
        phases: start-up phases; the last one ends with the first iteration.
        monitor_nodes: track CPU, memory, network and GPUs of all nodes.

    Raises:
        StoppedError: SIGTERM or SIGINT was received.
        TrainingError: the failure is one that restarting would not fix, or there were more than `config.max_failures`.

    """
    from nsl_dist.tracking.nodes import NodeMetrics  # MLflow takes seconds to import

    # The queues live on the driver's node, so that they survive the loss of any other.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    records, orders = (Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2))
    reporter = Reporter(records, tracker, run.schedule, phases)
    doing("starting the workers, each with its model and first images")
    nodes = NodeMetrics(lambda metrics: records.put(NodeMeasured(metrics))) if monitor_nodes else None
    try:
        stopped_by = _train_until_done(run, records, orders, reporter)
    finally:
        if nodes is not None:
            nodes.close()
        reporter.close()
    newest = storage.patiently(run.folder.newest_checkpoint)
    if stopped_by is not None and (newest is None or newest[1] < run.schedule.num_steps):
        raise StoppedError(
            stopped_by,
            f"run {run.folder.name} was stopped; the same command with --run-name {run.folder.name} continues from "
            f"{newest[0] if newest else 'the start'}",
        )
    return reporter.rates


def worker_resources(config: TrainConfig) -> dict[str, float]:
    """Return what one training worker of a settled configuration reserves."""
    return {"CPU": float(config.cpus_per_worker)} | ({"GPU": 1.0} if config.device == "cuda" else {})


def _train_until_done(run: Run, records: Queue, orders: Queue, reporter: Reporter) -> int | None:
    """Train to the last step, restarting Ray Train when its own storage access fails.

    Returns:
        The signal that stopped the training, if there was one.

    """
    name, max_failures = run.folder.name, run.config.max_failures

    def workers_have_left() -> bool:
        if reporter.left_at is None:
            return False
        newest = storage.patiently(run.folder.newest_checkpoint)
        return newest is not None and newest[1] >= reporter.left_at

    num_failures = 0
    while True:
        storage.patiently(lambda: drop_damaged_record(run.folder))
        try:
            return _run_until_stopped(
                _trainer(run, records, orders).fit,
                orders,
                has_begun=lambda: reporter.num_attempts > 0,
                has_left=workers_have_left,
            )
        except TrainingFailedError as error:
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            newest = storage.patiently(run.folder.newest_checkpoint)
            if isinstance(cause, LASTING_ERRORS):
                last = f"the last checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
                trace = _write_trace(cause, run.folder)
                raise TrainingError(f"run {name}: {_unwrapped(cause)}; {last}; stack trace in {trace}") from None
            num_failures += 1
            if not isinstance(cause, OSError) or 0 <= max_failures < num_failures:
                raise TrainingError(
                    f"run {name} failed (--max-failures {max_failures}): {error}\n"
                    f"The same command with --run-name {name} continues from {newest[0] if newest else 'the start'}"
                ) from error
            # Ray Train does not retry when storage fails while it saves its own record.
            print(f"Ray Train's controller failed: {cause}; it is started again", flush=True)


def _unwrapped(error: Exception) -> Exception:
    """Return what a task of Ray raised, without the stack traces that Ray puts into the text."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


def _write_trace(error: Exception, folder: RunFolder) -> str:
    """Write the stack trace of a failure beside the run; return its location."""
    location = folder.file("error.txt")
    storage.write_bytes(location, "".join(traceback.format_exception(error)).encode())
    return location


def _trainer(run: Run, records: Queue, orders: Queue) -> "TorchTrainer":
    from ray.train.torch import TorchTrainer  # torch takes seconds to import, in which Ray starts

    config = run.config
    assert config.worker_range is not None
    fewest, most = config.worker_range
    # A notice may come only 30 s before the node is removed.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    if most > fewest:
        # Ray Train still counts a lost node at first, and by default waits a minute for room for as many workers.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    filesystem, path = storage.resolve(run.folder.parent)
    return TorchTrainer(
        _train_worker,
        train_loop_config={"run": run, "records": records, "orders": orders},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, most) if most > fewest else fewest,
            use_gpu=config.device == "cuda",
            resources_per_worker=worker_resources(config),
            # Gradients travel fastest within a node, but CPU workers on one node compete for its cores.
            placement_strategy="PACK" if config.device == "cuda" else "SPREAD",
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=run.folder.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoint.keep),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": cluster.KEEP_FREED_MEMORY} if config.device == "cpu" else {},
            callbacks=[_StopAtLastingErrors()],
        ),
        validation_config=ray.train.ValidationConfig(
            functools.partial(_evaluate_checkpoint, run=run, records=records), ray_remote_kwargs={"num_cpus": 0}
        ),
    )


def _train_worker(arguments: dict[str, Any]) -> None:
    from nsl_dist.training.loop import train_worker  # imported here to spare the driver and the controller

    logging.getLogger().setLevel(logging.WARNING)  # Ray Train sets INFO, which prints lines for each report
    try:
        train_worker(**arguments)
    except Exception as error:
        if isinstance(_unwrapped(error), LASTING_ERRORS):
            _leave_errors_to_the_driver()
        raise


def _leave_errors_to_the_driver() -> None:
    """Keep Ray Train from printing stack traces in this process: the driver writes them to a file."""
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)


def _evaluate_checkpoint(_: ray.train.Checkpoint, *, step: int, run: Run, records: Queue) -> dict[str, float]:
    """Evaluate the checkpoint after `step` iterations during training; return metrics for Ray Train to keep."""
    cluster.quiet_ray_data()
    config = dataclasses.replace(run.config, eval=dataclasses.replace(run.config.eval, nmi=False))
    weights = storage.join(run.folder.checkpoint(step), MODEL_FILE)
    assert config.worker_range is not None
    spare_cpus = cluster.cores() - config.worker_range[1] * config.cpus_per_worker
    with output("quiet"):  # Ray would print its progress with a prefix, between the lines of the training
        # Training holds the GPUs, and needs some of the CPUs that its workers leave to decode.
        results = evaluate(weights, config, run.manifest, num_gpus=0, most_cpus=max(1, spare_cpus // 2))
    run.folder.keep_best(step, recall=results.recall["float"])
    records.put(Evaluated(step, results))
    return results.metrics_by_name()


class _StopAtLastingErrors(ray.train.UserCallback):
    """Ends a run, in Ray Train's controller, on errors that restarting the workers would not fix."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        for error in worker_exceptions.values():
            if isinstance(error, LASTING_ERRORS):
                _leave_errors_to_the_driver()
                raise error


def drop_damaged_record(folder: RunFolder) -> None:
    """Delete Ray Train's own record of a run's checkpoints if it is truncated or names a missing checkpoint.

    Ray Train would refuse to start with it. The record only says which checkpoints to delete and which to evaluate.
    """
    location = folder.file(RAY_TRAIN_RECORD)
    if not storage.exists(location):
        return
    try:
        results = json.loads(storage.read_bytes(location))["checkpoint_results"]
        damaged = not all(storage.exists(folder.file(result["checkpoint_dir_name"])) for result in results)
    except ValueError:
        damaged = True
    if damaged:
        print(f"{location} is damaged; deleting it and continuing from the newest complete checkpoint", flush=True)
        storage.delete(location)


def _run_until_stopped(
    work: Callable[[], Any], orders: Queue, *, has_begun: Callable[[], bool], has_left: Callable[[], bool]
) -> int | None:
    """Call `work` in a thread; on SIGTERM or SIGINT, tell the workers to leave.

    A second signal ends the driver immediately, as does the first while the workers have not begun and so have nothing
    to write. Once the workers have left, `work` gets only a few more seconds: Ray Train would wait for all pending
    evaluations, which are done when the run continues.

    Returns:
        The signal that was received, or None.

    """
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        handler = before.get(number)
        if (received or not has_begun()) and callable(handler):
            handler(number, frame)
        received.append(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread may set signal handlers
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        done = in_background(work)
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

"""The training loop of one worker, on Ray Train."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.queue import Queue
from torch import Tensor

from nsl_dist import cluster, storage
from nsl_dist.background import in_background
from nsl_dist.config import TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import DamagedShardError, Split
from nsl_dist.data.stream import planned_batches
from nsl_dist.run import Run, RunFolder
from nsl_dist.training.agreement import Agreement
from nsl_dist.training.meter import Meter
from nsl_dist.training.records import AttemptStarted, CheckpointWritten, Left, StepMetrics, Warned

if TYPE_CHECKING:
    from nsl_dist.training.step import TrainingStep


def train_worker(run: Run, records: Queue, orders: Queue) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end of the schedule.

    Args:
        run: the run to train or continue.
        records: carries records from the workers to the driver.
        orders: any item tells the workers to write a checkpoint and leave.

    """
    config, schedule = run.config, run.schedule
    rank = ray.train.get_context().get_world_rank()
    start = _agree_on_start(run)
    if start.step == schedule.num_steps:
        return
    batches = _Batches(run, start)
    training, bytes_read = _build(run, start)  # in parallel with making the first batch
    compile_seconds = compile_model(training, config, records) if training.compiled else None
    checkpoints = _Checkpoints(training, run, records)
    agreement = Agreement(config, records, orders, first_step=start.step)

    labels_B = start.plan.batch(start.step).labels
    accuracy = torch.zeros((), device=training.device)
    meter = Meter(start.step, schedule.num_steps, start.plan.batch_size)
    for step in range(start.step, schedule.num_steps):
        with meter.waiting():
            images_bCHW = batches.next(step)
        shown = (step + 1) % config.tracking.every == 0 or step in (start.step, schedule.num_steps - 1)
        loss = training.run(images_bCHW, labels_B, step=step, accuracy=accuracy if shown else None)
        if step + 1 < schedule.num_steps:
            labels_B = start.plan.batch(step + 1).labels
            training.proxies.prefetch(labels_B, step=step + 1)

        if step == start.step and rank == 0:
            records.put(
                AttemptStarted(
                    step,
                    dist.get_world_size(),
                    start.checkpoint,
                    bytes_read=bytes_read,
                    num_left_out=len(start.plan.left_out),
                    compile_seconds=compile_seconds,
                )
            )
        if shown:
            value = _finite(loss, step)
            if rank == 0:
                records.put(_measure(run, step, loss=value, accuracy=accuracy.item(), meter=meter))
        agreed = agreement.reached(step + 1)
        checkpoints.write_when_due(step=step + 1, out_of_turn=agreed.checkpoint)
        if agreed.leave:
            if rank == 0:
                records.put(Left(step + 1))
            return


@dataclass(frozen=True)
class _Start:
    """Where an attempt starts.

    Attributes:
        step: first iteration.
        checkpoint: checkpoint to load; None to start from the beginning.
        plan: plan of all batches, including those before `step`.
        streams: by rank, the batches from `step` on; empty if training is complete.

    """

    step: int
    checkpoint: str | None
    plan: ClassBalancedPlan
    streams: list[ray.data.DataIterator]


def _agree_on_start(run: Run) -> _Start:
    """Return the common starting point of all workers.

    Rank 0 decides and opens the streams, so that they match the step and the workers of this attempt.
    """
    found: list[_Start | None] = [None]
    if dist.get_rank() == 0:
        found = [storage.patiently(lambda: _find_start(run, world_size=dist.get_world_size()))]
    dist.broadcast_object_list(found, src=0)
    (start,) = found
    assert start is not None
    return start


def _find_start(run: Run, *, world_size: int) -> _Start:
    run.folder.prune_checkpoints(keep=None)
    checkpoint, first_step = run.folder.newest_checkpoint() or (None, 0)
    split = run.manifest.split("train")
    plan = plan_of(split, run.config, left_out=run.folder.left_out_shards())
    if first_step == run.schedule.num_steps:
        return _Start(first_step, checkpoint, plan, [])
    # In an elastic run the workers may occupy all CPUs of the cluster.
    num_cpus = sum(node["Resources"].get("CPU", 0) for node in cluster.live_nodes())
    streams = planned_batches(
        plan,
        split,
        run.config.data,
        first_step=first_step,
        last_step=run.schedule.num_steps,
        world_size=world_size,
        spare_cpus=num_cpus - world_size * run.config.cpus_per_worker >= 1,
    )
    return _Start(first_step, checkpoint, plan, list(streams))


def plan_of(split: Split, config: TrainConfig, *, left_out: list[str]) -> ClassBalancedPlan:
    """Return the plan of a run; no batch has classes from the `left_out` shards."""
    places = [place for place, name in enumerate(split.shard_names) if name in left_out]
    labels = np.flatnonzero(np.isin(split.shards, places)).tolist()
    return ClassBalancedPlan(
        split.sizes, config.data.batch_size, config.data.images_per_class, config.seed, left_out=tuple(labels)
    )


class _Batches:
    """This worker's part of each batch, on the device before its turn comes.

    On its way from a shard to a GPU, an image is decoded, resized and copied six times: to the others of its batch,
    cropped, into its block, into Ray's object store, into pinned memory, and from there to the GPU, on a stream of its
    own and beside the step before.
    """

    def __init__(self, run: Run, start: _Start) -> None:
        self._run = run
        self._rank = dist.get_rank()
        self._part_size = start.plan.batch_size // dist.get_world_size()
        self._device = ray.train.torch.get_device()
        self._batches = iter(
            start.streams[self._rank].iter_torch_batches(batch_size=self._part_size, prefetch_batches=2, device="cpu")
        )
        self._copies: torch.cuda.Stream | None = None
        self._coming = in_background(self._fetch)

    def next(self, step: int) -> Tensor:
        """Return the images of iteration `step`, uint8 on the device, and begin to fetch the next ones."""
        with _naming_damaged_shards(self._run.folder, self._run.config.data.max_damaged_shards):
            batch, copied = self._coming.result()
        if step + 1 < self._run.schedule.num_steps:
            self._coming = in_background(self._fetch)
        turn = (int(batch["step"][0]), int(batch["rank"][0]), len(batch["image"]))
        expected = (step, self._rank, self._part_size)
        assert turn == expected, f"expected (step, rank, images) = {expected}, got {turn}"
        images: Tensor = batch["image"]
        if copied is not None:
            using = torch.cuda.current_stream(self._device)
            using.wait_event(copied)
            images.record_stream(using)
        return images

    def _fetch(self) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Return the next batch and, on a GPU, the event after which its images are there."""
        batch = next(self._batches)
        if self._device.type == "cpu":
            return batch, None
        self._copies = self._copies or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._copies):
            batch["image"] = batch["image"].pin_memory().to(self._device, non_blocking=True)
        return batch, self._copies.record_event()


@contextmanager
def _naming_damaged_shards(folder: RunFolder, most: int) -> Iterator[None]:
    """Raise a damaged shard's own error or, if it may be left out, record the shard for the next attempt."""
    try:
        yield
    except Exception as error:
        damaged = _damaged_shard(error)
        if damaged is None:
            raise
        left_out = sorted({*folder.left_out_shards(), damaged.shard})
        if len(left_out) > most:
            raise damaged from None
        folder.leave_out(left_out)
        raise RuntimeError(f"restarting without the classes of damaged {damaged}") from None


def _damaged_shard(error: BaseException | None) -> DamagedShardError | None:
    """Find the error of a damaged shard inside Ray's wrappers."""
    while error is not None and not isinstance(error, DamagedShardError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def _wants_to_compile(config: TrainConfig, device: torch.device) -> bool:
    if config.compile == "auto":
        # Synchronised batch norm has collectives of its own, which torch.compile does not know.
        return device.type == "cuda" and config.model.batch_norm != "sync"
    return config.compile == "on"


def compile_model(training: "TrainingStep", config: TrainConfig, records: Queue) -> float | None:
    """Compile the model on all workers; return the seconds that it took.

    If it fails on any of them, no worker compiles: None is returned.

    Raises:
        ValueError: it fails, and the user asked for it.

    """
    from nsl_dist.device import has_compiler

    started = time.monotonic()
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if has_compiler(training.device) else "no compiler: install gcc and g++")
    if not any(failures):
        dist.all_gather_object(failures, _failure_of(training.warm_up))
    failure = next(filter(None, failures), None)
    if failure is None:
        return time.monotonic() - started
    if config.compile == "on":
        raise ValueError(f"--compile on: {failure}; repair it on all nodes, or train with --compile off")
    training.wrap_model(compiled=False)
    if dist.get_rank() == 0:
        records.put(Warned(0, f"the model cannot be compiled, and trains more slowly: {failure}"))
    return None


def _failure_of(work: Callable[[], None]) -> str | None:
    """Call `work`; return the reason if it fails, in a line."""
    try:
        work()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch.compile and the compilers that it calls raise anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def _build(run: Run, start: _Start) -> tuple["TrainingStep", int]:
    """Return this worker's model, proxies and optimisers, and the number of bytes read to load them."""
    # Imported here so that the first batch is read and decoded in the meantime.
    from nsl_dist.training import checkpoint
    from nsl_dist.training.step import TrainingStep

    device = ray.train.torch.get_device()
    if device.type == "cpu":
        assert run.config.threads is not None
        torch.set_num_threads(run.config.threads)
    training = TrainingStep(
        run.config,
        num_classes=start.plan.num_classes,
        schedule=run.schedule,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        group=dist.group.WORLD,
        pretrained=start.checkpoint is None,
        compiled=_wants_to_compile(run.config, device),
    )
    if start.checkpoint is None:
        return training, 0
    loaded = checkpoint.load(start.checkpoint, training, digest=run.manifest.digest)
    assert loaded.step == start.step, f"{start.checkpoint} is of step {loaded.step}, not {start.step}"
    return training, loaded.num_bytes


def _finite(loss: Tensor, step: int) -> float:
    """Return the loss of iteration `step`.

    Raises:
        FloatingPointError: it is not finite.

    """
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {step}; start another run with a lower --optim.lr")
    return value


def _measure(run: Run, step: int, *, loss: float, accuracy: float, meter: Meter) -> StepMetrics:
    """Return the metrics after iteration `step`."""
    lr = run.schedule.learning_rate(step)
    return StepMetrics(
        step=step + 1,
        loss=loss,
        accuracy_sampled=accuracy,
        learning_rate=lr,
        learning_rate_proxies=lr * run.config.proxies.lr_scale,
        **dataclasses.asdict(meter.read(step)),
    )


class _Checkpoints:
    """Writes checkpoints in the background and has some of them evaluated."""

    def __init__(self, training: "TrainingStep", run: Run, records: Queue) -> None:
        from nsl_dist.training.checkpoint import Checkpointer

        self._training = training
        self._run = run
        self._records = records
        self._checkpointer = Checkpointer(training, digest=run.manifest.digest)

    def write_when_due(self, *, step: int, out_of_turn: bool) -> None:
        """Write a checkpoint after `step` iterations if one is due; `out_of_turn` forces it."""
        config, schedule = self._run.config, self._run.schedule
        last = step == schedule.num_steps
        evaluate = config.eval.every > 0 and step % (config.eval.every * schedule.steps_per_epoch) == 0 and not last
        every = config.checkpoint.steps
        if not (out_of_turn or last or evaluate or (every is not None and step % every == 0)):
            return
        started = time.monotonic()
        if last:
            self._training.proxies.complete(step=step)
        self._checkpointer.copy(step=step)
        waited = time.monotonic() - started
        location = self._run.folder.checkpoint(step)
        filesystem, path = storage.resolve(location)
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint(path, filesystem=filesystem),
            checkpoint_dir_name=location.rpartition("/")[2],
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # it is written to its final location
            checkpoint_upload_fn=functools.partial(self._write, step=step, waited=waited),
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"step": step}) if evaluate else False,
        )

    def _write(self, target: ray.train.Checkpoint, name: str, *, step: int, waited: float) -> ray.train.Checkpoint:
        started = time.monotonic()
        rank = self._training.proxies.partition.rank

        def warn(error: OSError) -> None:
            self._records.put(Warned(step, f"worker {rank} cannot write {name}: {error}; trying again"))

        self._checkpointer.write(self._run.folder.checkpoint(step), on_failure=warn)
        if rank == 0:
            self._records.put(CheckpointWritten(step, name, time.monotonic() - started, waited))
        return target

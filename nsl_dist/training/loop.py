"""The training loop of one worker, on Ray Train."""

import functools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.queue import Queue

from nsl_dist import cluster, storage
from nsl_dist.config import TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import DamagedShardError, Manifest, Split
from nsl_dist.data.stream import planned_batches
from nsl_dist.run import (
    LEFT_OUT_FILE,
    checkpoint_name,
    left_out_shards,
    newest_checkpoint,
    prune_checkpoints,
    step_of,
)
from nsl_dist.schedule import Schedule
from nsl_dist.training.agreement import Agreement
from nsl_dist.training.meter import Meter

if TYPE_CHECKING:
    from nsl_dist.training.step import TrainingStep


def train_worker(config: TrainConfig, manifest: Manifest, run_dir: str, progress: Queue, orders: Queue) -> None:
    """Train from the newest checkpoint, or from the start, to the end of the schedule.

    Args:
        config: of the run.
        manifest: of the shards.
        run_dir: folder or URI of the run.
        progress: where rank 0 puts its records, for the driver to show and track.
        orders: anything in it tells the workers to write a checkpoint and leave.

    """
    started = time.monotonic()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        assert config.threads is not None
        torch.set_num_threads(config.threads)

    # Rank 0 looks for all, so that all begin in the same place, and starts the stream, so that it fits the step and the
    # workers of this very attempt.
    begin: list[Any] = [None]
    split = storage.patiently(lambda: manifest.split("train"))
    if rank == 0:
        begin = [storage.patiently(lambda: _begin(config, split, run_dir, world_size=world_size))]
    dist.broadcast_object_list(begin, src=0)
    location, first_step, plan, shards = begin[0]
    schedule = Schedule(config.optim, plan.steps_per_epoch)
    if first_step == schedule.num_steps:
        return
    part_size = plan.batch_size // world_size
    batches = iter(shards[rank].iter_torch_batches(batch_size=part_size, prefetch_batches=2, device=device))
    first_batch = ThreadPoolExecutor(1).submit(next, batches)

    # Imported here, so that the first batches are read and decoded while the model's code loads.
    from nsl_dist.training import checkpoint
    from nsl_dist.training.step import TrainingStep

    training = TrainingStep(
        config,
        num_classes=split.num_classes,
        steps_per_epoch=plan.steps_per_epoch,
        device=device,
        rank=rank,
        world_size=world_size,
        group=dist.group.WORLD,
        pretrained=location is None,
    )
    num_bytes = 0
    if location is not None:
        loaded = checkpoint.load(location, training, digest=manifest.digest)
        assert loaded.step == first_step, f"{location} is of step {loaded.step}, not {first_step}"
        num_bytes = loaded.num_bytes
    checkpoints = _Checkpoints(training, manifest, run_dir, progress)
    agreement = Agreement(config, progress, orders, first_step=first_step)

    labels_B = plan.batch(first_step).labels
    accuracy = torch.zeros((), device=device)
    meter = Meter(first_step, schedule.num_steps, plan.batch_size)
    for step in range(first_step, schedule.num_steps):
        with meter.waiting(), _naming_damaged_shards(run_dir, config.data.max_damaged_shards):
            batch = first_batch.result() if step == first_step else next(batches)
        assert len(batch["image"]) == part_size, (
            f"step {step}, rank {rank}: {len(batch['image'])} != {part_size} images"
        )
        turn = (int(batch["step"][0]), int(batch["rank"][0]))
        assert turn == (step, rank), f"rank {rank} expected its part of step {step}, got (step, rank) = {turn}"

        shown = (step + 1) % config.tracking.every == 0 or step + 1 == schedule.num_steps or step == first_step
        loss = training.run(batch["image"], labels_B, step=step, accuracy=accuracy if shown else None)
        if step + 1 < schedule.num_steps:
            labels_B = plan.batch(step + 1).labels
            training.proxies.prefetch(labels_B, step=step + 1)

        if step == first_step and rank == 0:
            progress.put(
                {
                    "step": step,
                    "attempt": {
                        "world_size": world_size,
                        "checkpoint": location,
                        "bytes_read": num_bytes,
                        "seconds": time.monotonic() - started,
                        "left_out": len(plan.left_out),
                    },
                }
            )
        if shown:
            value = loss.item()
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at step {step}; start another run with a lower --optim.lr"
                )
            if rank == 0:
                lr = schedule.learning_rate(step)
                rates = {"learning_rate": lr, "learning_rate_proxies": lr * config.proxies.lr_scale}
                progress.put(
                    {"step": step + 1, "loss": value, "accuracy": accuracy.item(), **rates, **meter.read(step)}
                )
        agreed = agreement.reached(step + 1)
        checkpoints.write_when_due(step=step + 1, out_of_turn=agreed.checkpoint)
        if agreed.leave:
            if rank == 0:
                progress.put({"step": step + 1, "left": True})
            return


def _begin(
    config: TrainConfig, split: Split, run_dir: str, *, world_size: int
) -> tuple[str | None, int, ClassBalancedPlan, list[Any]]:
    """Return the checkpoint to go on from, its step, the plan, and the streams of all workers from there."""
    prune_checkpoints(run_dir, keep=None)
    location = newest_checkpoint(run_dir)
    first_step = step_of(location) if location is not None else 0
    plan = plan_of(split, config, left_out=left_out_shards(run_dir))
    last_step = Schedule(config.optim, plan.steps_per_epoch).num_steps
    if first_step == last_step:
        return location, first_step, plan, []
    # Of an elastic run the workers may have taken all CPUs that are left of the cluster.
    num_cpus = sum(node["Resources"].get("CPU", 0) for node in cluster.live_nodes())
    spare_cpus = num_cpus - world_size * config.cpus_per_worker >= 1
    shards = planned_batches(
        plan,
        split,
        config.data,
        first_step=first_step,
        last_step=last_step,
        world_size=world_size,
        spare_cpus=spare_cpus,
    )
    return location, first_step, plan, list(shards)


def plan_of(split: Split, config: TrainConfig, *, left_out: list[str]) -> ClassBalancedPlan:
    """Return the plan of a run; the classes of the shards `left_out` are in no batch."""
    places = [place for place, name in enumerate(split.shard_names) if name in left_out]
    labels = np.flatnonzero(np.isin(split.shards, places)).tolist()
    return ClassBalancedPlan(
        split.sizes, config.data.batch_size, config.data.images_per_class, config.seed, left_out=tuple(labels)
    )


@contextmanager
def _naming_damaged_shards(run_dir: str, most: int) -> Iterator[None]:
    """Raise a damaged shard as itself; or, if it may be left out, put it on record for the next attempt."""
    try:
        yield
    except Exception as error:
        damaged = _damaged_shard(error)
        if damaged is None:
            raise
        left_out = sorted({*left_out_shards(run_dir), damaged.shard})
        if len(left_out) > most:
            raise damaged from None
        storage.write_bytes(storage.join(run_dir, LEFT_OUT_FILE), json.dumps(left_out).encode())
        raise RuntimeError(f"starting again without the classes of damaged {damaged}") from None


def _damaged_shard(error: BaseException | None) -> DamagedShardError | None:
    """Find it among what Ray wrapped around it."""
    while error is not None and not isinstance(error, DamagedShardError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


class _Checkpoints:
    """Writes checkpoints beside the training, and has some of them evaluated."""

    def __init__(self, training: "TrainingStep", manifest: Manifest, run_dir: str, progress: Queue) -> None:
        from nsl_dist.training.checkpoint import Checkpointer

        self._training = training
        self._run_dir = run_dir
        self._progress = progress
        self._checkpointer = Checkpointer(training, digest=manifest.digest)

    def write_when_due(self, *, step: int, out_of_turn: bool) -> None:
        """Write a checkpoint after `step` iterations if it is time for one, `out_of_turn` in any case."""
        config, schedule = self._training.config, self._training.schedule
        last = step == schedule.num_steps
        evaluate = config.eval.every > 0 and step % (config.eval.every * schedule.steps_per_epoch) == 0 and not last
        every = config.checkpoint.steps
        if not (out_of_turn or last or evaluate or (every is not None and step % every == 0)):
            return
        started = time.monotonic()
        if last:
            self._training.proxies.complete(step=step)
        self._checkpointer.copy(step=step)
        context = ray.train.get_context()
        name = checkpoint_name(step)
        target = context.get_storage().build_checkpoint_path_from_name(name)
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint(target, filesystem=context.get_storage().storage_filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # there is none: it is written where it is to be
            checkpoint_upload_fn=functools.partial(
                self._write, step=step, waited=time.monotonic() - started, rank=context.get_world_rank()
            ),
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"step": step}) if evaluate else False,
        )

    def _write(self, target: Any, name: str, *, step: int, waited: float, rank: int) -> Any:
        started = time.monotonic()

        def say(error: OSError) -> None:
            self._progress.put({"step": step, "warning": f"worker {rank} cannot write {name}: {error}; trying again"})

        self._checkpointer.write(storage.join(self._run_dir, name), on_failure=say)
        if rank == 0:
            seconds = time.monotonic() - started
            self._progress.put({"step": step, "checkpoint": name, "seconds": seconds, "waited": waited})
        return target

"""The training loop of one worker, on Ray Train."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.util.queue import Queue

from nsl_dist.config import TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import Manifest
from nsl_dist.data.stream import planned_batches
from nsl_dist.device import use_cpu_threads
from nsl_dist.training.schedule import Schedule

if TYPE_CHECKING:
    from nsl_dist.training.step import TrainingStep


def train_worker(config: TrainConfig, manifest: Manifest, progress: Queue) -> None:
    """Train from the last checkpoint, or from the start, to the end of the schedule.

    Args:
        config: of the run, `num_workers` set.
        manifest: of the shards.
        progress: where rank 0 puts its records, for the driver to show and track.

    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        use_cpu_threads(context.get_local_world_size())

    split = manifest.split("train")
    plan = ClassBalancedPlan(split.sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    schedule = Schedule(config.optim, plan.steps_per_epoch)
    last_checkpoint = ray.train.get_checkpoint()
    first_step = int(last_checkpoint.get_metadata()["step"]) if last_checkpoint is not None else 0
    if first_step == schedule.num_steps:
        return

    # One plan, executed once for all: rank 0 starts it, so that it fits the step and the workers of this very attempt.
    shards: list[Any] = [None] * world_size
    if rank == 0:
        shards = list(
            planned_batches(
                plan,
                split,
                config.data,
                first_step=first_step,
                last_step=schedule.num_steps,
                world_size=world_size,
            )
        )
    dist.broadcast_object_list(shards, src=0)
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
    )
    if last_checkpoint is not None:
        with last_checkpoint.as_directory() as directory:
            assert checkpoint.load(Path(directory), training, digest=manifest.digest) == first_step

    labels_B = plan.batch(first_step).labels
    meter = _Meter(first_step, schedule.num_steps, plan.batch_size)
    for step in range(first_step, schedule.num_steps):
        with meter.waiting():
            batch = first_batch.result() if step == first_step else next(batches)
        assert len(batch["image"]) == part_size, (
            f"step {step}, rank {rank}: {len(batch['image'])} != {part_size} images"
        )
        turn = (int(batch["step"][0]), int(batch["rank"][0]))
        assert turn == (step, rank), f"rank {rank} expected its part of step {step}, got (step, rank) = {turn}"

        loss = training.run(batch["image"], labels_B, step=step)
        if step + 1 < schedule.num_steps:
            labels_B = plan.batch(step + 1).labels
            training.proxies.prefetch(labels_B, step=step + 1)

        if (step + 1) % config.tracking.every == 0 or step + 1 == schedule.num_steps or step == first_step:
            value = loss.item()
            if not np.isfinite(value):
                raise RuntimeError(f"the loss is {value} at step {step}; lower --optim.lr, or look at the data")
            if rank == 0:
                lr = schedule.learning_rate(step)
                progress.put({"step": step + 1, "loss": value, "learning_rate": lr, **meter.read(step)})
        _checkpoint_when_due(training, manifest, step=step + 1)


def _checkpoint_when_due(training: "TrainingStep", manifest: Manifest, *, step: int) -> None:
    """Write a checkpoint after `step` iterations, and have it evaluated beside the training, if it is time for that."""
    config, num_steps, steps_per_epoch = training.config, training.schedule.num_steps, training.schedule.steps_per_epoch
    evaluate = config.eval.every > 0 and step % (config.eval.every * steps_per_epoch) == 0 and step < num_steps
    if not (evaluate or step % (config.checkpoint.every or steps_per_epoch) == 0 or step == num_steps):
        return
    from nsl_dist.training import checkpoint

    directory = Path(tempfile.mkdtemp(prefix="nsl_dist_checkpoint_"))
    checkpoint.save(directory, training, step=step, digest=manifest.digest)
    saved = ray.train.Checkpoint.from_directory(directory)
    saved.set_metadata({"step": step})
    ray.train.report(
        {"step": step},
        checkpoint=saved,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        validation=ray.train.ValidationTaskConfig(fn_kwargs={"step": step}) if evaluate else False,
    )


class _Meter:
    """Throughput, share of the time spent waiting for data, and time left, which the first batch tells nothing of."""

    def __init__(self, first_step: int, num_steps: int, batch_size: int) -> None:
        self._first_step = first_step
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._waited = 0.0
        self._wait_started = 0.0
        self._started = self._read_at = time.monotonic()
        self._read_step = first_step

    def waiting(self) -> "_Meter":
        return self

    def __enter__(self) -> None:
        self._wait_started = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._waited += time.monotonic() - self._wait_started

    def read(self, step: int) -> dict[str, float]:
        """Return the figures since the last reading."""
        now = time.monotonic()
        elapsed, steps = now - self._read_at, step + 1 - self._read_step
        figures = {
            "images_per_second": steps * self._batch_size / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        if step == self._first_step:
            self._started = now
        else:
            per_step = (now - self._started) / (step - self._first_step)
            figures["seconds_left"] = per_step * (self._num_steps - step - 1)
        self._read_at, self._read_step, self._waited = now, step + 1, 0.0
        return figures

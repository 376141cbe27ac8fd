"""The plain PyTorch equivalent of nsl_dist's training, used as a baseline by jobs/bench/train.py.

It uses DataLoader, DistributedDataParallel and torch.optim.SGD, with a dense softmax over all proxies as an ordinary
parameter. Model, batches, augmentation, learning rates and initial weights are those of nsl_dist.
"""

import itertools
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from nsl_dist.config import TrainConfig, flatten
from nsl_dist.data.sampler import ClassBalancedPlan, PlannedBatch
from nsl_dist.data.shards import Split
from nsl_dist.data.stream import fetch
from nsl_dist.data.transforms import Normalise, augment, crop_draws
from nsl_dist.device import autocast_dtype
from nsl_dist.model import build_model
from nsl_dist.proxies.counter_random import uniform_rows
from nsl_dist.schedule import Schedule
from nsl_dist.training.step import TrainingStep

# Options of a training that the twins do not have.
MISSING = (
    *("proxies.margin", "proxies.per_class", "proxies.filter_above", "proxies.weight_decay"),
    *("optim.optimizer", "optim.layer_decay", "optim.decay_norms", "optim.new_layers_lr_scale", "optim.clip_norm"),
    *("optim.ema", "optim.frozen"),
)


@dataclass(frozen=True)
class Work:
    """Data and training configuration, shared by all contestants."""

    config: TrainConfig
    plan: ClassBalancedPlan
    split: Split

    @property
    def device(self) -> torch.device:
        """Device to train on."""
        return torch.device(self.config.device)

    @property
    def schedule(self) -> Schedule:
        """Phases and learning rates."""
        return Schedule(self.config.optim, self.plan.steps_per_epoch)

    def images(self, step: int, *, rank: int = 0, world_size: int = 1) -> tuple[Tensor, PlannedBatch]:
        """Create one worker's part of a batch, like a task of the data pipeline."""
        part = self.plan.part(step, rank=rank, world_size=world_size)
        positions = range(rank * len(part.labels), (rank + 1) * len(part.labels))
        config, seed = self.config.data, self.plan.seed
        fetched = fetch(part, self.split, config, crop_draws(positions, config, seed=seed, step=step))
        return augment(fetched, positions, config, seed=seed, step=step), part

    def training_step(self, config: TrainConfig, num_classes: int, *, compiled: bool = False) -> TrainingStep:
        """Return nsl_dist's training step for one worker."""
        schedule = Schedule(config.optim, self.plan.steps_per_epoch)
        return TrainingStep(config, num_classes=num_classes, schedule=schedule, device=self.device, compiled=compiled)


class Parts(Dataset[tuple[Tensor, Tensor]]):
    """One worker's part of each batch, by step: images and labels."""

    def __init__(self, work: Work, rank: int, world_size: int) -> None:
        self.work, self.rank, self.world_size = work, rank, world_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of one step."""
        images, part = self.work.images(step, rank=self.rank, world_size=self.world_size)
        return images, torch.from_numpy(part.labels)

    def loader(self, num_steps: int, num_processes: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a DataLoader over all steps in order."""
        pin = self.work.device.type == "cuda"
        return DataLoader(
            self,
            sampler=range(num_steps),
            batch_size=None,
            num_workers=num_processes,
            persistent_workers=True,
            prefetch_factor=4,
            pin_memory=pin,
        )


def refuse_what_is_missing(config: TrainConfig) -> None:
    """Refuse options that the twins do not have, since the comparison would be of different work.

    Raises:
        ValueError: there are some.

    """
    given, default = flatten(config), flatten(TrainConfig())
    ours = [f"--{name.replace('_', '-')}" for name in MISSING if given[name] != default[name]]
    if ours:
        raise ValueError(f"plain PyTorch here has no {', '.join(ours)}; leave them out, or choose another --recipe")


class Classifier(nn.Module):
    """The model and a dense normalised softmax, as published by the paper's authors."""

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__()
        self.normalise = Normalise()
        self.model = build_model(config.model, seed=config.seed)
        dim = config.model.dim
        self.proxies = nn.Parameter(uniform_rows(torch.arange(num_classes), dim, bound=dim**-0.5, seed=config.seed))
        self.temperature = config.proxies.temperature
        self.label_smoothing = config.proxies.label_smoothing

    def forward(self, images_bCHW: Tensor, labels_b: Tensor) -> Tensor:
        """Return the loss."""
        embeddings_bD = self.model(self.normalise(images_bCHW))
        with torch.autocast(images_bCHW.device.type, enabled=False):
            logits = embeddings_bD @ F.normalize(self.proxies).T / self.temperature
            return F.cross_entropy(logits, labels_b, label_smoothing=self.label_smoothing)


@dataclass
class PlainStep:
    """A training step in plain PyTorch."""

    forward: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.SGD
    dtype: torch.dtype | None
    memory_format: torch.memory_format = torch.channels_last

    def run(self, images_bCHW: Tensor, labels_b: Tensor) -> Tensor:
        """Run one step."""
        images_bCHW = images_bCHW.contiguous(memory_format=self.memory_format)
        with torch.autocast(images_bCHW.device.type, self.dtype) if self.dtype else nullcontext():
            loss = self.forward(images_bCHW, labels_b)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.detach()


def sgd(classifier: Classifier, config: TrainConfig, *, fused: bool | None = None) -> torch.optim.SGD:
    """Return the optimiser of model and proxies."""
    optim = config.optim
    groups: list[dict[str, Any]] = [
        {"params": list(classifier.model.parameters()), "lr_scale": 1.0},
        {"params": [classifier.proxies], "lr_scale": config.proxies.lr_scale},
    ]
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=fused)


def settle(device: torch.device) -> None:
    """Wait until a device has finished all pending work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Trained:
    """First loss of a training, and its speed after the warm-up."""

    first_loss: float
    images_per_second: float
    data_wait_share: float


def twin_training(
    rank: int, work: Work, world_size: int, num_processes: int, *, warm_up: int, port: int, compiled: bool
) -> Trained:
    """Train in plain PyTorch."""
    config, schedule = work.config, work.schedule
    torch.set_num_threads(config.threads or 1)
    device = torch.device(config.device, rank) if config.device == "cuda" else work.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=5),
        )
    classifier = Classifier(config, work.split.num_classes).to(device)
    classifier.model.to(memory_format=torch.channels_last)
    classifier.train()
    optimizer = sgd(classifier, config, fused=compiled or None)
    forward = DistributedDataParallel(classifier, gradient_as_bucket_view=True) if world_size > 1 else classifier
    whole = torch.compile(forward, dynamic=False) if compiled else forward
    plain = PlainStep(whole, optimizer, autocast_dtype(config.precision, device))

    loader = Parts(work, rank, world_size).loader(schedule.num_steps, num_processes)
    batches = iter(loader)
    windows: list[tuple[int, float, float]] = []
    first_loss = waited = 0.0
    read_at, read_step = time.perf_counter(), 0
    for step in range(schedule.num_steps):
        wait_started = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - wait_started
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step) * group["lr_scale"]
        loss = plain.run(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        if (step + 1) % config.tracking.every == 0 or step + 1 == schedule.num_steps or step == 0:
            value = loss.item()
            if step == 0:
                mean = torch.tensor(value, device=device)
                if world_size > 1:
                    dist.all_reduce(mean)
                first_loss = mean.item() / world_size
            elapsed, steps = time.perf_counter() - read_at, step + 1 - read_step
            windows.append((step + 1, elapsed / steps, waited / elapsed))
            read_at, read_step, waited = time.perf_counter(), step + 1, 0.0
    if world_size > 1:
        dist.destroy_process_group()
    return summarise(windows, first_loss, batch_size=work.plan.batch_size, warm_up=warm_up)


def summarise(windows: list[tuple[int, float, float]], first_loss: float, *, batch_size: int, warm_up: int) -> Trained:
    """Summarise windows of (last step, seconds per step, share of waiting) after the warm-up."""
    counted = [
        (step - before, seconds, share)
        for (before, _, _), (step, seconds, share) in itertools.pairwise(windows)
        if before >= warm_up
    ]
    if not counted:
        raise ValueError(f"--warm-up {warm_up} leaves nothing to measure of {windows[-1][0]} steps; increase --steps")
    total = sum(steps * seconds for steps, seconds, _ in counted)
    num_images = batch_size * sum(steps for steps, _, _ in counted)
    waited = sum(steps * seconds * share for steps, seconds, share in counted)
    return Trained(first_loss, num_images / total, waited / total)

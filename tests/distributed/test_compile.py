"""A compiled model trains like the one that is not, on one worker and under DDP."""

import dataclasses
import functools
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.device import has_compiler
from nsl_dist.schedule import Schedule
from nsl_dist.training.loop import compile_model
from nsl_dist.training.step import TrainingStep
from tests.support.ranks import Ranks

CONFIG = TrainConfig(
    precision="float32",
    data=DataConfig(batch_size=12, images_per_class=2, image_size=32),
    model=ModelConfig(backbone="timm/test_resnet", dim=16, pooling="gem"),  # small, since it is compiled for each test
    proxies=ProxyConfig(sample_rate=0.8),
    optim=OptimConfig(epochs=4, new_layers_epochs=1, lr=0.002, warmup_steps=3),
)
PLAN = ClassBalancedPlan(np.full(11, 5), batch_size=12, images_per_class=2, seed=0)  # 4 steps an epoch, 11 classes
NUM_STEPS = 7  # the last 3 of which train all layers


def training_step(rank: int = 0, world_size: int = 1, *, compiled: bool) -> TrainingStep:
    return TrainingStep(
        CONFIG,
        num_classes=PLAN.num_classes,
        schedule=Schedule(CONFIG.optim, PLAN.steps_per_epoch),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        group=dist.group.WORLD if world_size > 1 else None,
        compiled=compiled,
    )


def run(training: TrainingStep, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """Train; return losses, weights, batch statistics and proxies."""
    part = slice(rank * PLAN.batch_size // world_size, (rank + 1) * PLAN.batch_size // world_size)
    losses = []
    for step in range(NUM_STEPS):
        rng = np.random.default_rng((9, step))
        pixels = PLAN.batch(step).labels[:, None, None, None] * 20 + rng.integers(0, 30, (PLAN.batch_size, 3, 32, 32))
        images = torch.from_numpy(pixels.astype(np.uint8))[part]
        losses.append(training.run(images, PLAN.batch(step).labels, step=step))
    return [*losses, *state_of(training)]


def state_of(training: TrainingStep) -> list[Tensor]:
    return [each.clone() for each in (*training.model.state_dict().values(), *training.proxies.state().values())]


def compare_with_eager(rank: int, world_size: int, backend: str) -> None:
    eager = run(training_step(rank, world_size, compiled=False), rank, world_size)
    with patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        training = training_step(rank, world_size, compiled=True)
        before = state_of(training)
        training.warm_up()
        assert all(map(torch.equal, state_of(training), before))
        compiled = run(training, rank, world_size)
    for ours, expected in zip(compiled, eager, strict=True):
        assert (ours.double() - expected.double()).norm() <= 2e-3 * expected.double().norm() + 1e-6


def test_the_graphs_that_are_compiled(ranks: Ranks) -> None:
    ranks.run(compare_with_eager, 2, "aot_eager")


def without_compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    raise OSError("Python.h:\n not found")


def fall_back(rank: int, world_size: int) -> None:
    expected = run(training_step(rank, world_size, compiled=False), rank, world_size)
    with patch.object(torch, "compile", functools.partial(torch.compile, backend=without_compiler)):
        training = training_step(rank, world_size, compiled=True)
        records: queue.Queue[Any] = queue.Queue()
        with pytest.raises(ValueError, match=r"--compile on: .*OSError: Python.h: not found.*train with --compile off"):
            compile_model(training, dataclasses.replace(CONFIG, compile="on"), records)
        assert compile_model(training, CONFIG, records) is None
    assert all(map(torch.equal, run(training, rank, world_size), expected))
    said = [record.text for record in records.queue]
    assert len(said) == (1 if rank == 0 else 0)
    assert all("the model cannot be compiled, and trains more slowly: " in text for text in said)


@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler: install g++")
def test_training_goes_on_where_nothing_compiles(ranks: Ranks) -> None:
    ranks.run(fall_back, 2)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler: install g++")
def test_the_code_that_is_compiled(ranks: Ranks) -> None:
    ranks.run(compare_with_eager, 1, "inductor")


def test_whether_there_is_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not has_compiler(cpu)
    for name in ("gcc", "my-g++"):
        (tmp_path / name).touch(mode=0o755)
    assert has_compiler(gpu)
    assert not has_compiler(cpu)
    monkeypatch.setenv("CXX", "my-g++")
    assert has_compiler(cpu)
    monkeypatch.setenv("CXX", "another")
    assert not has_compiler(cpu)

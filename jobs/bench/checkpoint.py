r"""Benchmark checkpoints: how long training waits for one, and how much slower training is while it is written.

    python jobs/bench/checkpoint.py --classes 1000000 --dim 128

One worker trains on random images with its class proxies in memory. `ours` copies the state, then writes it in the
background. `torch_save` blocks training while writing. `dcp_async` is `async_save` of torch.distributed.checkpoint.
They take turns. The floor for the wait is one copy of the state in memory.
"""

import dataclasses
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict_saver import async_save

from nsl_dist.commandline import run_job
from nsl_dist.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.schedule import Schedule
from nsl_dist.training.checkpoint import Checkpointer
from nsl_dist.training.step import TrainingStep

Implementation = Literal["ours", "torch_save", "dcp_async"]


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What to train, and how to save it."""

    classes: int = 1_000_000
    """Number of classes."""
    dim: int = 128
    """Embedding dimensions."""
    num_sampled: int = 10_000
    """Classes sampled per step."""
    implementations: tuple[Implementation, ...] = ("ours", "torch_save", "dcp_async")
    """Implementations to measure."""
    turns: int = 3
    """Checkpoints per implementation; medians are reported."""
    steps: int = 10
    """Iterations between checkpoints; must be enough for the previous one to finish."""
    directory: str | None = None
    """Folder to write to. If None, the system's temporary folder."""
    json: bool = False
    """Print one JSON object per line instead of a table."""


def _fail(error: OSError) -> None:
    raise error


def _state(training: TrainingStep) -> dict[str, Any]:
    assert training.optimizer is not None
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "proxies": training.proxies.state(),
    }


def savers(training: TrainingStep) -> dict[str, Callable[[Path], Callable[[], Any]]]:
    """Return, per implementation, a function that blocks training and returns a function that waits for completion."""
    checkpointer = Checkpointer(training, digest="none")

    def ours(folder: Path) -> Callable[[], Any]:
        checkpointer.copy(step=0)
        return ThreadPoolExecutor(1).submit(checkpointer.write, str(folder), on_failure=_fail).result

    def torch_save(folder: Path) -> Callable[[], Any]:
        folder.mkdir()
        torch.save(_state(training), folder / "state.pt")
        return lambda: None

    def dcp_async(folder: Path) -> Callable[[], Any]:
        future: Any = async_save(_state(training), checkpoint_id=folder)
        return lambda: future.result()

    return {"ours": ours, "torch_save": torch_save, "dcp_async": dcp_async}


def measure(config: BenchConfig, directory: Path) -> list[dict[str, Any]]:
    """Train, save in turns, and return one row per implementation."""
    data = DataConfig(batch_size=80, images_per_class=5, image_size=64)
    settings = TrainConfig(
        data=data,
        model=ModelConfig(dim=config.dim),
        proxies=ProxyConfig(num_sampled=config.num_sampled),
        optim=OptimConfig(),
    )
    training = TrainingStep(
        settings, num_classes=config.classes, schedule=Schedule(settings.optim, 1000), device=torch.device("cpu")
    )
    plan = ClassBalancedPlan(np.full(config.classes, 5), data.batch_size, data.images_per_class, seed=0)
    images = torch.randint(0, 256, (data.batch_size, 3, data.image_size, data.image_size), dtype=torch.uint8)
    step = 0

    def train(count: int) -> list[float]:
        nonlocal step
        seconds = []
        for _ in range(count):
            started = time.monotonic()
            training.run(images, plan.batch(step).labels, step=step)
            step += 1
            seconds.append(time.monotonic() - started)
        return seconds

    train(3)
    state = [*training.proxies.state().values(), *training.model.state_dict().values()]
    num_bytes = sum(tensor.nbytes for tensor in state)
    buffers = [torch.empty_like(tensor) for tensor in state]
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"step": [], "wait": [], "beside": []} for name in config.implementations
    }
    floors = []
    functions = savers(training)
    for turn in range(config.turns + 1):  # the first is not counted, because it allocates memory
        started = time.monotonic()
        for buffer, tensor in zip(buffers, state, strict=True):
            buffer.copy_(tensor)
        floors.append(time.monotonic() - started)
        for name in config.implementations:
            times = seconds[name]
            alone = train(config.steps)
            folder = directory / f"{name}-{turn}"
            started = time.monotonic()
            join = functions[name](folder)
            waited = time.monotonic() - started
            beside = train(config.steps)
            join()
            shutil.rmtree(folder)
            if turn > 0:
                times["step"] += alone
                times["wait"].append(waited)
                times["beside"] += beside
    minutes = CheckpointConfig().minutes
    assert minutes is not None
    return [
        {
            "implementation": name,
            "num_classes": config.classes,
            "dim": config.dim,
            "mib": num_bytes / 2**20,
            "step_seconds": statistics.median(times["step"]),
            "wait_seconds": statistics.median(times["wait"]),
            "floor_seconds": statistics.median(floors[1:]),
            "step_beside_seconds": statistics.median(times["beside"]),
            "share_of_time": statistics.median(times["wait"]) / (60 * minutes),
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    """Measure and print."""
    config = tyro.cli(BenchConfig, description=__doc__)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # required by async_save
    directory = Path(tempfile.mkdtemp(prefix="nsl_dist_bench_", dir=config.directory))
    try:
        rows = measure(config, directory)
    finally:
        shutil.rmtree(directory)
        dist.destroy_process_group()
    if config.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print(f"{rows[0]['num_classes']:,} classes x {rows[0]['dim']}, {rows[0]['mib']:,.0f} MiB", file=sys.stderr)
    print(f"{'':12}{'step ms':>9}{'wait ms':>9}{'x floor':>9}{'x ours':>8}{'ms while writing':>17}{'% of time':>11}")
    ours = next((row["wait_seconds"] for row in rows if row["implementation"] == "ours"), math.nan)
    for row in rows:
        print(
            f"{row['implementation']:12}{1000 * row['step_seconds']:9.0f}{1000 * row['wait_seconds']:9.0f}"
            f"{row['wait_seconds'] / row['floor_seconds']:9.2f}{row['wait_seconds'] / ours:8.2f}"
            f"{1000 * row['step_beside_seconds']:17.0f}{100 * row['share_of_time']:11.3f}"
        )


if __name__ == "__main__":
    run_job(main)

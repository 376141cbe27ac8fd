r"""Benchmark time and memory of a step of the class-proxy matrix, compared with common alternatives.

    python jobs/bench/proxies.py --classes 20000 100000 1000000 --num-sampled 10000
    python jobs/bench/proxies.py --classes 100000 --sample-rate 0.1 --workers 1 2 --json

`ours` is `nsl_dist.proxies`. `dense` is a softmax over all classes. `autograd_gather` is a sampled softmax over
weight[index], with a dense gradient of the whole matrix, as InsightFace describes its PartialFC_V2. `pml` is
NormalizedSoftmaxLoss of pytorch-metric-learning (extra `bench`). All but `ours` use torch.optim.SGD.

Each contestant has one process per worker. They take turns, so that noise of the machine affects all of them equally. A
step is forward pass, backward pass and update for given embeddings. The floor is the time that this machine needs at
least, according to the rates printed at the start: reading and writing the sampled rows and their momentum once, and
three matrix products. Extra memory is the peak of a step without weights and momentum, summed over all workers.
"""

import ctypes
import itertools
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from numpy.typing import NDArray
from torch import Tensor

from nsl_dist.commandline import run_job
from nsl_dist.config import ProxyConfig
from nsl_dist.proxies.matrix import ProxyMatrix
from nsl_dist.proxies.partition import Partition

LR, MOMENTUM, WEIGHT_DECAY, TEMPERATURE = 0.01, 0.9, 1e-4, 0.05
Implementation = Literal["ours", "autograd_gather", "dense", "pml"]


@dataclass(frozen=True)
class BenchConfig:
    """The grid to measure: every combination of the lists."""

    classes: tuple[int, ...] = (20_000, 100_000)
    """Numbers of classes."""
    dim: tuple[int, ...] = (512,)
    """Embedding dimensions."""
    sample_rate: tuple[float, ...] = (0.1,)
    """Fractions of the classes sampled per step."""
    num_sampled: tuple[int, ...] = ()
    """Numbers of classes sampled per step, instead of --sample-rate."""
    batch: int = 128
    """Images in the global batch."""
    workers: tuple[int, ...] = (1,)
    """Numbers of workers (gloo, on CPUs). dense and pml only run with one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: cuda if there is a GPU."""
    implementations: tuple[Implementation, ...] = ("ours", "autograd_gather", "dense", "pml")
    """Implementations to measure."""
    proxies: ProxyConfig = field(default_factory=ProxyConfig)
    """Options of `ours`, except for sampling, which the grid determines."""
    turns: int = 7
    """Turns per contestant; each has one warm-up step and three measured steps."""
    json: bool = False
    """Print one JSON object per line instead of a table."""


@dataclass(frozen=True)
class Contestant:
    """One line of the table."""

    implementation: Implementation
    num_classes: int
    dim: int
    num_sampled: int
    workers: int


class Ours:
    """`nsl_dist.proxies`."""

    def __init__(self, contestant: Contestant, rank: int, device: torch.device, config: ProxyConfig) -> None:
        group = dist.group.WORLD if contestant.workers > 1 else None
        partition = Partition(contestant.num_classes, rank, contestant.workers)
        self.matrix = ProxyMatrix(partition, contestant.dim, config, device=device, group=group)
        self.matrix.start_optimizer(momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, step=0)
        self.num_steps = 0

    def step(self, embeddings_bD: Tensor, labels_B: NDArray[np.int64]) -> None:
        """Run one step."""
        loss = self.matrix.loss(embeddings_bD, labels_B, step=self.num_steps, lr=LR)
        torch.autograd.backward(loss)
        self.num_steps += 1

    @property
    def tables(self) -> list[Tensor]:
        """State kept between steps."""
        return [table for table in self.matrix.state().values() if self.matrix.config.placement != "disk"]


class Dense:
    """Softmax over all classes: the loss as published by the paper's authors."""

    def __init__(self, contestant: Contestant, rank: int, device: torch.device) -> None:
        bound = contestant.dim**-0.5
        rows = Partition(contestant.num_classes, rank, contestant.workers).num_rows
        self.weight = torch.nn.Parameter(torch.empty(rows, contestant.dim, device=device).uniform_(-bound, bound))
        self.optimizer = self._optimizer([self.weight])

    @staticmethod
    def _optimizer(parameters: list[Tensor]) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def loss(self, embeddings_bD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss."""
        logits = F.normalize(embeddings_bD) @ F.normalize(self.weight).T
        return F.cross_entropy(logits / TEMPERATURE, labels_B)

    def step(self, embeddings_bD: Tensor, labels_B: NDArray[np.int64]) -> None:
        """Run one step."""
        self.optimizer.zero_grad()
        loss = self.loss(embeddings_bD, torch.from_numpy(labels_B).to(embeddings_bD.device))
        torch.autograd.backward(loss)
        self.optimizer.step()

    @property
    def tables(self) -> list[Tensor]:
        """State kept between steps."""
        parameters = self.optimizer.param_groups[0]["params"]
        return [*parameters, *(self.optimizer.state[parameter]["momentum_buffer"] for parameter in parameters)]


class PytorchMetricLearning(Dense):
    """NormalizedSoftmaxLoss of pytorch-metric-learning."""

    def __init__(self, contestant: Contestant, device: torch.device) -> None:
        from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

        self.function = NormalizedSoftmaxLoss(contestant.num_classes, contestant.dim, temperature=TEMPERATURE)
        self.function.to(device)
        self.optimizer = self._optimizer(list(self.function.parameters()))

    def loss(self, embeddings_bD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss."""
        loss: Tensor = self.function(embeddings_bD, labels_B)
        return loss


class AutogradGather(Dense):
    """Sampled softmax with an autograd gather, whose gradient is as large as the matrix."""

    def __init__(self, contestant: Contestant, rank: int, device: torch.device) -> None:
        super().__init__(contestant, rank, device)
        self.partition = Partition(contestant.num_classes, rank, contestant.workers)
        self.num_sampled = contestant.num_sampled // contestant.workers

    def loss(self, embeddings_bD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss."""
        embeddings_BD = F.normalize(embeddings_bD)
        if self.partition.world_size > 1:
            embeddings_BD = _Gather.apply(embeddings_BD)
        mine_B = (labels_B >= self.partition.start) & (labels_B < self.partition.stop)
        rows = labels_B[mine_B] - self.partition.start
        keys = torch.rand(self.partition.num_rows, device=labels_B.device)
        keys[rows] = 2.0
        index = keys.topk(max(self.num_sampled, len(torch.unique(rows)))).indices.sort().values
        columns_B = torch.full_like(labels_B, -1)
        columns_B[mine_B] = torch.searchsorted(index, rows)
        logits = embeddings_BD @ F.normalize(self.weight[index]).T / TEMPERATURE
        if self.partition.world_size == 1:
            return F.cross_entropy(logits, columns_B)
        loss: Tensor = _PartitionedCrossEntropy.apply(logits, columns_B)
        return loss


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, embeddings_bD: Tensor) -> Tensor:
        gathered = embeddings_bD.new_empty(dist.get_world_size() * len(embeddings_bD), embeddings_bD.shape[1])
        dist.all_gather_into_tensor(gathered, embeddings_bD)
        return gathered

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        local = grads[0].new_empty(len(grads[0]) // dist.get_world_size(), grads[0].shape[1])
        dist.reduce_scatter_tensor(local, grads[0].contiguous())
        return local


class _PartitionedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns_B: Tensor) -> Tensor:
        highest = logits.max(dim=1, keepdim=True).values
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        probabilities = (logits - highest).exp_()
        total = probabilities.sum(dim=1, keepdim=True)
        dist.all_reduce(total)
        probabilities /= total
        mine = (columns_B >= 0).nonzero().squeeze(1)
        target = logits.new_zeros(len(logits), 1)
        target[mine, 0] = probabilities[mine, columns_B[mine]]
        dist.all_reduce(target)
        ctx.save_for_backward(probabilities, mine, columns_B[mine])
        return -target.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probabilities, mine, columns = ctx.saved_tensors
        gradient = probabilities.clone()
        gradient[mine, columns] -= 1
        return gradient * (grads[0] / len(gradient)), None


def build(contestant: Contestant, rank: int, device: torch.device, config: ProxyConfig) -> Ours | Dense:
    """Build a contestant."""
    match contestant.implementation:
        case "ours":
            return Ours(contestant, rank, device, config)
        case "autograd_gather":
            return AutogradGather(contestant, rank, device)
        case "dense":
            return Dense(contestant, rank, device)
        case "pml":
            return PytorchMetricLearning(contestant, device)


def _bytes_said_by(file: str, name: str) -> int:
    with open(file) as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def anonymous_memory() -> int:
    """Return this process's anonymous resident memory in bytes, which excludes file pages and caches."""
    return _bytes_said_by("/proc/self/status", "RssAnon")


Batch = tuple[Tensor, NDArray[np.int64]]


def batches(contestant: Contestant, batch: int, rank: int, device: torch.device) -> Iterator[Batch]:
    """Yield random embeddings of one worker and the labels of the global batch."""
    rng = np.random.default_rng(1)
    generator = torch.Generator().manual_seed(rank)
    while True:
        embeddings_bD = torch.randn(batch // contestant.workers, contestant.dim, generator=generator)
        yield embeddings_bD.to(device).requires_grad_(), rng.integers(0, contestant.num_classes, batch)


def compete(
    contestant: Contestant, config: BenchConfig, rank: int, device: torch.device, port: int, orders: Connection
) -> None:
    """Build a contestant in a separate process, then time steps or measure memory on request."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // contestant.workers))
    if contestant.workers > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("gloo", rank=rank, world_size=contestant.workers)
    proxies = ProxyConfig(**asdict(config.proxies) | {"num_sampled": contestant.num_sampled})

    # Run a small one first, so that memory allocated once by libraries is not counted.
    small = Contestant(contestant.implementation, 4096, contestant.dim, 1024, contestant.workers)
    warm = build(small, rank, device, proxies)
    for batch in itertools.islice(batches(small, config.batch, rank, device), 2):
        warm.step(*batch)
    del warm
    ctypes.CDLL(None).malloc_trim(0)  # otherwise leftovers would hide new allocations
    before = anonymous_memory()
    built = build(contestant, rank, device, proxies)
    source = batches(contestant, config.batch, rank, device)
    for batch in itertools.islice(source, 2):
        built.step(*batch)
    orders.send(None)
    while (order := orders.recv()) is not None:
        if order == "time":
            orders.send([_timed_step(built, next(source), device) for _ in range(4)][1:])
        else:
            steps = list(itertools.islice(source, 3))
            orders.send(_peak_extra_bytes(built, steps, before, device))


def _timed_step(built: Ours | Dense, batch: Batch, device: torch.device) -> float:
    _settle(device)
    started = time.perf_counter()
    built.step(*batch)
    _settle(device)
    return 1000 * (time.perf_counter() - started)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _peak_extra_bytes(built: Ours | Dense, steps: list[Batch], before: int, device: torch.device) -> int:
    """Return the peak memory during steps, minus that of the tables and of an idle process."""
    tables = sum(table.numel() * table.element_size() for table in built.tables)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for batch in steps:
            built.step(*batch)
        return int(torch.cuda.max_memory_allocated()) - tables
    done = threading.Event()
    samples = [anonymous_memory()]

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for batch in steps:
        built.step(*batch)
    done.set()
    watcher.join()
    return max(samples) - before - tables


def machine_rates(device: torch.device) -> tuple[float, float]:
    """Measure bytes/s of a copy (read and written) and FLOP/s of a matrix product."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    left, right = torch.ones(2048, 2048, device=device), torch.ones(2048, 2048, device=device)

    def fastest(work: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(9):
            _settle(device)
            started = time.perf_counter()
            work()
            _settle(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return 2 * source.nbytes / fastest(lambda: target.copy_(source)), 2 * 2048**3 / fastest(lambda: left @ right)


def floor_seconds(contestant: Contestant, batch: int, bytes_per_second: float, flops: float) -> tuple[float, float]:
    """Return the least time for the rows' bytes and for the products, of all workers together."""
    num_bytes = 4 * 4 * contestant.num_sampled * contestant.dim
    num_operations = 6 * batch * contestant.num_sampled * contestant.dim
    return num_bytes / bytes_per_second, num_operations / flops


def contestants_of(config: BenchConfig) -> list[Contestant]:
    """Return all contestants of the grid."""
    found = []
    for workers, dim, num_classes in itertools.product(config.workers, config.dim, config.classes):
        sizes = config.num_sampled or tuple(round(rate * num_classes) for rate in config.sample_rate)
        for implementation in config.implementations:
            if implementation in ("dense", "pml"):
                if workers == 1:
                    found.append(Contestant(implementation, num_classes, dim, num_classes, 1))
            else:
                found += [
                    Contestant(implementation, num_classes, dim, min(size, num_classes), workers) for size in sizes
                ]
    return found


def rounds_that_fit(contestants: list[Contestant], config: BenchConfig, memory: int) -> Iterator[list[Contestant]]:
    """Yield groups that fit in memory together; report and skip contestants that do not fit alone."""
    together: list[Contestant] = []
    taken = 0
    for contestant in contestants:
        matrix = 4 * contestant.num_classes * contestant.dim
        # Weights and momentum; for dense ones also gradients, and normalised weights and logits with their gradients.
        if contestant.implementation == "ours":
            num_bytes = 0 if config.proxies.placement == "disk" else 2 * matrix
        elif contestant.implementation == "autograd_gather":
            num_bytes = 4 * matrix
        else:
            num_bytes = 9 * matrix + 3 * 4 * config.batch * contestant.num_classes
        if num_bytes > memory:
            needs = f"needs {num_bytes / 2**30:.0f} GiB, {memory / 2**30:.0f} GiB available"
            print(f"skipped, {needs}: {contestant}", file=sys.stderr)
            continue
        if taken + num_bytes > memory:
            yield together
            together, taken = [], 0
        together.append(contestant)
        taken += num_bytes
    if together:
        yield together


def measure(together: list[Contestant], config: BenchConfig, device: torch.device) -> list[tuple[list[float], int]]:
    """Return, per contestant, milliseconds of each step (of the slowest worker) and peak extra bytes."""
    context = mp.get_context("forkserver")  # imports this module only once
    teams: list[list[Connection]] = []
    processes = []
    for contestant in together:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        team = []
        for rank in range(contestant.workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=compete, args=(contestant, config, rank, device, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            team.append(ours)
        for worker in team:
            worker.recv()
        teams.append(team)

    def ask(team: list[Connection], order: str) -> list[Any]:
        for worker in team:
            worker.send(order)
        return [worker.recv() for worker in team]

    times: list[list[float]] = [[] for _ in teams]
    for _ in range(config.turns):
        for team, collected in zip(teams, times, strict=True):
            collected += [max(step) for step in zip(*ask(team, "time"), strict=True)]
    extras = [sum(ask(team, "memory")) for team in teams]
    for worker in itertools.chain(*teams):
        worker.send(None)
    for process in processes:
        process.join()
    return list(zip(times, extras, strict=True))


def available_memory(device: torch.device) -> int:
    """Return the memory available to contestants, in bytes."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info()[0])
    return int(0.8 * _bytes_said_by("/proc/meminfo", "MemAvailable"))


def main() -> None:
    """Measure the grid, print the table."""
    config = tyro.cli(BenchConfig, description=__doc__)
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    for workers in config.workers:
        if config.batch % workers:
            raise ValueError(f"--batch {config.batch} is not divisible by {workers} workers")
        if workers > 1 and cuda:
            raise ValueError(f"--workers {workers} is only supported on CPUs; set --device cpu or --workers 1")
    contestants = contestants_of(config)
    bytes_per_second, flops = machine_rates(device)
    print(
        f"{len(contestants)} contestants on {device}, batch {config.batch}, {config.turns} turns of 3 steps; this "
        f"machine copies {bytes_per_second / 1e9:.1f} GB/s and multiplies at {flops / 1e12:.2f} TFLOP/s",
        file=sys.stderr,
    )
    header = ("implementation", "classes", "dim", "sampled", "workers", "step ms", "min", "growth", "extra MB", "floor")
    if not config.json:
        print(f"{header[0]:16}" + "".join(f"{name:>10}" for name in header[1:]))
    smallest: dict[tuple[Any, ...], float] = {}
    for together in rounds_that_fit(contestants, config, available_memory(device)):
        for contestant, (times, extra) in zip(together, measure(together, config, device), strict=True):
            result = {
                **asdict(contestant),
                "device": device.type,
                "step_ms": round(statistics.median(times), 3),
                "step_ms_min": round(min(times), 3),
                "peak_extra_mb": round(extra / 1e6, 1),
                "floor_ms": round(1000 * max(floor_seconds(contestant, config.batch, bytes_per_second, flops)), 3),
            }
            if config.json:
                print(json.dumps(result), flush=True)
                continue
            sampling = contestant.num_sampled if config.num_sampled else contestant.num_sampled / contestant.num_classes
            kind = (contestant.implementation, contestant.dim, contestant.workers, sampling)
            first = smallest.setdefault(kind, result["step_ms"])
            print(
                f"{contestant.implementation:16}{contestant.num_classes:10,}{contestant.dim:10}"
                f"{contestant.num_sampled:10,}{contestant.workers:10}{result['step_ms']:10.1f}"
                f"{result['step_ms_min']:10.1f}{result['step_ms'] / first:10.2f}{result['peak_extra_mb']:10.1f}"
                f"{result['floor_ms']:10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    run_job(main)

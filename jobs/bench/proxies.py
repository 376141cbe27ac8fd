r"""Benchmark time and memory of a step of the class-proxy matrix, compared with common alternatives.

    python jobs/bench/proxies.py --classes 20000 100000 1000000 --num-sampled 10000
    python jobs/bench/proxies.py --classes 100000 --sample-rate 0.1 --workers 1 2 --json

`ours` is `nsl_dist.proxies`. `gather_fp32` and, on GPUs, `gather_tf32` are a sampled softmax over weight[index], with
a dense gradient of the whole matrix, as InsightFace describes its PartialFC_V2. The others have a softmax over all
classes: `dense` is plain PyTorch, `pml` NormalizedSoftmaxLoss of pytorch-metric-learning, `cce` Apple's cut
cross-entropy, in bfloat16, and `liger` Liger's fused linear cross-entropy, the last two for GPUs (extra `bench`). All
but `ours` use torch.optim.SGD. All but `gather_fp32` and `cce` multiply in the precision of --proxies.matmul or, if
that is bfloat16, in tf32.

Each contestant has one process per worker. They take turns, so that noise of the machine affects all of them equally. A
step is forward pass, backward pass and update for given embeddings. Backward passes run in the calling thread: a
training hands over to autograd's thread once for the whole model. The floor is the time that this machine needs at
least, according to the rates printed at the start: for reading and writing the sampled rows and their momentum once,
and for three matrix products. Extra memory is the peak of a step without weights and momentum, summed over all workers.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

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
Implementation = Literal["ours", "gather_fp32", "gather_tf32", "dense", "pml", "cce", "liger"]
SAMPLED = ("ours", "gather_fp32", "gather_tf32")
PACKAGES = {"pml": "pytorch_metric_learning", "cce": "cut_cross_entropy", "liger": "liger_kernel"}
ON_GPUS = ("gather_tf32", "cce", "liger")


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
    """Numbers of workers (gloo, on CPUs). Those over all classes only run with one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: cuda if there is a GPU."""
    implementations: tuple[Implementation, ...] | None = None
    """Implementations to measure. None: all that the device and the installed packages allow."""
    proxies: ProxyConfig = field(default_factory=ProxyConfig)
    """Options of `ours`, except for sampling, which the grid determines."""
    turns: int = 7
    """Turns per contestant; each has one warm-up step and three measured steps."""
    json: bool = False
    """Print one JSON object per line instead of a table."""
    report: str | None = None
    """A Markdown file to write the table to."""


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
        config = replace(config, num_sampled=contestant.num_sampled)
        self.matrix = ProxyMatrix(partition, contestant.dim, config, device=device, group=group)
        self.matrix.start_optimizer(momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, step=0)
        self.num_steps = 0

    def step(self, embeddings_bD: Tensor, labels_B: NDArray[np.int64], next_labels_B: NDArray[np.int64]) -> None:
        """Run one step as a training does: the next one's classes are drawn while the device works."""
        loss = self.matrix.loss(embeddings_bD, labels_B, step=self.num_steps, lr=LR)
        torch.autograd.backward(loss)
        self.num_steps += 1
        self.matrix.prefetch(next_labels_B, step=self.num_steps)

    @property
    def tables(self) -> list[Tensor]:
        """State kept between steps."""
        device = self.matrix.weight.device
        in_memory = self.matrix.config.placement != "disk"
        return [table for table in self.matrix.state().values() if table.device == device and in_memory]


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

    def step(self, embeddings_bD: Tensor, labels_B: NDArray[np.int64], _: NDArray[np.int64]) -> None:
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


class CutCrossEntropy(Dense):
    """Apple's cut cross-entropy over normalised rows."""

    def loss(self, embeddings_bD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss."""
        from cut_cross_entropy import linear_cross_entropy

        queries, rows = F.normalize(embeddings_bD) / TEMPERATURE, F.normalize(self.weight)
        loss: Tensor = linear_cross_entropy(queries.bfloat16(), rows.bfloat16(), labels_B)
        return loss


class Liger(Dense):
    """Liger's fused linear cross-entropy over normalised rows."""

    def loss(self, embeddings_bD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        queries, rows = F.normalize(embeddings_bD) / TEMPERATURE, F.normalize(self.weight)
        loss: Tensor = LigerFusedLinearCrossEntropyLoss()(rows, queries, labels_B)
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
        case "gather_fp32" | "gather_tf32":
            return AutogradGather(contestant, rank, device)
        case "dense":
            return Dense(contestant, rank, device)
        case "pml":
            return PytorchMetricLearning(contestant, device)
        case "cce":
            return CutCrossEntropy(contestant, rank, device)
        case "liger":
            return Liger(contestant, rank, device)


def _bytes_said_by(file: str, name: str) -> int:
    with open(file) as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def anonymous_memory() -> int:
    """Return this process's anonymous resident memory in bytes, which excludes file pages and caches."""
    return _bytes_said_by("/proc/self/status", "RssAnon")


Batch = tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]


def batches(contestant: Contestant, batch: int, rank: int, device: torch.device) -> Iterator[Batch]:
    """Yield random embeddings of one worker, the labels of the global batch, and those of the next."""
    rng = np.random.default_rng(1)
    generator = torch.Generator().manual_seed(rank)
    labels_B = rng.integers(0, contestant.num_classes, batch)
    while True:
        embeddings_bD = torch.randn(batch // contestant.workers, contestant.dim, generator=generator)
        next_labels_B = rng.integers(0, contestant.num_classes, batch)
        yield embeddings_bD.to(device).requires_grad_(), labels_B, next_labels_B
        labels_B = next_labels_B


def compete(
    contestant: Contestant, config: BenchConfig, rank: int, device: torch.device, port: int, orders: Connection
) -> None:
    """Build a contestant in a separate process, then time steps or measure memory on request."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // contestant.workers))
    torch.autograd.set_multithreading_enabled(False)
    if contestant.implementation != "ours":
        exact = contestant.implementation == "gather_fp32" or config.proxies.matmul_on(device.type) == "float32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
    if contestant.workers > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("gloo", rank=rank, world_size=contestant.workers)

    # Run a small one first, so that memory allocated once by libraries is not counted.
    small = Contestant(contestant.implementation, 4096, contestant.dim, 1024, contestant.workers)
    warm = build(small, rank, device, config.proxies)
    for batch in itertools.islice(batches(small, config.batch, rank, device), 2):
        warm.step(*batch)
    del warm
    ctypes.CDLL(None).malloc_trim(0)  # otherwise leftovers would hide new allocations
    before = anonymous_memory()
    built = build(contestant, rank, device, config.proxies)
    source = batches(contestant, config.batch, rank, device)
    for batch in itertools.islice(source, 4):  # on GPUs, the first compile kernels and record them
        built.step(*batch)
    orders.send(None)
    while (order := orders.recv()) is not None:
        if order == "time":
            orders.send([timed_step(built, next(source), device) for _ in range(4)][1:])
        else:
            steps = list(itertools.islice(source, 3))
            orders.send(_peak_extra_bytes(built, steps, before, device))


def times_of(contestant: Contestant, config: BenchConfig, device: torch.device, *, turns: int) -> list[float]:
    """Return the milliseconds of `turns` steps of a contestant with one worker, in this process."""
    built = build(contestant, 0, device, config.proxies)
    source = batches(contestant, config.batch, 0, device)
    return [timed_step(built, next(source), device) for _ in range(5 + turns)][5:]


def timed_step(built: Ours | Dense, batch: Batch, device: torch.device) -> float:
    """Return the milliseconds of a step."""
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
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for batch in steps:
            built.step(*batch)
        # Recorded graphs hold memory that is not allocated to tensors.
        return int(torch.cuda.max_memory_reserved()) - tables
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


def machine_rates(device: torch.device, precision: str = "float32") -> tuple[float, float]:
    """Measure bytes/s of a copy (read and written) and FLOP/s of a matrix product in a precision."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")

    def fastest(work: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(9):
            _settle(device)
            started = time.perf_counter()
            work()
            _settle(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    rates = 2 * source.nbytes / fastest(lambda: target.copy_(source)), 2 * size**3 / fastest(lambda: left @ right)
    torch.set_float32_matmul_precision("highest")
    return rates


def bytes_per_row(contestant: Contestant, proxies: ProxyConfig) -> int:
    """Return the size of one class's weight and momentum."""
    if contestant.implementation != "ours":
        return 8 * contestant.dim
    matrices = 2 if proxies.optimizer == "sgd" else 1
    return matrices * contestant.dim * (2 if proxies.dtype == "bfloat16" else 4)


def floor_seconds(
    contestant: Contestant, config: BenchConfig, bytes_per_second: float, flops: float
) -> tuple[float, float]:
    """Return the least time for the rows' bytes and for the products, of all workers together."""
    num_bytes = 2 * contestant.num_sampled * bytes_per_row(contestant, config.proxies)
    num_operations = 6 * config.batch * contestant.num_sampled * contestant.dim
    return num_bytes / bytes_per_second, num_operations / flops


def implementations_for(config: BenchConfig, device: torch.device) -> list[Implementation]:
    """Return the implementations to measure.

    Raises:
        ValueError: one that is asked for needs a GPU, or a package that is not installed.

    """
    if config.implementations is None:
        return [each for each in get_args(Implementation) if _obstacle(each, device) is None]
    for each in config.implementations:
        if obstacle := _obstacle(each, device):
            raise ValueError(f"--implementations {each} {obstacle}")
    return list(config.implementations)


def _obstacle(implementation: Implementation, device: torch.device) -> str | None:
    if implementation in ON_GPUS and device.type != "cuda":
        return "needs a GPU"
    if implementation in PACKAGES and importlib.util.find_spec(PACKAGES[implementation]) is None:
        return f"needs {PACKAGES[implementation]}, which the extra `bench` installs"
    return None


def contestants_of(config: BenchConfig, device: torch.device) -> list[Contestant]:
    """Return all contestants of the grid."""
    found = []
    implementations = implementations_for(config, device)
    for workers, dim, num_classes in itertools.product(config.workers, config.dim, config.classes):
        sizes = config.num_sampled or tuple(round(rate * num_classes) for rate in config.sample_rate)
        for implementation in implementations:
            if implementation in SAMPLED:
                found += [
                    Contestant(implementation, num_classes, dim, min(size, num_classes), workers) for size in sizes
                ]
            elif workers == 1:
                found.append(Contestant(implementation, num_classes, dim, num_classes, 1))
    return found


def bytes_needed(contestant: Contestant, config: BenchConfig, device: torch.device) -> int:
    """Return about how much of the device's memory a contestant takes."""
    matrix = 4 * contestant.num_classes * contestant.dim
    if contestant.implementation == "ours":
        placement = config.proxies.placement
        elsewhere = placement == "disk" or (placement == "host" and device.type == "cuda")
        kept = 0 if elsewhere else contestant.num_classes * bytes_per_row(contestant, config.proxies)
        return kept + 8 * contestant.num_classes + int(1.5 * config.proxies.memory * 2**30)
    # Weights, momentum and gradients; for dense ones also normalised weights, and logits with their gradients.
    if contestant.implementation in SAMPLED:
        return 4 * matrix
    return 9 * matrix + 3 * 4 * config.batch * contestant.num_classes


def rounds_that_fit(
    contestants: list[Contestant], config: BenchConfig, device: torch.device, memory: int
) -> Iterator[list[Contestant]]:
    """Yield groups that fit in memory together; report and skip contestants that do not fit alone."""
    together: list[Contestant] = []
    taken = 0
    for contestant in contestants:
        num_bytes = bytes_needed(contestant, config, device)
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


def name_of(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


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
    contestants = contestants_of(config, device)
    precision = config.proxies.matmul_on(device.type)
    bytes_per_second, flops = machine_rates(device, precision)
    about = (
        f"{len(contestants)} contestants on {name_of(device)}, batch {config.batch}, {config.turns} turns of 3 steps; "
        f"it copies {bytes_per_second / 1e9:.1f} GB/s and multiplies at {flops / 1e12:.2f} TFLOP/s in {precision}"
    )
    print(about, file=sys.stderr)
    header = (
        "implementation", "classes", "dim", "sampled", "workers", "step ms", "min", "growth", "extra MB", "bytes ms",
        "products ms",
    )  # fmt: skip
    if not config.json:
        print(f"{header[0]:16}" + "".join(f"{name:>12}" for name in header[1:]))
    lines = [f"# {about}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    smallest: dict[tuple[Any, ...], float] = {}
    for together in rounds_that_fit(contestants, config, device, available_memory(device)):
        for contestant, (times, extra) in zip(together, measure(together, config, device), strict=True):
            bytes_floor, products_floor = floor_seconds(contestant, config, bytes_per_second, flops)
            result = {
                **asdict(contestant),
                "device": device.type,
                "step_ms": round(statistics.median(times), 3),
                "step_ms_min": round(min(times), 3),
                "peak_extra_mb": round(extra / 1e6, 1),
                "bytes_floor_ms": round(1000 * bytes_floor, 3),
                "products_floor_ms": round(1000 * products_floor, 3),
            }
            sampling = contestant.num_sampled if config.num_sampled else contestant.num_sampled / contestant.num_classes
            kind = (contestant.implementation, contestant.dim, contestant.workers, sampling)
            first = smallest.setdefault(kind, result["step_ms"])
            cells = [
                contestant.implementation, f"{contestant.num_classes:,}", f"{contestant.dim}",
                f"{contestant.num_sampled:,}", f"{contestant.workers}", f"{result['step_ms']:.2f}",
                f"{result['step_ms_min']:.2f}", f"{result['step_ms'] / first:.2f}", f"{result['peak_extra_mb']:.1f}",
                f"{result['bytes_floor_ms']:.2f}", f"{result['products_floor_ms']:.2f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            line = f"{cells[0]:16}" + "".join(f"{cell:>12}" for cell in cells[1:])
            print(json.dumps(result) if config.json else line, flush=True)
    if config.report is not None:
        Path(config.report).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_job(main)

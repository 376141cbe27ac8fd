r"""Speed of training itself: stages, data pipeline and whole trainings, beside plain PyTorch on the same images.

On two CPU cores, on built-in synthetic products, in a quarter of an hour; then one part of it:

    python jobs/bench_train.py
    python jobs/bench_train.py --parts data --turns 5

The paper's model on a machine with GPUs:

    python jobs/bench_train.py --recipe sop_resnet50 --data.root sop_shards --data.batch-size 80 --steps 300 --json

Beside the flags below it takes those of jobs/train_sop.py. --json prints one object a line, for each part; all else goes
to stderr. Contestants take turns, each in fresh processes, so that a noisy machine is as noisy for all.

stages: what a batch costs in one process: data stages with one thread, as in the tasks of Ray Data, the others with
those of a worker. `step` and `batch` are the same work as training does it. The share is that of a step.

data: the tasks of the data pipeline called on every core without anything around them (pure), our pipeline on as many
CPUs of Ray, read by a consumer that does nothing, and torch's DataLoader with as many processes.

training: jobs/train_sop.py's training against a twin: DataLoader, DistributedDataParallel and torch.optim.SGD, with a
dense softmax over all proxies, a parameter like any other. Model, batches, augmentation, threads and initial weights
are the same, the twin's processes for data at least as many: on every worker the same number.

gpu: steps on tensors that are there already, by precision, memory format, compiler and optimiser; utilisation is
measured FLOPs of forward and backward by the peak for dense bfloat16. ours: nsl_dist's step, ratio to the like plain one.
With many classes a tenth of them is sampled; `added` is to the same model without any loss.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from nsl_dist import cluster, storage
from nsl_dist.commandline import parse_train_config, run_job
from nsl_dist.config import CheckpointConfig, ProxyConfig, TrackingConfig, TrainConfig, TrainEvalConfig
from nsl_dist.data.sampler import ClassBalancedPlan, PlannedBatch
from nsl_dist.data.shards import Manifest, Split, open_data
from nsl_dist.data.stream import DATA_NICENESS, fetch, planned_batches
from nsl_dist.data.transforms import augment, decode, normalise, resize
from nsl_dist.device import autocast_dtype
from nsl_dist.model import build_model
from nsl_dist.progress import output, show_results
from nsl_dist.proxies.counter_random import uniform_rows
from nsl_dist.training.run import DATA_CPUS, train
from nsl_dist.training.schedule import Schedule
from nsl_dist.training.step import TrainingStep

CORES = os.cpu_count() or 1
# Of dense bfloat16 products, FLOP/s, by what the makers' data sheets say; the first whose words are in the GPU's name.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12,
}  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchConfig:
    """What is measured; all other flags are those of jobs/train_sop.py."""

    parts: tuple[Literal["stages", "data", "training", "gpu"], ...] = ("stages", "data", "training", "gpu")
    """Parts of the benchmark."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of training workers."""
    steps: int = 100
    """Batches of each turn of `data`; steps of each training, rounded up to whole epochs."""
    warm_up: int = 20
    """Of those at the start that do not count: batches wait for the first steps, which are not as fast as the rest."""
    turns: int = 3
    """Turns of each contestant; `stages` takes 5 batches and `gpu` 10 steps for each."""
    proxy_classes: int = 1_000_000
    """Classes of which `gpu` samples a tenth."""


@dataclass(frozen=True)
class Work:
    """The data and how to train on it, for every contestant."""

    config: TrainConfig
    plan: ClassBalancedPlan
    split: Split

    @property
    def device(self) -> torch.device:
        """Where to train."""
        return torch.device(self.config.device)

    @property
    def schedule(self) -> Schedule:
        """Phases and learning rates."""
        return Schedule(self.config.optim, self.plan.steps_per_epoch)

    def images(self, step: int, *, rank: int = 0, world_size: int = 1) -> tuple[Tensor, PlannedBatch]:
        """Make one worker's part of a batch, as a task of the data pipeline does."""
        part = self.plan.part(step, rank=rank, world_size=world_size)
        positions = range(rank * len(part.labels), (rank + 1) * len(part.labels))
        resized = fetch(part, self.split, self.config.data)
        return augment(resized, positions, self.config.data, seed=self.plan.seed, step=step), part

    def training_step(self, config: TrainConfig, num_classes: int) -> TrainingStep:
        """Return our step for one worker."""
        steps = self.plan.steps_per_epoch
        return TrainingStep(config, num_classes=num_classes, steps_per_epoch=steps, device=self.device)


class Parts(Dataset[tuple[Tensor, Tensor]]):
    """One worker's parts of the batches, by step: images and their classes."""

    def __init__(self, work: Work, rank: int, world_size: int) -> None:
        self.work, self.rank, self.world_size = work, rank, world_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Make one."""
        images, part = self.work.images(step, rank=self.rank, world_size=self.world_size)
        return images, torch.from_numpy(part.labels)

    def loader(self, num_steps: int, num_processes: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Make all of them in order, in processes of torch's."""
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


class Classifier(nn.Module):
    """The model and a dense normalised softmax, as the loss's authors publish it."""

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__()
        self.model = build_model(config.model, seed=config.seed)
        dim = config.model.dim
        self.proxies = nn.Parameter(uniform_rows(torch.arange(num_classes), dim, bound=dim**-0.5, seed=config.seed))
        self.temperature = config.proxies.temperature

    def forward(self, images_bCHW: Tensor, labels_b: Tensor) -> Tensor:
        """Return the loss."""
        embeddings_bD = self.model(images_bCHW)
        with torch.autocast(images_bCHW.device.type, enabled=False):
            logits = embeddings_bD @ F.normalize(self.proxies).T / self.temperature
            return F.cross_entropy(logits, labels_b)


@dataclass
class PlainStep:
    """A step as one writes it in plain PyTorch."""

    forward: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.SGD
    dtype: torch.dtype | None
    memory_format: torch.memory_format = torch.channels_last

    def run(self, images_bCHW: Tensor, labels_b: Tensor) -> Tensor:
        """Do one step."""
        images_bCHW = normalise(images_bCHW).contiguous(memory_format=self.memory_format)
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


def _start_together(barrier: Barrier) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what they print, and what Ray's processes do, is not the bench's
    barrier.wait()


def run_apart(function: Callable[..., Any], *arguments: Any, count: int = 1) -> list[Any]:
    """Call `function(rank, *arguments)` in `count` fresh processes that begin together; return what they do."""
    context = get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, context, initializer=_start_together, initargs=(barrier,)) as pool:
        futures = [pool.submit(function, rank, *arguments) for rank in range(count)]
        return [future.result() for future in futures]


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def steady_rate(sizes: Iterable[int], warm_up: int) -> float:
    """Return images/s from batches as they come."""
    batches = iter(sizes)
    for _ in range(warm_up):
        next(batches)
    started = time.perf_counter()
    num_images = sum(batches)
    return num_images / (time.perf_counter() - started)


def prepare(_: int, config: TrainConfig) -> Manifest:
    """Open the data set; shard it, or render the synthetic one, the first time."""
    cluster.connect(num_cpus=1)
    try:
        return open_data(
            config.data.root,
            layout=config.data.layout,
            storage_root=config.storage,
            max_undecodable=config.data.max_undecodable,
        )
    finally:
        ray.shutdown()


# Part 1: stages.


def read(part: PlannedBatch, split: Split) -> dict[tuple[int, int], bytes]:
    """Read the images of a part, each once, by class and place in it."""
    encoded = {}
    for label in np.unique(part.labels).tolist():
        bag = split.read_bag(label, ["image"])["image"]
        for index in np.unique(part.indices[part.labels == label]).tolist():
            encoded[label, index] = bag[index].as_py()
    return encoded


def time_stages(_: int, work: Work, bench: BenchConfig) -> dict[str, float]:
    """Return the median seconds of each stage of a batch."""
    config, device = work.config, work.device
    apart, whole = (work.training_step(config, work.split.num_classes) for _ in range(2))
    seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(stage: str, threads: int) -> Iterator[None]:
        torch.set_num_threads(threads)
        settle(device)
        started = time.perf_counter()
        yield
        settle(device)
        seconds[stage].append(time.perf_counter() - started)

    threads = config.threads or 1
    for step in range(2 + 5 * bench.turns):
        part = work.plan.batch(step)
        with timed("read", 1):
            encoded = read(part, work.split)
        with timed("decode", 1):
            decoded = {key: decode(each) for key, each in encoded.items()}
        with timed("resize", 1):
            resized = {key: resize(each, config.data.resized_edge) for key, each in decoded.items()}
            resized_BCHW = torch.stack([resized[key] for key in zip(*_places(part), strict=True)])
        with timed("augment", 1):
            images = augment(resized_BCHW, range(len(resized_BCHW)), config.data, seed=work.plan.seed, step=step)
        with timed("batch", 1):
            expected, _part = work.images(step)
        assert torch.equal(images, expected), "the stages make other images than the data pipeline"

        with timed("transfer", threads):
            images = images.to(device)
        with timed("forward", threads):
            apart.model.train()
            pixels = normalise(images).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, apart.dtype) if apart.dtype else nullcontext():
                embeddings = apart.model(pixels)
        with timed("loss", threads):  # both ways, and the proxies' update, which is part of it
            leaf = embeddings.detach().requires_grad_()
            lr = work.schedule.learning_rate(step)
            loss = apart.proxies.loss(leaf, part.labels, step=step, lr=lr * config.proxies.lr_scale)
            torch.autograd.backward(loss)
        with timed("backward", threads):
            torch.autograd.backward(embeddings, leaf.grad)
        with timed("optimiser", threads):
            assert apart.optimizer is not None
            apart.optimizer.param_groups[0]["lr"] = lr
            apart.optimizer.step()
            apart.optimizer.zero_grad()
        with timed("step", threads):
            whole_loss = whole.run(images, part.labels, step=step)
        assert step > 0 or math.isclose(loss.item(), whole_loss.item(), rel_tol=1e-3), "the stages are another step"
    return {stage: statistics.median(each[2:]) for stage, each in seconds.items()}


def _places(part: PlannedBatch) -> tuple[list[int], list[int]]:
    return part.labels.tolist(), part.indices.tolist()


def stages(work: Work, bench: BenchConfig) -> list[Row]:
    """Measure part 1."""
    (seconds,) = run_apart(time_stages, work, bench)
    order = ("read", "decode", "resize", "augment", "batch", "transfer", "forward", "loss", "backward", "optimiser")
    batch_size = work.plan.batch_size
    return [
        {
            "stage": stage,
            "ms": 1000 * seconds[stage],
            "images_per_second": batch_size / seconds[stage],
            "share": seconds[stage] / seconds["step"],
        }
        for stage in (*order, "step")
    ]


# Part 2: the data pipeline alone.


def pure_rate(rank: int, work: Work, bench: BenchConfig) -> float:
    """Return images/s of one process of `CORES`."""
    os.setpriority(os.PRIO_PROCESS, 0, DATA_NICENESS)  # as the pipeline's, should the machine have other work
    torch.set_num_threads(1)
    parts = (len(work.images(step)[0]) for step in range(rank, CORES * bench.steps, CORES))
    return steady_rate(itertools.islice(parts, bench.steps), bench.warm_up)


def loader_rate(_: int, work: Work, bench: BenchConfig) -> float:
    """Return images/s of torch's DataLoader."""
    os.setpriority(os.PRIO_PROCESS, 0, DATA_NICENESS)
    loader = Parts(work, 0, 1).loader(bench.steps * CORES, CORES)
    return steady_rate((len(images) for images, _ in loader), bench.warm_up)


def ray_data_rate(_: int, work: Work, bench: BenchConfig) -> float:
    """Return images/s of our data pipeline."""
    cluster.connect(num_cpus=CORES)
    try:
        plan, config = work.plan, work.config.data
        last = bench.steps * CORES
        (shards,) = planned_batches(plan, work.split, config, first_step=0, last_step=last, world_size=1)
        batches = shards.iter_torch_batches(batch_size=plan.batch_size, prefetch_batches=2)
        return steady_rate((len(batch["image"]) for batch in batches), bench.warm_up)
    finally:
        ray.shutdown()


def data(work: Work, bench: BenchConfig) -> list[Row]:
    """Measure part 2."""
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(bench.turns):
        rates["pure"].append(sum(run_apart(pure_rate, work, bench, count=CORES)))
        rates["ours"] += run_apart(ray_data_rate, work, bench)
        rates["loader"] += run_apart(loader_rate, work, bench)
    pure = statistics.median(rates["pure"])
    return [
        {
            "pipeline": name,
            "cpus": CORES,
            "images_per_second": statistics.median(each),
            "lowest": min(each),
            "ratio_to_pure": statistics.median(each) / pure,
        }
        for name, each in rates.items()
    ]


# Part 3: whole trainings.


@dataclass(frozen=True)
class Trained:
    """What a training says of its speed after the warm-up."""

    first_loss: float
    images_per_second: float
    data_wait_share: float


def ray_training(_: int, work: Work, bench: BenchConfig) -> Trained:
    """Train as jobs/train_sop.py does."""
    from nsl_dist.tracking.tracker import Tracker  # MLflow takes seconds to import

    config = work.config
    try:
        with output("quiet"):
            run_id = train(config)["mlflow_run_id"]
    finally:
        ray.shutdown()
    tracker = Tracker(config.tracking.uri, storage_root=config.storage)
    history = tracker.history(["loss", "step_seconds", "data_wait_share"], run_id=run_id)
    records = zip(history["step_seconds"], history["data_wait_share"], strict=True)
    windows = [(step, seconds, share) for (step, seconds), (_, share) in records]
    return summarise(windows, history["loss"][0][1], work, bench)


def twin_training(rank: int, work: Work, bench: BenchConfig, world_size: int, port: int) -> Trained:
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
    classifier.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = sgd(classifier, config)
    forward = DistributedDataParallel(classifier, gradient_as_bucket_view=True) if world_size > 1 else classifier
    plain = PlainStep(forward, optimizer, autocast_dtype(config.precision, device))
    forward.train()

    loader = Parts(work, rank, world_size).loader(schedule.num_steps, -(-data_cpus(config, world_size) // world_size))
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
    return summarise(windows, first_loss, work, bench)


def summarise(windows: list[tuple[int, float, float]], first_loss: float, work: Work, bench: BenchConfig) -> Trained:
    """Sum up windows of steps, each with its last step, seconds a step and share of waiting, from the warm-up on."""
    counted = [
        (step - before, seconds, share)
        for (before, _, _), (step, seconds, share) in itertools.pairwise(windows)
        if before >= bench.warm_up
    ]
    if not counted:
        raise ValueError(f"--warm-up {bench.warm_up} leaves nothing of {windows[-1][0]} steps; give more --steps")
    total = sum(steps * seconds for steps, seconds, _ in counted)
    num_images = work.plan.batch_size * sum(steps for steps, _, _ in counted)
    waited = sum(steps * seconds * share for steps, seconds, share in counted)
    return Trained(first_loss, num_images / total, waited / total)


def data_cpus(config: TrainConfig, workers: int) -> int:
    """Return the CPUs that a training on this machine leaves to its data."""
    return max(DATA_CPUS, CORES - workers * config.cpus_per_worker)


def training(work: Work, bench: BenchConfig) -> list[Row]:
    """Measure part 3."""
    base = work.config
    measured: dict[tuple[int, str], list[Trained]] = defaultdict(list)
    gpus = torch.cuda.device_count() if base.device == "cuda" else max(bench.workers)
    for workers in [each for each in bench.workers if each > gpus]:
        print(f"{workers} workers are left out: there are {gpus} GPUs", flush=True)
    Path(base.storage).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_train_", dir=base.storage) as folder:
        for turn, workers in itertools.product(range(bench.turns), bench.workers):
            if workers > gpus:
                continue
            config = dataclasses.replace(
                base,
                storage=folder,
                run_name=f"{workers}-workers-{turn}",
                num_workers=workers,
                threads=base.threads or max(1, CORES // workers),
                optim=dataclasses.replace(base.optim, epochs=math.ceil(bench.steps / work.plan.steps_per_epoch)),
                checkpoint=CheckpointConfig(every=10**9),
                eval=TrainEvalConfig(nmi=False),
                tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", every=base.tracking.every),
            )
            turn_work = dataclasses.replace(work, config=config)
            measured[workers, "ours"] += run_apart(ray_training, turn_work, bench)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            team = run_apart(twin_training, turn_work, bench, workers, port, count=workers)
            measured[workers, "twin"].append(team[0])
            for name in ("ours", "twin"):
                print(f"turn {turn + 1}, {workers} workers, {name}: {measured[workers, name][-1]}", flush=True)

    rates = {key: statistics.median(each.images_per_second for each in trained) for key, trained in measured.items()}
    rows: list[Row] = []
    for (workers, name), trained in measured.items():
        twin_loss = measured[workers, "twin"][0].first_loss
        tolerance = 1e-3 if autocast_dtype(base.precision, work.device) is None else 1e-2
        if base.proxies.sample_rate == 1 and not math.isclose(trained[0].first_loss, twin_loss, rel_tol=tolerance):
            raise RuntimeError(
                f"{workers} workers begin with loss {trained[0].first_loss}, their twin with {twin_loss}"
            )
        fewest = min(each for each, _ in measured)
        rows.append(
            {
                "implementation": name,
                "workers": workers,
                "data_cpus": data_cpus(base, workers)
                if name == "ours"
                else -(-data_cpus(base, workers) // workers) * workers,
                "images_per_second": rates[workers, name],
                "lowest": min(each.images_per_second for each in trained),
                "data_wait_share": statistics.median(each.data_wait_share for each in trained),
                "first_loss": trained[0].first_loss,
                "scaling": rates[workers, name] / rates[fewest, name],
                "ratio_to_twin": rates[workers, name] / rates[workers, "twin"],
            }
        )
    return rows


# Part 4: the step on a GPU.


def median_seconds(
    contestants: dict[str, Callable[[int], object]], turns: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of a step; each turn is of 10, one after the other without a pause."""
    steps: dict[str, Iterator[int]] = {name: itertools.count() for name in contestants}
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(1 + turns):
        for name, contestant in contestants.items():
            settle(device)
            started = time.perf_counter()
            for step in itertools.islice(steps[name], 10):
                contestant(step)
            settle(device)
            seconds[name].append((time.perf_counter() - started) / 10)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first turn compiles


def plain_steps(work: Work, images: Tensor, labels: Tensor) -> dict[str, Callable[[int], object]]:
    """Return plain steps by precision, memory format, compiler and optimiser."""
    contestants: dict[str, Callable[[int], object]] = {}
    config, device = work.config, work.device
    half, last, first = torch.bfloat16, torch.channels_last, torch.contiguous_format
    for dtype, memory_format, compiled, fused in (
        (None, first, False, False), (None, last, False, False), (half, first, False, False), (half, last, False, False),
        (half, last, False, True), (half, last, True, False), (half, last, True, True),
    ):  # fmt: skip
        classifier = Classifier(config, work.split.num_classes).to(device).train()
        classifier.model.to(memory_format=memory_format)  # type: ignore[call-overload]
        forward = torch.compile(classifier) if compiled else classifier
        optimizer = sgd(classifier, config, fused=fused or None)
        plain = PlainStep(forward, optimizer, dtype, memory_format)
        name = " ".join(
            ["plain", "bf16" if dtype else "float32", "nhwc" if memory_format is last else "nchw"]
            + ["compiled"] * compiled + ["fused"] * fused
        )  # fmt: skip
        contestants[name] = functools.partial(lambda plain, _: plain.run(images, labels), plain)
    return contestants


def time_gpu(_: int, work: Work, bench: BenchConfig) -> tuple[dict[str, float], int]:
    """Return median seconds of a step by contestant, and FLOPs of forward and backward."""
    config, device, batch_size = work.config, work.device, work.plan.batch_size
    size = config.data.image_size
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device)
    labels_B = work.plan.batch(0).labels
    contestants = plain_steps(work, images, torch.from_numpy(labels_B).to(device))

    # As the training loop does it: the next step's proxies are drawn while the device works.
    def ours(training: TrainingStep, labels: Callable[[int], np.ndarray[Any, Any]], step: int) -> None:
        training.run(images, labels(step), step=step)
        training.proxies.prefetch(labels(step + 1), step=step + 1)

    for precision, name in (("float32", "ours float32 nhwc"), ("bfloat16", "ours bf16 nhwc")):
        like = dataclasses.replace(config, precision=precision)
        training = work.training_step(like, work.split.num_classes)
        contestants[name] = functools.partial(ours, training, lambda _: labels_B)

    half = dataclasses.replace(config, precision="bfloat16")
    many = dataclasses.replace(half, proxies=ProxyConfig(sample_rate=0.1, temperature=config.proxies.temperature))
    training = work.training_step(many, bench.proxy_classes)
    contestants["ours many classes"] = functools.partial(
        ours, training, lambda step: np.random.default_rng(step).integers(0, bench.proxy_classes, batch_size)
    )
    lossless = work.training_step(half, work.split.num_classes)
    gradient = torch.randn(batch_size, config.model.dim, device=device)

    def without_loss(_: int) -> None:
        assert lossless.optimizer is not None
        lossless.model.train()
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = lossless.model(normalise(images).contiguous(memory_format=torch.channels_last))
        lossless.optimizer.zero_grad()
        torch.autograd.backward(embeddings, gradient)
        lossless.optimizer.step()

    contestants["without loss"] = without_loss
    classifier = Classifier(config, work.split.num_classes).to(device).train()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(classifier(normalise(images), torch.from_numpy(labels_B).to(device)))
    return median_seconds(contestants, bench.turns, device), int(counter.get_total_flops())


def decode_rates(_: int, work: Work, bench: BenchConfig) -> dict[str, float]:
    """Return JPEGs decoded a second, by one core and by the GPU."""
    import torchvision

    encoded = [each for step in range(4) for each in read(work.plan.batch(step), work.split).values()]
    encoded = [each for each in encoded if each.startswith(b"\xff\xd8")]
    tensors = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in encoded]
    mode = torchvision.io.ImageReadMode.RGB
    contestants: dict[str, Callable[[], object]] = {
        "decode, one core": lambda: [decode(each) for each in encoded],
        "decode, GPU": lambda: torchvision.io.decode_jpeg(tensors, mode=mode, device=work.device),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _turn in range(1 + bench.turns):
        for name, contestant in contestants.items():
            settle(work.device)
            started = time.perf_counter()
            contestant()
            settle(work.device)
            seconds[name].append(time.perf_counter() - started)
    return {name: len(encoded) / statistics.median(each[1:]) for name, each in seconds.items()}


def gpu(work: Work, bench: BenchConfig) -> list[Row]:
    """Measure part 4."""
    ((seconds, flops),) = run_apart(time_gpu, work, bench)
    (decoded,) = run_apart(decode_rates, work, bench)
    device = torch.cuda.get_device_name()
    peak = next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name.replace(' ', '.*')}\b", device)), None)
    print(f"{device}: " + (f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "its peak is not known"), flush=True)
    rows: list[Row] = []
    for name, each in seconds.items():
        twin = seconds.get(name.replace("ours", "plain"), each)
        rows.append(
            {
                "step": name,
                "ms": 1000 * each,
                "images_per_second": work.plan.batch_size / each,
                "tflops": flops / each / 1e12,
                "utilisation": flops / each / peak if peak else None,
                "ratio_to_plain": twin / each if twin != each else None,
                "added": each / seconds["without loss"] - 1 if name == "ours many classes" else None,
            }
        )
    return rows + [{"step": name, "images_per_second": rate} for name, rate in decoded.items()]


def table(rows: list[Row]) -> str:
    """Return rows as an aligned table; a row without a column has a dash in it."""

    def written(value: object) -> str:
        return "-" if value is None else f"{value:,.3f}" if isinstance(value, float) else str(value)

    names = list(rows[0])
    cells = [[name.replace("_", " ") for name in names]] + [[written(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(sized))
        for sized in (list(zip(row, widths, strict=True)) for row in cells)
    )


def main() -> None:
    """Measure the parts, print a table of each."""
    bench, rest = tyro.cli(BenchConfig, description=__doc__, return_unknown_args=True)
    config = parse_train_config(rest, description=__doc__ or "")
    if os.environ.get("RAY_ADDRESS") or "://" in config.storage:
        raise ValueError("this measures one machine: leave RAY_ADDRESS out, and give a folder of it as --storage")
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    config = dataclasses.replace(
        config,
        storage=storage.absolute(config.storage),
        device="cuda" if cuda else "cpu",
        threads=config.threads,
        optim=dataclasses.replace(config.optim, new_layers_epochs=0),  # whose steps leave the backbone out
    )
    (manifest,) = run_apart(prepare, config)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, root=manifest.root, layout=manifest.layout)
    )
    split = manifest.split("train")
    plan = ClassBalancedPlan(split.sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    work = Work(config, plan, split)
    measures = {"stages": stages, "data": data, "training": training, "gpu": gpu}
    for part in bench.parts:
        if part == "gpu" and not cuda:
            print("gpu is skipped: there is none", flush=True)
            continue
        rows = measures[part](work, bench)
        show_results(f"\n{part}\n{table(rows)}", {"part": part, "device": config.device, "rows": rows})


if __name__ == "__main__":
    run_job(main, shows_results=True)

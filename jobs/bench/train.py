r"""Benchmark training: stages, data pipeline and whole trainings, compared with plain PyTorch on the same images.

On two CPU cores with built-in synthetic products, in a quarter of an hour; then only one part of it:

    python jobs/bench/train.py
    python jobs/bench/train.py --parts data --turns 5

The paper's model on a machine with GPUs, with photos of 400 x 400 pixels that need no data set:

    python jobs/bench/train.py --recipe sop_resnet50 --model.weights None --data.batch-size 240 --photo-size 400

It also takes all flags of jobs/train_sop.py. --json prints one object per line and part to stdout, everything else goes
to stderr. Contestants take turns, each in fresh processes, so that noise of the machine affects all of them equally.

stages: the cost of a batch in one process. Data stages use one thread, like the tasks of Ray Data; the others use the
threads of a worker. `batch` and `step` are the same work done by the real code. `share` is relative to `step`.

data: the tasks of the data pipeline on every core with nothing around them (pure), our pipeline on as many Ray CPUs
with a consumer that does nothing, and torch's DataLoader with as many processes.

training: the training of jobs/train_sop.py against a twin in plain PyTorch: DataLoader, DistributedDataParallel and
torch.optim.SGD, with a dense softmax over all proxies as an ordinary parameter. Model, batches, augmentation, threads
and initial weights are the same. The twin has at least as many data processes, the same number on every worker. On
GPUs there is also a compiled twin, which the ratio is to; `ratio to synthetic` compares with our step on images that
are on the GPU, and `utilisation` is that of part `gpu`.

embedding: the embedding of an evaluation, a plain loop over a DataLoader with a process per core (and one GPU), and the
forward pass alone on every core or GPU, compiled on GPUs.

gpu: steps on tensors in GPU memory, by precision, memory format, compiler and optimiser. Utilisation is the FLOPs of
forward and backward pass divided by the peak for dense bfloat16. `ours` is nsl_dist's step, with its ratio to the
equivalent plain one. `many classes` samples a tenth of them; `added` is relative to the same model without any loss.
"""

import dataclasses
import functools
import itertools
import math
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import embedding
import gpu_steps
import numpy as np
import ray
import torch
import tyro
from photos import photos
from plain_training import Parts, Trained, Work, refuse_what_is_missing, settle, summarise, twin_training

from nsl_dist import cluster, storage
from nsl_dist.commandline import parse_train_config, run_job
from nsl_dist.config import CheckpointConfig, TrackingConfig, TrainConfig, TrainEvalConfig
from nsl_dist.data.images import decode
from nsl_dist.data.sampler import ClassBalancedPlan, PlannedBatch
from nsl_dist.data.shards import Manifest, Split, find_data, is_prepared, load_manifest, open_data, synthetic_data
from nsl_dist.data.stream import DATA_NICENESS, planned_batches
from nsl_dist.data.transforms import augment, crop_draws, least_pixels, random_crop, resize
from nsl_dist.device import autocast_dtype
from nsl_dist.progress import output, show_results
from nsl_dist.training.train import DATA_CPUS, train

CORES = os.cpu_count() or 1
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; all other flags are those of jobs/train_sop.py."""

    parts: tuple[Literal["stages", "data", "training", "embedding", "gpu"], ...] = (
        "stages", "data", "training", "embedding", "gpu"
    )  # fmt: skip
    """Parts of the benchmark to run."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of training workers."""
    batches: int = 500
    """Batches per core in a turn of `data`; a fifth does not count. Many, because a task makes up to 32 at once."""
    steps: int = 100
    """Steps per training, rounded up to whole epochs."""
    warm_up: int = 20
    """Initial steps that do not count, because they are slower and batches queue up meanwhile."""
    turns: int = 3
    """Turns per contestant; each takes 5 batches in `stages` and 10 steps in `gpu`."""
    proxy_classes: int = 1_000_000
    """Number of classes in `gpu`, of which a tenth is sampled."""
    photo_size: int | None = None
    """Width and height, in pixels, of JPEGs to make from the built-in products and to train on, so that no data set is
    needed. If None, --data.root is used."""


def _start_together(barrier: Barrier) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # hide their output and that of Ray
    barrier.wait()


def run_apart(function: Callable[..., Any], *arguments: Any, count: int = 1) -> list[Any]:
    """Call `function(rank, *arguments)` in `count` fresh processes that start together; return their results."""
    context = get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, context, initializer=_start_together, initargs=(barrier,)) as pool:
        futures = [pool.submit(function, rank, *arguments) for rank in range(count)]
        return [future.result() for future in futures]


def steady_rate(sizes: Iterable[int], warm_up: int) -> float:
    """Return images/s from an iterable of batch sizes."""
    batches = iter(sizes)
    for _ in range(warm_up):
        next(batches)
    started = time.perf_counter()
    num_images = sum(batches)
    return num_images / (time.perf_counter() - started)


def prepare(_: int, config: TrainConfig, photo_size: int | None) -> Manifest:
    """Open the data set, sharding or rendering it the first time."""
    cluster.connect(num_cpus=1)
    try:
        data = config.data
        if photo_size is not None:
            source = photos(config.storage, photo_size)
        else:
            source = find_data(data.root, layout=data.layout) if data.root else synthetic_data(config.storage)
        return open_data(source, storage_root=config.storage, max_undecodable=data.max_undecodable)
    finally:
        ray.shutdown()


# Part 1: stages.


def read(part: PlannedBatch, split: Split) -> dict[tuple[int, int], bytes]:
    """Read each image of a part once; return them by class and index."""
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

    threads = config.threads or CORES
    for step in range(2 + 5 * bench.turns):
        part = work.plan.batch(step)
        places = list(zip(part.labels.tolist(), part.indices.tolist(), strict=True))
        whole_batch, seed = range(len(places)), work.plan.seed
        crops = crop_draws(whole_batch, config.data, seed=seed, step=step)
        least = {}
        for key in set(places):
            of_image = [place for place, each in enumerate(places) if each == key]
            least[key] = least_pixels(config.data, None if crops is None else crops[of_image])
        with timed("read", 1):
            encoded = read(part, work.split)
        with timed("decode", 1):
            decoded = {key: decode(each, least=least[key]) for key, each in encoded.items()}
        with timed("resize", 1):
            if crops is None:
                resized = {key: resize(each, config.data.resized_edge) for key, each in decoded.items()}
                resized_BCHW = torch.stack([resized[key] for key in places])
            else:
                resized_BCHW = torch.stack(
                    [random_crop(decoded[key], each, config.data) for key, each in zip(places, crops, strict=True)]
                )
        with timed("augment", 1):
            images = augment(resized_BCHW, whole_batch, config.data, seed=seed, step=step)
        with timed("batch", 1):
            expected, _part = work.images(step)
        assert torch.equal(images, expected), "the stages produce different images than the data pipeline"

        with timed("transfer", threads):
            images = images.to(device)
        with timed("forward", threads):
            embeddings = apart.embed(images)
        with timed("loss", threads):  # forward, backward and the update of the proxies
            leaf = embeddings.detach().requires_grad_()
            lr = work.schedule.learning_rate(step)
            loss = apart.proxies.loss(leaf, part.labels, step=step, lr=lr * config.proxies.lr_scale)
            torch.autograd.backward(loss)
        with timed("backward", threads):
            torch.autograd.backward(embeddings, leaf.grad)
        with timed("optimiser", threads):
            apart.update_model(step)
            apart.model.zero_grad()
        with timed("step", threads):
            whole_loss = whole.run(images, part.labels, step=step)
        assert step > 0 or math.isclose(loss.item(), whole_loss.item(), rel_tol=1e-3), (
            "the stages compute a different step"
        )
    return {stage: statistics.median(each[2:]) for stage, each in seconds.items()}


def stages(work: Work, bench: BenchConfig) -> list[Row]:
    """Run part 1."""
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
    """Return images/s of one of `CORES` processes."""
    os.setpriority(os.PRIO_PROCESS, 0, DATA_NICENESS)  # like the pipeline, in case the machine is busy
    torch.set_num_threads(1)
    parts = (len(work.images(step)[0]) for step in range(rank, CORES * bench.batches, CORES))
    return steady_rate(parts, bench.batches // 5)


def loader_rate(_: int, work: Work, bench: BenchConfig) -> float:
    """Return images/s of torch's DataLoader."""
    os.setpriority(os.PRIO_PROCESS, 0, DATA_NICENESS)
    loader = Parts(work, 0, 1).loader(bench.batches * CORES, CORES)
    return steady_rate((len(images) for images, _ in loader), bench.batches * CORES // 5)


def ray_data_rate(_: int, work: Work, bench: BenchConfig) -> float:
    """Return images/s of our data pipeline."""
    cluster.connect(num_cpus=CORES)
    try:
        plan, config = work.plan, work.config.data
        last = bench.batches * CORES
        (shards,) = planned_batches(plan, work.split, config, first_step=0, last_step=last, world_size=1)
        batches = shards.iter_torch_batches(batch_size=plan.batch_size, prefetch_batches=2)
        return steady_rate((len(batch["image"]) for batch in batches), last // 5)
    finally:
        ray.shutdown()


def data(work: Work, bench: BenchConfig) -> list[Row]:
    """Run part 2."""
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


def ray_training(_: int, work: Work, bench: BenchConfig) -> Trained:
    """Train like jobs/train_sop.py."""
    from nsl_dist.tracking.tracker import Tracker  # MLflow takes seconds to import

    config = work.config
    try:
        with output("quiet"):
            run_id = train(config).mlflow_run_id
    finally:
        ray.shutdown()
    tracker = Tracker(config.tracking.uri, storage_root=config.storage)
    history = tracker.history(["loss", "step_seconds", "data_wait_share"], run_id=run_id)
    records = zip(history["step_seconds"], history["data_wait_share"], strict=True)
    windows = [(step, seconds, share) for (step, seconds), (_, share) in records]
    return summarise(windows, history["loss"][0][1], batch_size=work.plan.batch_size, warm_up=bench.warm_up)


def data_cpus(config: TrainConfig, workers: int) -> int:
    """Return the number of CPUs that a training on this machine leaves for its data."""
    return max(DATA_CPUS, CORES - workers * config.cpus_per_worker)


def loader_processes(config: TrainConfig, workers: int) -> int:
    """Return the number of data processes of each of the twin's workers, which cannot share them."""
    return math.ceil(data_cpus(config, workers) / workers)


def training(work: Work, bench: BenchConfig) -> list[Row]:
    """Run part 3."""
    base = work.config
    twins = ("twin", "twin, compiled") if gpu_steps.compiles(work) else ("twin",)
    measured: dict[tuple[int, str], list[Trained]] = defaultdict(list)
    gpus = torch.cuda.device_count() if base.device == "cuda" else max(bench.workers)
    for workers in [each for each in bench.workers if each > gpus]:
        print(f"skipping {workers} workers: there are only {gpus} GPUs", flush=True)
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
            processes = loader_processes(config, workers)
            for name in twins:
                twin = functools.partial(
                    twin_training, warm_up=bench.warm_up, port=port, compiled=name == "twin, compiled"
                )
                measured[workers, name].append(run_apart(twin, turn_work, workers, processes, count=workers)[0])
            for name in ("ours", *twins):
                print(f"turn {turn + 1}, {workers} workers, {name}: {measured[workers, name][-1]}", flush=True)

    synthetic, flops = run_apart(gpu_steps.synthetic_rate, work, bench.turns)[0] if base.device == "cuda" else (None, 0)
    peak = gpu_steps.peak_flops(torch.cuda.get_device_name()) if synthetic else None
    rates = {key: statistics.median(each.images_per_second for each in trained) for key, trained in measured.items()}
    rows: list[Row] = []
    for (workers, name), trained in measured.items():
        twin_loss = measured[workers, "twin"][0].first_loss
        tolerance = 1e-3 if autocast_dtype(base.precision, work.device) is None else 1e-2
        if base.proxies.sample_rate == 1 and not math.isclose(trained[0].first_loss, twin_loss, rel_tol=tolerance):
            raise RuntimeError(
                f"{workers} workers start with loss {trained[0].first_loss}, their twin with {twin_loss}"
            )
        fewest = min(each for each, _ in measured)
        rows.append(
            {
                "implementation": name,
                "workers": workers,
                "data_cpus": data_cpus(base, workers) if name == "ours" else workers * loader_processes(base, workers),
                "images_per_second": rates[workers, name],
                "lowest": min(each.images_per_second for each in trained),
                "data_wait_share": statistics.median(each.data_wait_share for each in trained),
                "first_loss": trained[0].first_loss,
                "scaling": rates[workers, name] / rates[fewest, name],
                "ratio_to_twin": rates[workers, name] / rates[workers, twins[-1]],
                "ratio_to_synthetic": rates[workers, name] / workers / synthetic if synthetic else None,
                "utilisation": rates[workers, name] / workers * flops / work.plan.batch_size / peak if peak else None,
            }
        )
    return rows


# Part 4: embedding.


def embedded(work: Work, bench: BenchConfig) -> list[Row]:
    """Run part 4."""
    on_cpus = work.device.type == "cpu"
    manifest = load_manifest(str(work.config.data.root))
    other = manifest.evaluation_splits[1]
    rates: dict[str, list[float]] = defaultdict(list)
    starts = []
    for _ in range(bench.turns):
        # What the training images add to those of the test is without the start.
        (fewer,) = run_apart(embedding.our_seconds, work, (other,))
        (all_of_them,) = run_apart(embedding.our_seconds, work, (other, "train"))
        rates["ours"].append(work.split.num_images / (all_of_them - fewer))
        starts.append(fewer - manifest.split(other).num_images / rates["ours"][-1])
        rates["loop"] += run_apart(embedding.loop_rate, work, CORES)
        count = CORES if on_cpus else torch.cuda.device_count()
        with patch.dict(os.environ, cluster.KEEP_FREED_MEMORY if on_cpus else {}):
            rates["forward"].append(sum(run_apart(embedding.forward_rate, work, bench.turns, count=count)))
    forward = statistics.median(rates["forward"])
    return [
        {
            "implementation": name,
            "images_per_second": statistics.median(each),
            "lowest": min(each),
            "ratio_to_forward": statistics.median(each) / forward,
            "start_seconds": statistics.median(starts) if name == "ours" else None,
        }
        for name, each in rates.items()
    ]


# Part 5: the step on a GPU.


def gpu(work: Work, bench: BenchConfig) -> list[Row]:
    """Run part 5."""
    (rows,) = run_apart(gpu_steps.measure, work, bench.turns, bench.proxy_classes)
    return list(rows)


def table(rows: list[Row]) -> str:
    """Format rows as an aligned table, with dashes for missing values."""

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
    """Run all parts and print a table of each."""
    bench, rest = tyro.cli(BenchConfig, description=__doc__, return_unknown_args=True)
    config = parse_train_config(rest, description=__doc__ or "")
    refuse_what_is_missing(config)
    if os.environ.get("RAY_ADDRESS") or "://" in config.storage:
        raise ValueError("this measures a single machine: unset RAY_ADDRESS and set --storage to a local folder")
    if bench.batches < 1:
        raise ValueError(f"--batches {bench.batches} must be at least 1")
    if bench.steps <= bench.warm_up:
        raise ValueError(f"--warm-up {bench.warm_up} leaves nothing of --steps {bench.steps}")
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    config = dataclasses.replace(
        config,
        storage=storage.absolute(config.storage),
        device="cuda" if cuda else "cpu",
        optim=dataclasses.replace(config.optim, new_layers_epochs=0),  # these would not train the backbone
    )
    root = config.data.root
    if root and bench.photo_size:
        raise ValueError(f"give --photo-size {bench.photo_size} or --data.root {root}, not both")
    (manifest,) = [load_manifest(root)] if root and is_prepared(root) else run_apart(prepare, config, bench.photo_size)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, root=manifest.root, layout=manifest.layout)
    )
    split = manifest.split("train")
    plan = ClassBalancedPlan(split.sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    work = Work(config, plan, split)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    measures = {"stages": stages, "data": data, "training": training, "embedding": embedded, "gpu": gpu}
    for part in bench.parts:
        if part == "gpu" and not cuda:
            print("skipping gpu: there is no GPU", flush=True)
            continue
        rows = measures[part](work, bench)
        show_results(f"\n{part} on {device}\n{table(rows)}", {"part": part, "device": device, "rows": rows})


if __name__ == "__main__":
    run_job(main, shows_results=True)

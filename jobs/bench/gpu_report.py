"""A short table of what one GPU does, written to gpu_report.json beside the outcome of the tests that need it.

    make gpu                                    # the tests, then this; at most six minutes
    python jobs/bench/gpu_report.py
    python jobs/bench/gpu_report.py --tiny      # on CPUs, in small sizes: tries the job itself out

Steps of up to 100 million class proxies on the device and in host memory; a ResNet-50 step beside plain PyTorch's, and
with a tenth of a million proxies that are as wide as its features, beside one without a loss; decoding; exact search of
one shard. Each part is a process of its own with a time limit: one that fails or takes longer is reported so, the
others go on, and the job ends with status 1.

The floor is what the GPU needs at least: for a proxy step its rows read and written once, or its three products; for
the others the products. Rates are measured first, but for a network's bfloat16 products, which are the data sheet's
peak.
"""

import dataclasses
import gc
import io
import json
import multiprocessing as mp
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import gpu_steps
import numpy as np
import proxies
import search
import torch
import tyro
from PIL import Image
from plain_training import Work
from train import table

from nsl_dist.commandline import run_job
from nsl_dist.config import ProxyConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import Split
from nsl_dist.progress import show_results
from nsl_dist.recipes import RECIPES
from nsl_dist.retrieval.gallery_shard import GalleryShard

PartName = Literal["proxies_on_device", "proxies_on_host", "steps", "decoding", "searching"]


@dataclass(frozen=True)
class BenchConfig:
    """What goes into the report, and where that goes."""

    tests: str | None = None
    """JUnit file of the tests, which goes into the report; one that is missing or has failures is a failure."""
    report: str = "gpu_report.json"
    """The file to write."""
    commit: str | None = None
    """Of the code. None: as git says here."""
    parts: tuple[PartName, ...] = ("proxies_on_device", "proxies_on_host", "steps", "decoding", "searching")
    """What to measure."""
    tiny: bool = False
    """On CPUs, in sizes that take seconds, without limits of time."""


@dataclass(frozen=True)
class ProxyCase:
    """A step of class proxies."""

    classes: int
    num_sampled: int
    dim: int = 512
    batch: int = 512
    config: ProxyConfig = field(default_factory=ProxyConfig)


BFLOAT16 = ProxyConfig(matmul="bfloat16")
HOST = ProxyConfig(placement="host")
KEPT = ProxyConfig(memory=6.0)
SMALL = ProxyConfig(dtype="bfloat16", optimizer="adagrad")


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    on_device: tuple[ProxyCase, ...] = (
        ProxyCase(1_000_000, 100_000),
        ProxyCase(1_000_000, 100_000, config=BFLOAT16),
        ProxyCase(1_000_000, 10_000),
        ProxyCase(10_000_000, 1_000_000),
        ProxyCase(10_000_000, 1_000_000, config=KEPT),
        ProxyCase(1_000_000, 1_000_000),
        ProxyCase(1_000_000, 1_000_000, config=BFLOAT16),
        ProxyCase(1_000_000, 100_000, dim=2048, batch=240),
        ProxyCase(1_000_000, 100_000, dim=2048, batch=240, config=BFLOAT16),
        ProxyCase(100_000_000, 100_000, config=SMALL),
    )
    on_host: tuple[ProxyCase, ...] = (
        ProxyCase(1_000_000, 100_000, config=HOST),
        ProxyCase(1_000_000, 10_000, config=HOST),
    )
    dim: int = 512
    many_classes: int = 1_000_000
    wide_dim: int = 2048  # of the backbone's features
    backbone: str = "resnet50"
    image_size: int = 224
    batch: int = 240
    train_classes: int = 11_318  # of Stanford Online Products, as the vectors below
    jpegs: int = 256
    jpeg_edge: int = 400
    vectors: int = 60_502
    queries: int = 10_000
    neighbours: int = 1034  # recall@1000, the query itself and what is looked at for ties
    turns: int = 5


TINY = Sizes(
    on_device=(ProxyCase(2000, 200, 16, 16), ProxyCase(2000, 2000, 16, 16)),
    on_host=(ProxyCase(2000, 200, 16, 16, HOST),),
    dim=16, many_classes=200, wide_dim=512, backbone="resnet18", image_size=32, batch=10, train_classes=20, jpegs=4,
    jpeg_edge=64, vectors=500, queries=50, neighbours=20, turns=2,
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Rates that the floors are computed with: bytes and floating-point operations a second; None: not known."""

    device: Literal["cpu", "cuda"]
    copy: float
    """Of the device's memory, read and written."""
    products: dict[str, float]
    """By precision, measured."""
    bfloat16_peak: float | None
    to_device: float | None
    """From pinned host memory, one way."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    on: str
    ms: float
    """The median."""
    ms_min: float
    ms_max: float
    floor_ms: float | None
    floor_of: Literal["bytes", "products"] | None
    per_second: float
    unit: str


Part = Callable[[Machine, Sizes], list[Row]]


def row(
    what: str, seconds: list[float], *, on: str, count: int, unit: str,
    bytes_floor: float | None = None, products_floor: float | None = None,
) -> Row:  # fmt: skip
    """Return the line of a measurement, given the seconds of each turn and how many of `unit` a turn does."""
    floor = max(bytes_floor or 0, products_floor or 0)
    median = statistics.median(seconds)
    return Row(
        what=what,
        on=on,
        ms=1000 * median,
        ms_min=1000 * min(seconds),
        ms_max=1000 * max(seconds),
        floor_ms=1000 * floor if floor else None,
        floor_of=("bytes" if floor == bytes_floor else "products") if floor else None,
        per_second=count / median,
        unit=unit,
    )


def proxies_on_device(machine: Machine, sizes: Sizes) -> list[Row]:
    """Measure steps of class proxies that are kept on the device."""
    return _proxy_steps(machine, sizes.on_device, machine.copy)


def proxies_on_host(machine: Machine, sizes: Sizes) -> list[Row]:
    """Measure steps of class proxies that are kept in host memory."""
    return _proxy_steps(machine, sizes.on_host, machine.to_device or machine.copy)


def _proxy_steps(machine: Machine, cases: tuple[ProxyCase, ...], bytes_per_second: float) -> list[Row]:
    device = torch.device(machine.device)
    rows = []
    for case in cases:
        gc.collect()  # the matrix of the case before
        if device.type == "cuda":
            torch.cuda.empty_cache()
        config = proxies.BenchConfig(batch=case.batch, proxies=case.config)
        contestant = proxies.Contestant("ours", case.classes, case.dim, case.num_sampled, workers=1)
        if proxies.bytes_needed(contestant, config, device) > proxies.available_memory(device):
            print(f"left out, does not fit: {case}", file=sys.stderr)
            continue
        with torch.autograd.set_multithreading_enabled(False):
            times = proxies.times_of(contestant, config, device, turns=15)
        precision = case.config.matmul_on(device.type)
        bytes_floor, products_floor = proxies.floor_seconds(
            contestant, config, bytes_per_second, machine.products[precision]
        )
        kind = [case.config.placement, precision]
        kind += ["bfloat16 rows", "Adagrad"] * (case.config == SMALL) + ["all kept"] * (case.config == KEPT)
        rows.append(
            row(
                f"proxy step, {case.num_sampled:,} of {case.classes:,} x {case.dim}, {', '.join(kind)}",
                [ms / 1000 for ms in times],
                on=machine.device,
                count=case.batch,
                unit="images",
                bytes_floor=bytes_floor,
                products_floor=products_floor,
            )
        )
    return rows


def steps(machine: Machine, sizes: Sizes) -> list[Row]:
    """Measure a training step on images that are there already."""
    recipe = RECIPES["sop_resnet50"]()
    config = dataclasses.replace(
        recipe,
        device=machine.device,
        data=dataclasses.replace(recipe.data, batch_size=sizes.batch, image_size=sizes.image_size),
        model=dataclasses.replace(recipe.model, backbone=sizes.backbone, weights=None, dim=sizes.dim),
        optim=dataclasses.replace(recipe.optim, new_layers_epochs=0),  # whose steps leave the backbone out
    )
    class_sizes, none = np.full(sizes.train_classes, 5), np.empty(0, dtype=np.int32)
    split = Split(root="", sizes=class_sizes, shard_names=[], shards=none, row_groups=none)  # whose images nobody reads
    plan = ClassBalancedPlan(class_sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    work = Work(config, plan, split)
    images, labels_B = gpu_steps.images_of(work), plan.batch(0).labels
    labels = torch.from_numpy(labels_B).to(work.device)
    builders = gpu_steps.plain_builders(work, images, labels) | gpu_steps.our_builders(work, images, labels_B)
    names = ("plain bf16 nhwc", "plain bf16 nhwc compiled fused", "ours bf16 nhwc", "ours bf16 nhwc compiled")
    contestants = {name: builders[name]() for name in names if name in builders}
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=sizes.wide_dim))
    contestants |= gpu_steps.with_many_classes(Work(wide, plan, split), images, sizes.many_classes)
    seconds = gpu_steps.step_seconds(contestants, sizes.turns, work.device)
    flops = gpu_steps.step_flops(work, images, labels)
    peak = machine.bfloat16_peak
    return [
        row(
            f"{sizes.backbone} step, batch {sizes.batch}, {name}",
            each,
            on=machine.device,
            count=sizes.batch,
            unit="images",
            products_floor=flops / peak if peak and "bf16" in name else None,
        )
        for name, each in seconds.items()
    ]


def decoding(machine: Machine, sizes: Sizes) -> list[Row]:
    """Measure the decoding of JPEGs."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(sizes.jpegs):
        small = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((sizes.jpeg_edge, sizes.jpeg_edge), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
    seconds = gpu_steps.decode_seconds(encoded, sizes.turns, torch.device(machine.device))
    return [
        row(
            f"{name}, {sizes.jpegs} JPEGs of {sizes.jpeg_edge} px",
            each,
            on=machine.device if "GPU" in name else "cpu",
            count=sizes.jpegs,
            unit="images",
        )
        for name, each in seconds.items()
    ]


def searching(machine: Machine, sizes: Sizes) -> list[Row]:
    """Measure the exact search of one shard, vectors in memory."""
    import faiss

    with tempfile.TemporaryDirectory(prefix="nsl_dist_bench_") as location:
        gallery = search.write_vectors(location, sizes.vectors, sizes.dim)
        on_gpu = machine.device == "cuda" and faiss.get_num_gpus() > 0
        everything = range(sizes.vectors)
        shard = GalleryShard(
            gallery, everything, ("float",), use_gpu=on_gpu, shards_on_a_node=1, memory_bytes=4 * 2**30
        )
        block = shard.load()
        queries = gallery.read_all("vector", range(sizes.queries))
        seconds = []
        for _ in range(1 + sizes.turns):
            started = time.perf_counter()
            for start in range(0, sizes.queries, block):
                shard.search(queries[start : start + block], sizes.neighbours, "float")
            seconds.append(time.perf_counter() - started)
    products = 2 * sizes.queries * sizes.vectors * sizes.dim
    return [
        row(
            f"search, {sizes.neighbours:,} nearest of {sizes.vectors:,} x {sizes.dim}",
            seconds[1:],
            on=machine.device if on_gpu else "cpu: this faiss sees no GPU",
            count=sizes.queries,
            unit="queries",
            products_floor=products / machine.products["float32"] if on_gpu or machine.device == "cpu" else None,
        )
    ]


# Seconds that each part may take. With the tests' two minutes and the start they come to six minutes.
PARTS: dict[PartName, tuple[Part, int]] = {
    "proxies_on_device": (proxies_on_device, 70),
    "proxies_on_host": (proxies_on_host, 40),
    "steps": (steps, 180),  # two of them are compiled, by one core
    "decoding": (decoding, 25),
    "searching": (searching, 45),
}


def _answer(connection: Connection, part: Part, machine: Machine, sizes: Sizes) -> None:
    os.setpgid(0, 0)  # which takes the processes that it starts along
    try:
        connection.send(part(machine, sizes))
    except Exception as error:  # reported in the table; the trace goes to stderr
        connection.send(f"{type(error).__name__}: {error}")
        raise


def measure(part: Part, machine: Machine, sizes: Sizes, *, limit: float | None) -> list[Row] | str:
    """Run a part in a process of its own; return its rows, or what went wrong.

    Args:
        part: what to run.
        machine: the device and its rates.
        sizes: what is measured.
        limit: seconds after which it is given up; None: never.

    """
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, part, machine, sizes))
    process.start()
    sender.close()
    assert process.pid is not None
    try:
        if not receiver.poll(limit):
            return f"took longer than {limit:.0f} s"
        result: list[Row] | str = receiver.recv()
        return result
    except EOFError:
        process.join()
        return f"ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):  # it ended, and all that it had started
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def outcome_of_tests(junit: str) -> dict[str, Any]:
    """Return how many tests of a JUnit file passed, were skipped and failed, which failed, and why others did not run.

    A file that is missing or cut off has an "error".
    """
    try:
        suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    except (FileNotFoundError, ElementTree.ParseError) as error:
        return {"error": f"the tests did not come to an end: {error}"}
    cases = [case for suite in suites for case in suite.iter("testcase")]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [each for case in cases if (each := case.find("skipped")) is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "seconds": sum(float(suite.get("time", 0)) for suite in suites),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped_because": sorted({each.get("message", "") for each in skipped}),
    }


def machine_of(device: torch.device) -> Machine:
    """Measure the rates of a device."""
    precisions = ("float32",) if device.type == "cpu" else ("float32", "tf32", "bfloat16")
    rates = {precision: proxies.machine_rates(device, precision) for precision in precisions}
    copy, products = rates["float32"][0], {precision: rate for precision, (_, rate) in rates.items()}
    if device.type == "cpu":
        return Machine("cpu", copy, products, None, None)
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**28, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = gpu_steps.peak_flops(torch.cuda.get_device_name())
    return Machine("cuda", copy, products, peak, pinned.nbytes / min(seconds))


def circumstances(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _said_by("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def _said_by(*command: str) -> str | None:
    """Return what a program prints; None where it is missing or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def written(report: dict[str, Any]) -> str:
    """Return a report as text."""
    about = {name: each for name, each in report.items() if name not in ("rows", "failed_parts", "tests", "rates")}
    lines = ["  ".join(f"{name} {each}" for name, each in about.items()), ""]
    if report["rows"]:
        lines += [table(report["rows"])]
    lines += [f"failed: {part}: {error}" for part, error in report["failed_parts"].items()]
    if report["tests"] is not None:
        lines += ["", "tests: " + ", ".join(f"{name} {each}" for name, each in report["tests"].items())]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the report."""
    config = tyro.cli(BenchConfig, description=__doc__)
    if not config.tiny and not torch.cuda.is_available():
        raise ValueError("no CUDA device here; --tiny tries the job out on CPUs")
    started = time.monotonic()
    device = torch.device("cpu" if config.tiny else "cuda")
    machine, sizes = machine_of(device), TINY if config.tiny else Sizes()
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in config.parts:
        part, limit = PARTS[name]
        found = measure(part, machine, sizes, limit=None if config.tiny else limit)
        if isinstance(found, str):
            failed[name] = found
        else:
            rows += found
        print(f"{name}: {found if isinstance(found, str) else 'done'}", file=sys.stderr, flush=True)
    report = {
        **circumstances(device, config.commit),
        "rates": asdict(machine),
        "tests": outcome_of_tests(config.tests) if config.tests is not None else None,
        "rows": [asdict(each) for each in rows],
        "failed_parts": failed,
        "seconds": round(time.monotonic() - started, 1),
    }
    Path(config.report).write_text(json.dumps(report, indent=1) + "\n")
    show_results(f"\n{written(report)}", report)
    if failed or (report["tests"] is not None and report["tests"].get("failed") != 0):
        sys.exit(1)


if __name__ == "__main__":
    run_job(main, shows_results=True)

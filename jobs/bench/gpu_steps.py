"""Part `gpu` of jobs/bench/train.py: training steps on tensors in GPU memory, and JPEG decoding on the GPU."""

import dataclasses
import functools
import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from plain_training import Classifier, PlainStep, Work, settle, sgd
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nsl_dist.config import ProxyConfig
from nsl_dist.data.images import decode
from nsl_dist.data.transforms import Normalise
from nsl_dist.device import has_compiler
from nsl_dist.training.step import TrainingStep

Precision = Literal["float32", "bfloat16"]
# What our steps are compared with; on GPUs, their optimiser is fused.
TWINS = {
    "ours float32 nhwc": "plain float32 nhwc fused",
    "ours bf16 nhwc": "plain bf16 nhwc fused",
    "ours bf16 nhwc compiled": "plain bf16 nhwc compiled fused",
}
# Peak dense bfloat16 FLOP/s according to data sheets. The first key whose words are in the GPU's name applies.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12,
}  # fmt: skip


Step = Callable[[int], object]


def peak_flops(device_name: str) -> float | None:
    """Return the peak for dense bfloat16 products, FLOP/s; None: not known."""
    return next(
        (peak for name, peak in PEAKS.items() if re.search(rf"\b{name.replace(' ', '.*')}\b", device_name)), None
    )


def step_seconds(contestants: dict[str, Step], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of a step in each turn; a turn is of 10, one after the other without a pause."""
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
    return {name: each[1:] for name, each in seconds.items()}  # the first turn compiles


def images_of(work: Work) -> Tensor:
    """Return a batch of random images."""
    size = work.config.data.image_size
    return torch.randint(0, 256, (work.plan.batch_size, 3, size, size), dtype=torch.uint8, device=work.device)


def plain_builders(work: Work, images: Tensor, labels: Tensor) -> dict[str, Callable[[], Step]]:
    """Return what builds plain steps, by precision, memory format, compiler and optimiser."""

    def build(
        dtype: torch.dtype | None, memory_format: torch.memory_format, *, compiled: bool, fused: bool | None
    ) -> Step:
        classifier = Classifier(work.config, work.split.num_classes).to(work.device).train()
        classifier.model.to(memory_format=memory_format)
        forward = torch.compile(classifier) if compiled else classifier
        plain = PlainStep(forward, sgd(classifier, work.config, fused=fused), dtype, memory_format)
        return lambda _: plain.run(images, labels)

    builders: dict[str, Callable[[], Step]] = {}
    half, last, first = torch.bfloat16, torch.channels_last, torch.contiguous_format
    for dtype, memory_format, compiled, fused in (
        (None, first, False, False), (None, last, False, False), (None, last, False, True), (half, first, False, False),
        (half, last, False, False), (half, last, False, True), (half, last, True, False), (half, last, True, True),
    ):  # fmt: skip
        if compiled and not compiles(work):
            continue
        name = " ".join(
            ["plain", "bf16" if dtype else "float32", "nhwc" if memory_format is last else "nchw"]
            + ["compiled"] * compiled + ["fused"] * fused
        )  # fmt: skip
        builders[name] = functools.partial(build, dtype, memory_format, compiled=compiled, fused=fused or None)
    return builders


def compiles(work: Work) -> bool:
    """Return whether compiled contestants are measured; compiling for a CPU would take longer than the rest."""
    return work.device.type == "cuda" and has_compiler(work.device)


def our_builders(work: Work, images: Tensor, labels_B: NDArray[np.int64]) -> dict[str, Callable[[], Step]]:
    """Return what builds our steps, by precision and compiler."""

    def build(precision: Precision, *, compiled: bool) -> Step:
        config = dataclasses.replace(work.config, precision=precision)
        training = work.training_step(config, work.split.num_classes, compiled=compiled)
        return our_step(training, images, lambda _: labels_B)

    builders: dict[str, Callable[[], Step]] = {
        "ours float32 nhwc": lambda: build("float32", compiled=False),
        "ours bf16 nhwc": lambda: build("bfloat16", compiled=False),
    }
    if compiles(work):
        builders["ours bf16 nhwc compiled"] = lambda: build("bfloat16", compiled=True)
    return builders


def our_step(training: TrainingStep, images: Tensor, labels: Callable[[int], NDArray[np.int64]]) -> Step:
    """Return a step as the training loop does it: the next one's proxies are drawn while the device works."""

    def run(step: int) -> None:
        training.run(images, labels(step), step=step)
        training.proxies.prefetch(labels(step + 1), step=step + 1)

    return run


def step_without_loss(work: Work, images: Tensor) -> Step:
    """Return a step of the bfloat16 model alone, whose embeddings are given a gradient."""
    training = work.training_step(dataclasses.replace(work.config, precision="bfloat16"), work.split.num_classes)
    gradient = torch.randn(len(images), work.config.model.dim, device=work.device)
    network = nn.Sequential(Normalise().to(work.device), training.model)

    def run(_: int) -> None:
        assert training.optimizer is not None
        training.model.train()
        with torch.autocast(work.device.type, torch.bfloat16):
            embeddings = network(images.contiguous(memory_format=torch.channels_last))
        training.optimizer.zero_grad()
        torch.autograd.backward(embeddings, gradient)
        training.optimizer.step()

    return run


def with_many_classes(work: Work, images: Tensor, num_classes: int) -> dict[str, Step]:
    """Return our bfloat16 step with many classes, a tenth of them sampled, and the model's step alone."""
    proxies = ProxyConfig(sample_rate=0.1, temperature=work.config.proxies.temperature)
    many = dataclasses.replace(work.config, precision="bfloat16", proxies=proxies)
    many_classes = our_step(
        work.training_step(many, num_classes),
        images,
        lambda step: np.random.default_rng(step).integers(0, num_classes, len(images)),
    )
    return {"ours many classes": many_classes, "without loss": step_without_loss(work, images)}


def step_flops(work: Work, images: Tensor, labels: Tensor) -> int:
    """Return the floating-point operations of forward and backward."""
    classifier = Classifier(work.config, work.split.num_classes).to(work.device).train()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(classifier(images, labels))
    return int(counter.get_total_flops())


def time_steps(work: Work, turns: int, proxy_classes: int) -> tuple[dict[str, float], int]:
    """Return the median seconds of each step, and the FLOPs of forward and backward pass."""
    images, labels_B = images_of(work), work.plan.batch(0).labels
    labels = torch.from_numpy(labels_B).to(work.device)
    builders = plain_builders(work, images, labels) | our_builders(work, images, labels_B)
    contestants = {name: build() for name, build in builders.items()}
    contestants |= with_many_classes(work, images, proxy_classes)
    seconds = step_seconds(contestants, turns, work.device)
    return {name: statistics.median(each) for name, each in seconds.items()}, step_flops(work, images, labels)


def decode_seconds(encoded: list[bytes], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of decoding JPEGs in each turn, by one core and, where the device is one, by the GPU."""
    tensors = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in encoded]
    mode = torchvision.io.ImageReadMode.RGB
    contestants: dict[str, Callable[[], object]] = {"decode, one core": lambda: [decode(each) for each in encoded]}
    if device.type == "cuda":
        contestants["decode, GPU"] = lambda: torchvision.io.decode_jpeg(tensors, mode=mode, device=device)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _turn in range(1 + turns):
        for name, contestant in contestants.items():
            settle(device)
            started = time.perf_counter()
            contestant()
            settle(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: each[1:] for name, each in seconds.items()}


def jpegs_of(work: Work) -> list[bytes]:
    """Return the JPEGs of the first classes."""
    bags = [work.split.read_bag(label, ["image"])["image"] for label in range(min(32, work.split.num_classes))]
    encoded = [each.as_py() for bag in bags for each in bag]
    return [each for each in encoded if each.startswith(b"\xff\xd8")]


def synthetic_rate(_: int, work: Work, turns: int) -> tuple[float, int]:
    """Return images/s of our compiled step on images that are on the GPU, and the FLOPs of a step."""
    images, labels_B = images_of(work), work.plan.batch(0).labels
    training = work.training_step(work.config, work.split.num_classes, compiled=compiles(work))
    seconds = step_seconds({"ours": our_step(training, images, lambda _: labels_B)}, turns, work.device)["ours"]
    flops = step_flops(work, images, torch.from_numpy(labels_B).to(work.device))
    return len(images) / statistics.median(seconds), flops


def measure(_: int, work: Work, turns: int, proxy_classes: int) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    seconds, flops = time_steps(work, turns, proxy_classes)
    encoded = jpegs_of(work)
    decoded = decode_seconds(encoded, turns, work.device)
    peak = peak_flops(torch.cuda.get_device_name())
    rows: list[dict[str, Any]] = []
    for name, each in seconds.items():
        rows.append(
            {
                "step": name,
                "ms": 1000 * each,
                "images_per_second": work.plan.batch_size / each,
                "tflops": flops / each / 1e12,
                "utilisation": flops / each / peak if peak else "peak unknown",
                "ratio_to_plain": seconds[TWINS[name]] / each if name in TWINS else None,
                "added": each / seconds["without loss"] - 1 if name == "ours many classes" else None,
            }
        )
    return rows + [
        {"step": name, "images_per_second": len(encoded) / statistics.median(each)} for name, each in decoded.items()
    ]

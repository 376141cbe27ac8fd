"""Part `gpu` of jobs/bench/train.py: training steps on tensors in GPU memory, and JPEG decoding on the GPU."""

import dataclasses
import functools
import itertools
import re
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from plain_training import Classifier, PlainStep, Work, settle, sgd
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nsl_dist.config import ProxyConfig
from nsl_dist.data.transforms import decode, normalise
from nsl_dist.training.step import TrainingStep

PRECISIONS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
# Peak dense bfloat16 FLOP/s according to data sheets. The first key whose words are in the GPU's name applies.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12,
}  # fmt: skip


def median_seconds(
    contestants: dict[str, Callable[[int], object]], turns: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of a step; each turn runs 10 steps back to back."""
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
    """Return plain PyTorch steps by precision, memory format, compiler and optimiser."""
    contestants: dict[str, Callable[[int], object]] = {}
    config, device = work.config, work.device
    half, last, first = torch.bfloat16, torch.channels_last, torch.contiguous_format
    for dtype, memory_format, compiled, fused in (
        (None, first, False, False), (None, last, False, False), (half, first, False, False),
        (half, last, False, False), (half, last, False, True), (half, last, True, False), (half, last, True, True),
    ):  # fmt: skip
        if compiled and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            continue  # torch.compile needs a C compiler
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


def time_steps(work: Work, turns: int, proxy_classes: int) -> tuple[dict[str, float], int]:
    """Return the median seconds of each step, and the FLOPs of forward and backward pass."""
    config, device, batch_size = work.config, work.device, work.plan.batch_size
    size = config.data.image_size
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device)
    labels_B = work.plan.batch(0).labels
    contestants = plain_steps(work, images, torch.from_numpy(labels_B).to(device))

    # Like the training loop: sample the next step's proxies while the device is busy.
    def ours(training: TrainingStep, labels: Callable[[int], np.ndarray[Any, Any]], step: int) -> None:
        training.run(images, labels(step), step=step)
        training.proxies.prefetch(labels(step + 1), step=step + 1)

    single, half = (dataclasses.replace(config, precision=precision) for precision in PRECISIONS)
    for like, name in ((single, "ours float32 nhwc"), (half, "ours bf16 nhwc")):
        training = work.training_step(like, work.split.num_classes)
        contestants[name] = functools.partial(ours, training, lambda _: labels_B)

    many = dataclasses.replace(half, proxies=ProxyConfig(sample_rate=0.1, temperature=config.proxies.temperature))
    training = work.training_step(many, proxy_classes)
    contestants["ours many classes"] = functools.partial(
        ours, training, lambda step: np.random.default_rng(step).integers(0, proxy_classes, batch_size)
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
    return median_seconds(contestants, turns, device), int(counter.get_total_flops())


def decode_rates(work: Work, turns: int) -> dict[str, float]:
    """Return the number of JPEGs decoded per second by one core and by the GPU."""
    import torchvision

    bags = [work.split.read_bag(label, ["image"])["image"] for label in range(min(32, work.split.num_classes))]
    encoded = [each.as_py() for bag in bags for each in bag]
    encoded = [each for each in encoded if each.startswith(b"\xff\xd8")]
    tensors = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in encoded]
    mode = torchvision.io.ImageReadMode.RGB
    contestants: dict[str, Callable[[], object]] = {
        "decode, one core": lambda: [decode(each) for each in encoded],
        "decode, GPU": lambda: torchvision.io.decode_jpeg(tensors, mode=mode, device=work.device),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _turn in range(1 + turns):
        for name, contestant in contestants.items():
            settle(work.device)
            started = time.perf_counter()
            contestant()
            settle(work.device)
            seconds[name].append(time.perf_counter() - started)
    return {name: len(encoded) / statistics.median(each[1:]) for name, each in seconds.items()}


def measure(_: int, work: Work, turns: int, proxy_classes: int) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    seconds, flops = time_steps(work, turns, proxy_classes)
    decoded = decode_rates(work, turns)
    device = torch.cuda.get_device_name()
    peak = next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name.replace(' ', '.*')}\b", device)), None)
    rows: list[dict[str, Any]] = []
    for name, each in seconds.items():
        twin = seconds.get(name.replace("ours", "plain"), each)
        rows.append(
            {
                "step": name,
                "ms": 1000 * each,
                "images_per_second": work.plan.batch_size / each,
                "tflops": flops / each / 1e12,
                "utilisation": flops / each / peak if peak else "peak unknown",
                "ratio_to_plain": twin / each if twin != each else None,
                "added": each / seconds["without loss"] - 1 if name == "ours many classes" else None,
            }
        )
    return rows + [{"step": name, "images_per_second": rate} for name, rate in decoded.items()]

"""Precision, compiler and number of threads of a device."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the backbone's autocast type: bfloat16, or None for float32.

    Raises:
        ValueError: `precision` is bfloat16 but the GPU does not support it.

    """
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and device.type == "cuda" and not supported:
        raise ValueError(f"{torch.cuda.get_device_name(device)} does not support bfloat16; set --precision float32")
    wanted = precision == "bfloat16" or (precision == "auto" and supported)
    return torch.bfloat16 if wanted else None


def has_compiler(device: torch.device) -> bool:
    """Return whether this machine has the compiler that torch.compile calls: of C for GPUs, of C++ for CPUs."""
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    chosen = os.environ.get(variable)
    return any(map(shutil.which, [chosen] if chosen else names))


@contextmanager
def products_in(matmul: str, device: torch.device) -> Iterator[None]:
    """Round the inputs of products of float32 matrices to `matmul`, where the device can; sums stay float32.

    That is cuBLAS on GPUs, which knows float32 and tf32, and oneDNN on CPUs, which also knows bfloat16.
    """
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = {"float32": "ieee", "tf32": "tf32", "bfloat16": "bf16"}[matmul]
    try:
        yield
    finally:
        backend.fp32_precision = before


def use_cpu_threads(num_processes: int) -> None:
    """Divide this machine's cores among `num_processes`; Ray would give each process one thread."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))

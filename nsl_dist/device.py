"""What a device computes in, and with how many threads."""

import os

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what the backbone computes in: bfloat16, or None for float32.

    Raises:
        ValueError: bfloat16 is asked of a GPU that cannot compute in it.

    """
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and device.type == "cuda" and not supported:
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bfloat16; set --precision float32")
    wanted = precision == "bfloat16" or (precision == "auto" and supported)
    return torch.bfloat16 if wanted else None


def use_cpu_threads(num_processes: int) -> None:
    """Share this machine's cores between processes that compute on them; Ray would give each one thread."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))

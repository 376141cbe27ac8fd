"""What needs a CUDA device; runs without starting Ray.

    make gpu                                                    # these tests, then a table of benchmarks
    python -m pytest tests/gpu
    NSL_GPU_TESTS_DEVICE=cpu python -m pytest tests/gpu         # a dry run of the same code on CPUs

The dry run compares CPUs with themselves, uses gloo in place of NCCL, and searches without faiss's GPU index.
"""

import os
from collections.abc import Iterator

import pytest
import torch

import tests.support.interpreter  # noqa: F401


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where the tests run; products in full float32, so that they can be compared with the CPU's."""
    name = os.environ.get("NSL_GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield torch.device(name)
    matmul.allow_tf32, cudnn.allow_tf32 = before

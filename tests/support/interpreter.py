"""Imported before the kernels: without a GPU, Triton interprets them on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

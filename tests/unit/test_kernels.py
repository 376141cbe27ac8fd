"""The kernels of the proxies' step, interpreted on a CPU: against PyTorch's operations; and compiled for GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsl_dist.proxies.counter_random import round_to_bfloat16
from nsl_dist.proxies.optimizer import MapProducts
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import draw_classes
from tests.support.processes import ROOT
from tests.support.proxies import check_chunks, check_draws, check_loss_and_gradients, matrix_of

CPU = torch.device("cpu")
ANGULAR = {"margin_kind": "angular"}


def train(options: dict[str, Any], *, kernels: bool, num_classes: int, dim: int, batch: int) -> dict[str, torch.Tensor]:
    """Train for four steps; return losses, accuracies, gradients and the state at the end."""
    matrix = matrix_of(num_classes, dim, decay=1e-2, kernels=kernels, **options)
    found: dict[str, torch.Tensor] = {}
    for step in range(4):
        labels = np.random.default_rng(step).integers(0, num_classes, batch)
        generator = torch.Generator().manual_seed(step)
        embeddings, accuracy = torch.randn(batch, dim, generator=generator).requires_grad_(), torch.tensor(-1.0)
        loss = matrix.loss(embeddings, labels, step=step, lr=0.5, accuracy=accuracy)
        torch.autograd.backward(loss)
        assert embeddings.grad is not None
        found |= {f"loss {step}": loss.detach(), f"gradient {step}": embeddings.grad, f"accuracy {step}": accuracy}
        matrix.prefetch(np.random.default_rng(step + 1).integers(0, num_classes, batch), step=step + 1)
    return found | matrix.complete(step=4)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_sampled": 70}, {"num_sampled": 5}, {"num_sampled": 70, "optimizer": "adagrad"},
        {"num_sampled": 70, "correct_sampling": True, "label_smoothing": 0.1}, {"num_sampled": 70, "placement": "host"},
        {"num_sampled": 70, "placement": "disk"}, {"num_sampled": 70, "placement": "host", "memory": 1e-5},
        {"memory": 1e-5}, {"num_sampled": 70, "placement": "disk", "memory": 1e-5, "optimizer": "adagrad"},
        {"num_sampled": 70, "margin": 0.35, "filter_above": 0.3}, {"per_class": 3, "margin": 0.5, **ANGULAR},
        {"num_sampled": 70, "per_class": 2, "margin": 1.2, "label_smoothing": 0.1, "placement": "disk", **ANGULAR},
        {"num_sampled": 70, "per_class": 3, "placement": "host", "memory": 1e-5, "correct_sampling": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize(("num_classes", "dim", "batch"), [(203, 24, 13)])
def test_kernels_do_what_pytorch_does(
    options: dict[str, Any], num_classes: int, dim: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MapProducts, "STEPS_PER_BLOCK", 2)
    options = {"directory": str(tmp_path), **options}
    expected = train(options, kernels=False, num_classes=num_classes, dim=dim, batch=batch)
    found = train(options, kernels=True, num_classes=num_classes, dim=dim, batch=batch)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("num_classes", "dim", "batch"), [(40, 1, 1), (17, 5, 3), (300, 130, 33)])
def test_kernels_handle_odd_sizes(num_classes: int, dim: int, batch: int) -> None:
    sizes: dict[str, Any] = {"num_classes": num_classes, "dim": dim, "batch": batch}
    options = {"num_sampled": 15, "per_class": 1 + batch // 3 % 3}
    expected, found = (train(options, kernels=kernels, **sizes) for kernels in (False, True))
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_kernels_round_few_values_otherwise(optimizer: str) -> None:
    """A rounding error may turn a stochastic rounding of bfloat16 the other way, by 2^-8 of the value."""
    options = {"num_sampled": 70, "dtype": "bfloat16", "optimizer": optimizer}
    expected, found = (train(options, kernels=kernels, num_classes=203, dim=24, batch=13) for kernels in (False, True))
    different = found["weight"] != expected["weight"]
    assert different.float().mean() < 1e-3
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=2**-7, atol=0)


@pytest.mark.parametrize(("temperature", "num_classes"), [(0.05, 40), (1 / 64, 40), (1.0, 40)])
def test_kernels_follow_torchs_cross_entropy(temperature: float, num_classes: int) -> None:
    check_loss_and_gradients(temperature=temperature, device=CPU, kernels=True)


@pytest.mark.parametrize("options", [{"sample_rate": 1.0}, {"num_sampled": 40, "correct_sampling": True}])
def test_chunks_of_kernels_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_chunks(options, device=CPU, monkeypatch=monkeypatch, kernels=True)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_only_what_was_prefetched_comes_next(placement: str) -> None:
    matrix = matrix_of(100, 8, kernels=True, num_sampled=20, placement=placement)
    labels = np.arange(12)
    for step, other in ((1, labels), (0, labels[::-1])):
        for _ in range(2):  # the second takes the place of the first
            matrix.prefetch(labels, step=0)
        with pytest.raises(ValueError, match=f"step {step} is not what was prefetched, step 0, or has other labels"):
            matrix.loss(torch.randn(12, 8), other, step=step, lr=0.1)
    matrix.prefetch(labels, step=0)
    torch.autograd.backward(matrix.loss(torch.randn(12, 8), labels, step=0, lr=0.1))


def test_embeddings_of_any_type_and_layout() -> None:
    """In bfloat16, transposed, and at an odd address."""
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    odd = torch.empty(97)[1:].view(12, 8).copy_(values)
    expected = None
    for embeddings in (values.float(), values, values.float().T.contiguous().T, odd):
        matrix = matrix_of(100, 8, kernels=True, num_sampled=20)
        leaf = embeddings.detach().requires_grad_()
        loss = matrix.loss(leaf, np.arange(12), step=0, lr=0.1)
        torch.autograd.backward(loss)
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        expected = expected or (loss.detach(), leaf.grad)
        assert torch.equal(loss.detach(), expected[0])
        torch.testing.assert_close(leaf.grad.float(), expected[1], rtol=2**-8, atol=0)


def test_rows_are_those_that_a_cpu_draws() -> None:
    check_draws(CPU)


def test_rounding_has_the_bits_of_the_cpus() -> None:
    """Rows that only weight decay moves, by exactly known values."""
    from nsl_dist.proxies import kernels
    from nsl_dist.proxies.counter_random import stream_key

    rows, dim, first, lr, decay = torch.tensor([5, 0, 36]), 23, 1000, 0.125, 0.0625
    weight = torch.randn(40, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    velocity, expected = torch.zeros_like(weight), weight.clone()
    floats = torch.tensor([lr, 0.0, decay], dtype=torch.float64).view(torch.int64)
    update = torch.cat([torch.tensor([1, stream_key(3, 5), stream_key(3, 6)]), floats])
    none, maps = torch.zeros(len(rows) * dim), torch.eye(2, dtype=torch.float64)[:, :, None].contiguous()
    kernels.update_sgd_kernel[(3,)](
        weight, velocity, rows, torch.zeros(40, dtype=torch.int32), maps, maps, 1, 1, none, none,
        torch.ones(len(rows)), update, first, len(rows), dim, 20.0,
        CATCH_UP=False, PER_BLOCK=1024, STAGED=False, DP=32, RB=1,
    )  # fmt: skip
    step = decay * expected[rows].float()
    for table, values, stream in ((weight, expected[rows].float() - lr * step, 5), (velocity, step, 6)):
        rounded = round_to_bfloat16(values, rows + first, seed=3, stream=stream)
        assert torch.equal(table[rows], rounded)
    untouched = torch.ones(40, dtype=torch.bool).index_fill(0, rows, value=False)
    assert torch.equal(weight[untouched], expected[untouched])


def test_inputs_of_products_are_rounded() -> None:
    sizes: dict[str, Any] = {"num_classes": 203, "dim": 64, "batch": 13}
    exact, rounded = (
        train({"num_sampled": 70, "matmul": matmul}, kernels=True, **sizes) for matmul in ("float32", "bfloat16")
    )
    error = (rounded["gradient 0"] - exact["gradient 0"]).norm() / exact["gradient 0"].norm()
    assert 1e-4 < float(error) < 1e-2


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nsl_dist.proxies import kernels

POINTERS = {
    "sampling": "*i64", "update": "*i64", "rows": "*i64", "steps": "*i32", "within": "*fp64", "after": "*fp64"
}
table, unit, capability, per_class, angular = sys.argv[1:]
POINTERS |= dict.fromkeys(("weight", "velocity", "table", "values"), f"*{table}")
POINTERS |= dict.fromkeys(("unit", "queries", "grad_logits"), f"*{unit}")
INTEGERS = {"first", "padded", "num_steps", "num_blocks", "first_row"}
CONSTANTS = {
    "CATCH_UP": True, "STAGED": False, "PER_BLOCK": 1024, "BLOCK": 256, "BITS": 21, "SEARCH": 10, "BS": 32, "BB": 64,
    "TO_TABLE": True, "PER_CLASS": int(per_class), "ANGULAR": bool(int(angular)), **kernels.rows_at_once(24),
}
names = [name for name in vars(kernels) if name.endswith("_kernel")]
for name in names:
    kernel = getattr(kernels, name)
    types = {}
    for argument in kernel.arg_names:
        if argument in CONSTANTS:
            types[argument] = "constexpr"
        elif argument.isupper() or argument in INTEGERS:
            types[argument] = "i32"
        elif argument in ("scale", "shift", "smoothing", "margin", "most"):
            types[argument] = "fp32"
        else:
            types[argument] = POINTERS.get(argument, "*fp32")
    if name == "grad_logits_kernel":
        types["grad"] = POINTERS["unit"]
    constants = {(index,): CONSTANTS[each] for index, each in enumerate(kernel.arg_names) if each in CONSTANTS}
    triton.compile(ASTSource(kernel, types, constexprs=constants), target=GPUTarget("cuda", int(capability), 32))
print(len(names))
"""


@pytest.mark.parametrize("arguments", [("fp32", "fp32", "80", "1", "0"), ("bf16", "bf16", "90", "3", "1")])
def test_kernels_compile_for_gpus(arguments: tuple[str, ...], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "11\n", "")


def test_draws_do_not_depend_on_the_order_of_labels() -> None:
    labels = np.array([7, 3, 99, 3, 7, 50])
    one, other = (
        draw_classes(each, Partition(100), num_sampled=20, seed=(0, 1, 2)).rows(ascending=True)
        for each in (labels, labels[::-1])
    )
    assert np.array_equal(one, other)

"""Class proxies on a GPU, in every placement, against the CPU's answers."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsl_dist.proxies.counter_random import round_to_bfloat16, uniform_rows
from nsl_dist.proxies.matrix import ProxyMatrix
from nsl_dist.proxies.softmax import LOWEST_TEMPERATURE
from nsl_dist.proxies.table import Table
from nsl_dist.proxies.triton_step import TritonStep
from tests.support.proxies import (
    check_chunks,
    check_draws,
    check_embeddings_that_are_not_finite,
    check_loss_and_gradients,
    check_placements,
    errors_of_products,
    matrix_of,
    train_proxies,
)

NUM_CLASSES, DIM, STEPS = 300, 16, 30
OPTIMIZERS = ("sgd", "adagrad")
DTYPES = ("float32", "bfloat16")


def loss_and_gradient(matrix: ProxyMatrix) -> tuple[Tensor, Tensor]:
    """Return the loss of the proxies after training, and its gradient by the embeddings."""
    rng = np.random.default_rng(11)
    embeddings = torch.from_numpy(rng.normal(size=(24, DIM))).float().to(matrix.weight.device).requires_grad_()
    loss = matrix.loss(embeddings, rng.integers(0, NUM_CLASSES, 24), step=STEPS, lr=0.0)
    torch.autograd.backward(loss)
    assert embeddings.grad is not None
    return loss.detach().cpu(), embeddings.grad.cpu()


@pytest.mark.parametrize(
    ("placement", "dtype", "optimizer", "sample_rate"),
    itertools.product(("device", "host", "disk"), DTYPES, OPTIMIZERS, (1.0, 0.1)),
)
def test_proxies_train_as_on_the_cpu(
    placement: str, dtype: str, optimizer: str, sample_rate: float, device: torch.device, tmp_path: Path
) -> None:
    """Float32 differs by rounding errors alone: 1e-4 of what training changed.

    In bfloat16 an error may turn a stochastic rounding the other way, which changes a value by 2^-8 of itself. That
    happens to few of them: together they stay below 2^-8.
    """
    options: dict[str, Any] = {
        "dtype": dtype, "optimizer": optimizer, "sample_rate": sample_rate, "directory": str(tmp_path), "decay": 1e-3,
    }  # fmt: skip
    on_cpu = matrix_of(NUM_CLASSES, DIM, **options)
    on_device = matrix_of(NUM_CLASSES, DIM, placement=placement, device=device, kernels=True, **options)
    assert on_device.weight.device.type == device.type
    assert on_device.weight.values.device.type == (device.type if placement == "device" else "cpu")
    expected, ours = (train_proxies(matrix, steps=STEPS) for matrix in (on_cpu, on_device))

    assert ours.keys() == expected.keys()
    start = Table(range(NUM_CLASSES), DIM, dtype=on_cpu.weight.values.dtype, initial_bound=DIM**-0.5).values
    for name, theirs in expected.items():
        assert ours[name].dtype == theirs.dtype
        if name == "step":
            assert torch.equal(ours[name], theirs)
            continue
        changed = theirs.double() - (start.double() if name == "weight" else 0.0)
        assert float(changed.norm()) > 0
        bound = 1e-4 * changed.norm() if dtype == "float32" else 2**-8 * theirs.double().norm()
        assert float((ours[name].double() - theirs.double()).norm()) <= float(bound), name
    (expected_loss, expected_gradient), (loss, gradient) = map(loss_and_gradient, (on_cpu, on_device))
    rtol = 1e-4 if dtype == "float32" else 2**-8
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=0)
    assert float((gradient - expected_gradient).norm()) <= rtol * float(expected_gradient.norm())


def test_random_bits_do_not_depend_on_the_device(device: torch.device) -> None:
    rows = torch.arange(1000)
    values = uniform_rows(rows, 33, bound=2.0, seed=7)
    assert torch.equal(uniform_rows(rows.to(device), 33, bound=2.0, seed=7).cpu(), values)
    rounded = round_to_bfloat16(values, rows, seed=7, stream=5)
    assert torch.equal(round_to_bfloat16(values.to(device), rows.to(device), seed=7, stream=5).cpu(), rounded)


@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        {"margin": 0.35, "filter_above": 0.3},
        {"margin": 1.2, "margin_kind": "angular", "per_class": 3, "label_smoothing": 0.1},
    ],
)
def test_margins_and_several_proxies_as_on_the_cpu(
    options: dict[str, Any], sample_rate: float, device: torch.device
) -> None:
    """In one step: over many, a rounding error may make another of two equally near proxies the nearest."""
    found = []
    for where in (torch.device("cpu"), device):
        matrix = matrix_of(NUM_CLASSES, DIM, sample_rate=sample_rate, device=where, kernels=where == device, **options)
        loss, gradient = loss_and_gradient(matrix)
        found.append((loss, gradient, matrix.complete(step=STEPS + 1)["velocity"].cpu()))
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_placement_changes_nothing(optimizer: str, dtype: str, device: torch.device, tmp_path: Path) -> None:
    check_placements(optimizer, dtype, device=device, directory=tmp_path, kernels=True)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1 / 64, LOWEST_TEMPERATURE])
def test_loss_and_gradients_equal_torchs_cross_entropy(temperature: float, device: torch.device) -> None:
    check_loss_and_gradients(temperature=temperature, device=device, kernels=True)


@pytest.mark.parametrize(
    "options",
    [
        {"sample_rate": 1.0},
        {"num_sampled": 40},
        {"num_sampled": 40, "correct_sampling": True},
        {"num_sampled": 40, "per_class": 3, "margin": 0.5, "margin_kind": "angular", "filter_above": 0.4},
    ],
)
def test_chunks_change_nothing(options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    check_chunks(options, device=device, monkeypatch=monkeypatch, kernels=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_named(value: float, device: torch.device) -> None:
    check_embeddings_that_are_not_finite(value, device=device)


def test_rows_are_those_that_a_cpu_draws(device: torch.device) -> None:
    check_draws(device)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_a_recorded_step_equals_one_that_is_launched(placement: str, sample_rate: float, device: torch.device) -> None:
    """To the last bit; and so do steps of another shape between them."""
    options: dict[str, Any] = {"placement": placement, "sample_rate": sample_rate, "device": device, "kernels": True}
    recorded, launched = (matrix_of(NUM_CLASSES, DIM, **options) for _ in range(2))
    launched._recorder = None
    for step in range(12):
        batch = 16 if step != 6 else 8
        labels = np.random.default_rng((1, step)).integers(0, NUM_CLASSES, batch)
        embeddings = torch.randn(batch, DIM, generator=torch.Generator().manual_seed(step))
        results = []
        for matrix in (recorded, launched):
            leaf, accuracy = embeddings.to(device).requires_grad_(), torch.empty((), device=device)
            loss = matrix.loss(leaf, labels, step=step, lr=0.1, accuracy=accuracy)
            torch.autograd.backward(loss)
            results.append((loss.detach(), leaf.grad, accuracy))
        for one, other in zip(*results, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other), step
    states = [
        {name: each.clone() for name, each in matrix.complete(step=12).items()} for matrix in (recorded, launched)
    ]
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())
    if device.type == "cuda":
        assert recorded._recorder is not None
        assert recorded._recorder._recording is not None


def test_a_recorded_step_refuses_to_be_overtaken(device: torch.device) -> None:
    matrix = matrix_of(NUM_CLASSES, DIM, device=device, kernels=True, num_sampled=30)
    embeddings = torch.randn(16, DIM, device=device).requires_grad_()
    for step in range(4):
        torch.autograd.backward(matrix.loss(embeddings, np.arange(16), step=step, lr=0.1))
    first, second = (matrix.loss(embeddings, np.arange(16), step=step, lr=0.1) for step in (4, 5))
    if device.type == "cuda":
        with pytest.raises(RuntimeError, match="call loss and backward in turn, once each"):
            torch.autograd.backward(first)
    torch.autograd.backward(second)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_step_does_not_wait_for_the_device(placement: str, recorded: bool, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("CPUs have nothing to wait for")
    matrix = matrix_of(NUM_CLASSES, DIM, device=device, placement=placement, num_sampled=30)
    if not recorded:
        matrix._recorder = None
    embeddings = [torch.randn(16, DIM, device=device).requires_grad_() for _ in range(8)]
    labels = [np.random.default_rng(step).integers(0, NUM_CLASSES, 16) for step in range(9)]
    try:
        for step, leaf in enumerate(embeddings):
            torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")  # kernels are compiled by then
            torch.autograd.backward(matrix.loss(leaf, labels[step], step=step, lr=0.1))
            matrix.prefetch(labels[step + 1], step=step + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_few_kernels_are_launched(device: torch.device) -> None:
    """At most 15 for each further chunk and 30 for a step, all copies included."""
    if device.type == "cpu":
        pytest.skip("CPUs launch nothing")
    launches = []
    for memory in (1.0, 2e-4):
        matrix = matrix_of(20_000, 64, device=device, num_sampled=2000, memory=memory)
        embeddings = torch.randn(16, 64, device=device).requires_grad_()
        for step in range(4):
            torch.autograd.backward(matrix.loss(embeddings, np.arange(16), step=step, lr=0.1))
        sampled = matrix._sample(np.arange(16), step=4)
        assert isinstance(sampled, TritonStep)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            torch.autograd.backward(matrix.loss(embeddings, np.arange(16), step=4, lr=0.1))
            torch.cuda.synchronize()
        events = [each for each in profiler.events() if each.device_type.name == "CUDA"]
        launches.append((len(sampled.chunks), len(events)))
    (one, few), (several, many) = launches
    assert one == 1
    assert several > 3
    assert few <= 30, launches
    assert (many - few) / (several - one) <= 15, launches


# Errors of loss, gradient of the embeddings and what 200 steps changed, against float64.
BOUNDS = {"float32": (1e-5, 1e-4, 1e-4), "tf32": (3e-3, 1e-2, 1e-2), "bfloat16": (2e-2, 5e-2, 5e-2)}


@pytest.mark.parametrize("matmul", BOUNDS)
def test_precision_of_the_products(matmul: str, device: torch.device) -> None:
    errors = errors_of_products(matmul, device=device, steps=200 if device.type == "cuda" else 5)
    print(f"{matmul}: errors of loss {errors[0]:.1e}, gradient {errors[1]:.1e}, trajectory {errors[2]:.1e}")
    assert all(error <= bound for error, bound in zip(errors, BOUNDS[matmul], strict=True)), errors


def test_loss_is_float32_under_autocast(device: torch.device) -> None:
    results = []
    for enabled in (False, True):
        matrix = matrix_of(NUM_CLASSES, DIM, device=device)
        embeddings = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            loss = matrix.loss(embeddings, np.arange(4), step=0, lr=0.1)
            torch.autograd.backward(loss)
        assert embeddings.grad is not None
        assert loss.dtype == embeddings.grad.dtype == torch.float32
        results.append((loss.detach(), embeddings.grad, F.normalize(matrix.weight.values)))
    for plain, autocast in zip(*results, strict=True):
        torch.testing.assert_close(autocast, plain, rtol=1e-6, atol=1e-6)

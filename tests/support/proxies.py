"""Class proxies of one worker, and what must hold for them on every device."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsl_dist.config import ProxyConfig
from nsl_dist.proxies import torch_step
from nsl_dist.proxies.matrix import ProxyMatrix
from nsl_dist.proxies.optimizer import DeferredSGD
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import draw_classes


def matrix_of(
    num_classes: int,
    dim: int,
    *,
    momentum: float = 0.9,
    decay: float = 0.0,
    device: torch.device | str = "cpu",
    kernels: bool = False,
    **options: Any,
) -> ProxyMatrix:
    config = ProxyConfig(**{"matmul": "float32"} | options)
    matrix = ProxyMatrix(Partition(num_classes), dim, config, device=device, kernels=kernels)
    matrix.start_optimizer(momentum=momentum, weight_decay=decay, step=0)
    return matrix


def train_proxies(
    matrix: ProxyMatrix, *, steps: int, first: int = 0, stop: int | None = None, lr: float = 0.05, batch: int = 16
) -> dict[str, torch.Tensor]:
    """Move the proxies by real losses on noisy embeddings of their classes; return the state, complete at the end."""
    rng = np.random.default_rng(5)
    num_classes, dim = matrix.partition.num_classes, matrix.weight.values.shape[1]
    centres = rng.normal(size=(num_classes, dim))
    for step in range(stop or steps):
        labels = np.random.default_rng((6, step)).integers(0, num_classes, batch)
        noisy = torch.from_numpy(centres[labels] + 0.5 * rng.normal(size=(batch, dim))).float()
        if step < first:
            continue
        embeddings = noisy.to(matrix.weight.device).requires_grad_()
        warm = min(1.0, (step + 1) / 20) * (1.0 if step < steps // 2 else 0.1)
        torch.autograd.backward(matrix.loss(embeddings, labels, step=step, lr=lr * warm))
        matrix.prefetch(np.random.default_rng((6, step + 1)).integers(0, num_classes, batch), step=step + 1)
    state = matrix.complete(step=steps) if stop is None else matrix.state()
    return {name: table.cpu().clone() for name, table in state.items()}


def check_loss_and_gradients(*, temperature: float, device: torch.device, kernels: bool = False) -> None:
    """Loss and gradients equal those of torch's dense cross-entropy in float64."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    labels = torch.arange(12)
    matrix = matrix_of(40, 16, momentum=0.0, temperature=max(temperature, 0.0137), device=device, kernels=kernels)
    matrix.weight.values[0] = -embeddings[0].float()  # the widest span of logits
    before = matrix.weight.values.clone()

    dense = [embeddings.clone().requires_grad_(), before.cpu().double().requires_grad_()]
    expected = F.cross_entropy(F.normalize(dense[0]) @ F.normalize(dense[1]).T / matrix.config.temperature, labels)
    torch.autograd.backward(expected)
    ours = embeddings.float().to(device).requires_grad_()
    loss = matrix.loss(ours, labels.numpy(), step=0, lr=1.0)
    torch.autograd.backward(loss)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=0)
    # Without momentum, the velocity is the gradient.
    assert isinstance(matrix.optimizer, DeferredSGD)
    velocity = matrix.optimizer.velocity.values
    for mine, exact in ((ours.grad, dense[0].grad), (velocity, dense[1].grad)):
        assert mine is not None
        assert exact is not None
        torch.testing.assert_close(mine.cpu().double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    torch.testing.assert_close(matrix.weight.values, before - velocity)


def errors_of_products(
    matmul: str, *, device: torch.device, steps: int, num_classes: int = 2000, dim: int = 128, batch: int = 64
) -> tuple[float, float, float]:
    """Train beside a dense float64 matrix on all classes; return the largest errors of any step, and that of the end.

    The error of the loss, relative where it is above 1, and the relative one of the gradient of the embeddings are
    against the float64 answers for the same proxies; the last is the relative error of what the training changed.
    """
    matrix = matrix_of(num_classes, dim, decay=1e-4, device=device, kernels=True, matmul=matmul)
    start = matrix.weight.values.double()
    dense = start.clone().requires_grad_()
    reference = torch.optim.SGD([dense], lr=1.0, momentum=0.9, weight_decay=1e-4)
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(num_classes, dim))
    errors_of_loss, errors_of_gradient = [], []
    for step in range(steps):
        labels = rng.integers(0, num_classes, batch)
        embeddings = torch.from_numpy(centres[labels] + 0.5 * rng.normal(size=(batch, dim))).float().to(device)
        targets = torch.from_numpy(labels).to(device)

        def exact_loss(leaf: torch.Tensor, proxies: torch.Tensor, targets: torch.Tensor = targets) -> torch.Tensor:
            return F.cross_entropy(F.normalize(leaf) @ F.normalize(proxies).T / 0.05, targets)

        same = embeddings.double().requires_grad_()
        expected = exact_loss(same, matrix.weight.values.double())
        torch.autograd.backward(expected)
        ours = embeddings.clone().requires_grad_()
        loss = matrix.loss(ours, labels, step=step, lr=0.05)
        torch.autograd.backward(loss)
        reference.param_groups[0]["lr"] = 0.05
        reference.zero_grad()
        torch.autograd.backward(exact_loss(embeddings.double(), dense))
        reference.step()
        assert ours.grad is not None
        assert same.grad is not None
        errors_of_loss.append(float((loss.detach() - expected.detach()).abs() / expected.detach().clamp_min(1.0)))
        errors_of_gradient.append(float((ours.grad - same.grad).norm() / same.grad.norm()))
    moved = matrix.complete(step=steps)["weight"].double() - start
    exact = dense.detach() - start
    return max(errors_of_loss), max(errors_of_gradient), float((moved - exact).norm() / exact.norm())


def check_draws(device: torch.device) -> None:
    """A device draws the rows that a CPU draws, in the same order; labels repeat, and belong to other workers."""
    from nsl_dist.proxies.triton_step import TritonStep

    rng = np.random.default_rng(0)
    for num_classes, num_sampled, batch in (
        (1000, 100, 24),
        (97, 30, 13),
        (70_000, 5000, 64),
        (20, 19, 3),
        (64, 1, 40),
    ):
        for step, rank in itertools.product((0, 7), (0, 2)):
            config = ProxyConfig(num_sampled=num_sampled)
            matrix = ProxyMatrix(Partition(num_classes, rank, 3), 4, config, device=device, kernels=True, seed=5)
            matrix.start_optimizer(momentum=0.9, weight_decay=0.0, step=0)
            labels = rng.integers(0, num_classes, batch)
            sampled = matrix._sample(labels, step=step)
            assert isinstance(sampled, TritonStep)
            draw = draw_classes(labels, matrix.partition, num_sampled=matrix.num_sampled, seed=(5, step, rank))
            expected = np.arange(draw.num_rows) if draw.everything else draw.rows(ascending=False)
            assert sampled.rows_R.tolist() == expected.tolist()


def check_chunks(
    options: dict[str, Any], *, device: torch.device, monkeypatch: pytest.MonkeyPatch, kernels: bool = False
) -> None:
    """The same results in one chunk, in many kept ones, and in many that are computed twice for lack of memory."""
    results = []
    for chunk_bytes, memory in ((2**30, 1.0), (1000, 1.0), (1000, 2e-6)):
        monkeypatch.setattr(torch_step, "CHUNK_BYTES", chunk_bytes)
        matrix = matrix_of(100, 8, decay=1e-3, memory=memory, device=device, kernels=kernels, **options)
        rng = np.random.default_rng(0)
        for step in range(5):
            embeddings = torch.from_numpy(rng.normal(size=(12, 8))).float().to(device).requires_grad_()
            labels = rng.integers(0, 100, 12)
            matrix.prefetch(labels, step=step)
            sampled = matrix._prefetched[1] if matrix._prefetched else matrix._sample(labels, step=step)
            assert sampled.keep == (memory == 1.0)
            if isinstance(sampled, torch_step.TorchStep) or memory < 1:
                assert (len(sampled.chunks) > 1) == (chunk_bytes == 1000)
            torch.autograd.backward(matrix.loss(embeddings, labels, step=step, lr=0.1))
        assert embeddings.grad is not None
        state = matrix.complete(step=5)
        results.append((embeddings.grad.cpu(), state["weight"].cpu(), state["velocity"].cpu()))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def check_embeddings_that_are_not_finite(value: float, *, device: torch.device) -> None:
    """They are reported, on a GPU one step later, before the proxies are touched."""
    matrix = matrix_of(6, 8, device=device)
    before = matrix.weight.values.clone()
    embeddings = torch.randn(4, 8, device=device)
    embeddings[2, 3] = value
    if device.type == "cuda":
        matrix.loss(embeddings, np.arange(4), step=7, lr=0.1)
    message = r"step 7: embeddings are nan or infinite: 1 of the 4 of worker 0; start another run"
    with pytest.raises(FloatingPointError, match=message):
        matrix.loss(embeddings, np.arange(4), step=7, lr=0.1)
    assert torch.equal(matrix.weight.values, before)


def check_placements(
    optimizer: str, dtype: str, *, device: torch.device, directory: Path, kernels: bool = False
) -> None:
    """Proxies in host memory and on disk move as those on the device, to the last bit."""
    options: dict[str, Any] = {
        "optimizer": optimizer, "dtype": dtype, "num_sampled": 30, "device": device, "kernels": kernels,
    }  # fmt: skip
    expected = train_proxies(matrix_of(300, 12, **options), steps=30)
    for placement in ("host", "disk"):
        matrix = matrix_of(300, 12, placement=placement, directory=str(directory), **options)
        assert matrix.weight.values.device.type == "cpu"
        state = train_proxies(matrix, steps=30)
        assert all(torch.equal(state[name], expected[name]) for name in expected), placement
    assert not list(directory.iterdir()), "the file has no name that could be left behind"

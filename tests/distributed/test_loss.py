"""The partitioned, sampled loss and its updates against the one-process dense answer."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nsl_dist.config import ProxyConfig
from nsl_dist.proxies.matrix import ProxyMatrix
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import draw_classes
from nsl_dist.proxies.table import Table
from tests.support.ranks import Ranks

DIM, BATCH, TEMPERATURE = 16, 24, 0.05
CASES: list[tuple[int, float, int, dict[str, Any]]] = [
    (num_classes, sample_rate, step, {})
    for num_classes in (97, 48, 3)  # 3: more workers than classes leaves empty partitions
    for sample_rate in (1.0, 0.1)
    for step in (0, 1)
]
CASES += [(97, 0.1, 0, {"memory": 1e-6}), (97, 0.4, 0, {"correct_sampling": True})]
CASES += [
    (num_classes, sample_rate, 0, {"label_smoothing": 0.1} | options)
    for num_classes, sample_rate, options in ((97, 1.0, {}), (3, 1.0, {}), (97, 0.4, {"correct_sampling": True}))
]
EVERYTHING = {
    "margin": 1.2, "margin_kind": "angular", "per_class": 3, "filter_above": 0.2, "label_smoothing": 0.1
}  # fmt: skip
CASES += [
    (97, sample_rate, 0, options)
    for sample_rate in (1.0, 0.1)
    for options in (
        {"margin": 0.35},
        {"margin": 0.5, "margin_kind": "angular"},
        {"per_class": 3},
        {"filter_above": 0.2},
        EVERYTHING,
    )
]
CASES += [(3, 1.0, 0, EVERYTHING), (97, 0.4, 0, EVERYTHING | {"correct_sampling": True, "memory": 1e-6})]


def batch_of(num_classes: int, step: int) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng((num_classes, step))
    return torch.from_numpy(rng.normal(size=(BATCH, DIM))), rng.integers(0, num_classes, BATCH)


def initial_proxies(num_rows: int) -> torch.Tensor:
    return Table(range(num_rows), DIM, initial_bound=DIM**-0.5).values.double()


def sampled_classes(labels: np.ndarray, num_classes: int, sample_rate: float, step: int, world_size: int) -> np.ndarray:
    """The classes that all workers draw together, by the rule that each draws its own part with."""
    drawn = []
    for rank in range(world_size):
        part = Partition(num_classes, rank, world_size)
        num_sampled = int(np.ceil(sample_rate * part.num_rows))
        drawn.append(
            part.start + draw_classes(labels, part, num_sampled=num_sampled, seed=(0, step, rank)).rows(ascending=True)
        )
    return np.concatenate(drawn)


def log_multiplicities(classes: np.ndarray, labels: np.ndarray, num_classes: int, world_size: int) -> torch.Tensor:
    """What the correction adds to the logits: log((C - P) / (n - P)) of each worker for its negatives (paper)."""
    added = np.zeros(len(classes))
    for rank in range(world_size):
        part = Partition(num_classes, rank, world_size)
        negative = (classes >= part.start) & (classes < part.stop) & ~np.isin(classes, labels)
        num_positives = len({label for label in labels.tolist() if part.start <= label < part.stop})
        added[negative] = np.log((part.num_rows - num_positives) / max(1, negative.sum()))
    return torch.from_numpy(added)


def dense_loss(
    embeddings: torch.Tensor,
    proxies: torch.Tensor,
    labels: np.ndarray,
    classes: np.ndarray,
    added: torch.Tensor,
    options: dict[str, Any] | None = None,
) -> torch.Tensor:
    options = options or {}
    proxies = proxies.unflatten(0, (-1, options.get("per_class", 1)))[classes]
    cosines = torch.einsum("bd,ckd->bck", F.normalize(embeddings), F.normalize(proxies, dim=2)).amax(dim=2)
    column = {label: place for place, label in enumerate(classes.tolist())}
    targets = torch.tensor([column[label] for label in labels.tolist()])
    own = F.one_hot(targets, len(classes)).bool()
    counted = own | (cosines <= options.get("filter_above", 1.0))
    margin = options.get("margin", 0.0)
    nearer = cosines - margin
    if options.get("margin_kind") == "angular":
        angles = cosines.arccos() + margin
        nearer = torch.where(angles < np.pi, angles.cos(), cosines - margin * np.sin(margin))
    logits = torch.where(own, nearer, cosines) / TEMPERATURE
    smoothing = options.get("label_smoothing", 0.0)
    if len(added) == 1 and counted.all():
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    # PyTorch's own smoothing would take what is added for part of the logits.
    added = added.where(counted, -torch.inf)
    mean = (logits * added.softmax(dim=1)).sum(dim=1)
    wanted = (1 - smoothing) * logits.gather(1, targets[:, None])[:, 0] + smoothing * mean
    return ((logits + added).logsumexp(dim=1) - wanted).mean()


def matrix_of(
    part: Partition,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    kernels: bool = False,
    **options: Any,
) -> ProxyMatrix:
    group = dist.group.WORLD if part.world_size > 1 else None
    matrix = ProxyMatrix(part, DIM, ProxyConfig(temperature=TEMPERATURE, **options), group=group, kernels=kernels)
    matrix.start_optimizer(momentum=momentum, weight_decay=weight_decay, step=0)
    return matrix


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def check_loss(rank: int, world_size: int, *, kernels: bool = False) -> None:
    for num_classes, sample_rate, step, options in CASES:
        if kernels and step > 0:  # interpreting them takes its time
            continue
        embeddings, labels = batch_of(num_classes, step)
        part = Partition(num_classes, rank, world_size)

        per_class = options.get("per_class", 1)
        dense_proxies = initial_proxies(num_classes * per_class).requires_grad_()
        if "margin" in options:  # also where angle and margin exceed 180 degrees
            own = dense_proxies.detach()[labels[0] * per_class : (labels[0] + 1) * per_class]
            embeddings[0] = 0.05 * embeddings[0] - own.sum(dim=0)
        dense_embeddings = embeddings.clone().requires_grad_()
        classes = sampled_classes(labels, num_classes, sample_rate, step, world_size)
        added = log_multiplicities(classes, labels, num_classes, world_size)
        added = added if "correct_sampling" in options else torch.zeros(1)
        exact = dense_loss(dense_embeddings, dense_proxies, labels, classes, added, options)
        exact.backward()

        matrix = matrix_of(part, sample_rate=sample_rate, kernels=kernels, **options)
        before = matrix.weight.values.clone()
        mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        local = embeddings[mine].float().requires_grad_()
        loss = matrix.loss(local, labels, step=step, lr=1.0)
        loss.backward()
        assert relative_error(loss.detach(), exact.detach()) < 1e-5
        assert local.grad is not None
        assert dense_embeddings.grad is not None
        assert dense_proxies.grad is not None
        # The gradient of a worker's embeddings is scaled for DDP, which averages over workers.
        assert relative_error(local.grad / world_size, dense_embeddings.grad[mine]) < 1e-5
        exact_grad = dense_proxies.grad[part.start * per_class : part.stop * per_class]
        velocity = matrix.complete(step=step + 1)["velocity"]  # of the first step: the gradient
        if part.num_rows and exact_grad.norm() > 0:
            assert relative_error(velocity, exact_grad) < 1e-5
            torch.testing.assert_close(matrix.weight.values, before - velocity)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_partitioned_loss_equals_dense(ranks: Ranks, world_size: int) -> None:
    ranks.run(check_loss, world_size)


def check_loss_by_kernels(rank: int, world_size: int) -> None:
    check_loss(rank, world_size, kernels=True)


def test_partitioned_loss_by_kernels_equals_dense(ranks: Ranks) -> None:
    ranks.run(check_loss_by_kernels, 3)


def check_trajectory(rank: int, world_size: int, num_classes: int) -> None:
    """200 steps under warm-up and a step of the learning rate, each embedding pulled towards its class."""
    dense = initial_proxies(num_classes).requires_grad_()
    reference = torch.optim.SGD([dense], lr=1.0, momentum=0.9, weight_decay=1e-3)
    part = Partition(num_classes, rank, world_size)
    matrix = matrix_of(part, weight_decay=1e-3, sample_rate=0.1)
    accuracies: list[float] = []
    centres = np.random.default_rng(1).normal(size=(num_classes, DIM))
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for step in range(200):
        lr = 0.05 * min(1.0, (step + 1) / 20) * (1.0 if step < 120 else 0.1)
        noise, labels = batch_of(num_classes, step)
        embeddings = torch.from_numpy(centres[labels]) + 0.5 * noise
        classes = sampled_classes(labels, num_classes, 0.1, step, world_size)
        exact = dense_loss(embeddings, dense, labels, classes, torch.zeros(1))
        nearest = classes[(embeddings @ F.normalize(dense.detach()[classes]).T).argmax(dim=1)]
        reference.zero_grad(set_to_none=False)
        exact.backward()
        reference.param_groups[0]["lr"] = lr
        reference.step()
        accuracy = torch.tensor(-1.0) if step % 3 == 0 else None
        loss = matrix.loss(embeddings[mine].float().requires_grad_(), labels, step=step, lr=lr, accuracy=accuracy)
        loss.backward()
        if accuracy is not None:
            assert accuracy.item() == pytest.approx((nearest == labels).mean()), step
            accuracies.append(accuracy.item())
        assert abs(loss.item() - exact.item()) < 1e-6 / TEMPERATURE, step  # float32 at logits of up to 1 / temperature
    assert min(accuracies) < 0.2 < 0.8 < max(accuracies)
    state = matrix.complete(step=200)
    assert relative_error(state["weight"], dense.detach()[part.start : part.stop]) < 1e-5
    velocity = reference.state[dense]["momentum_buffer"][part.start : part.stop]
    assert relative_error(state["velocity"], velocity) < 1e-5


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sampled_training_follows_dense_sgd(ranks: Ranks, world_size: int) -> None:
    ranks.run(check_trajectory, world_size, 400)


def check_a_rank_without_images(rank: int, world_size: int) -> None:
    """All images are of the first worker's classes; the others have negatives only, and the last no class at all."""
    part = Partition(9, rank, world_size)  # 3, 3, 3 and 0 classes
    embeddings, _ = batch_of(9, 0)
    labels = np.arange(BATCH) % 3
    dense = initial_proxies(9).requires_grad_()
    exact = dense_loss(embeddings, dense, labels, np.arange(9), torch.zeros(1))
    exact.backward()
    matrix = matrix_of(part, momentum=0.0)
    local = embeddings[rank * 6 : rank * 6 + 6].float().requires_grad_()
    loss = matrix.loss(local, labels, step=0, lr=0.1)
    loss.backward()
    assert relative_error(loss.detach(), exact.detach()) < 1e-5
    velocity = matrix.complete(step=1)["velocity"]
    assert velocity.shape == (3 if rank < 3 else 0, DIM)
    if rank < 3:
        assert dense.grad is not None
        assert relative_error(velocity, dense.grad[part.start : part.stop]) < 1e-5


def test_ranks_without_images_and_without_classes(ranks: Ranks) -> None:
    ranks.run(check_a_rank_without_images, 4)


def check_nan(rank: int, world_size: int) -> None:
    """Every worker says whose embeddings are bad, and none has changed its proxies."""
    matrix = matrix_of(Partition(10, rank, world_size))
    before = matrix.weight.values.clone()
    embeddings = torch.randn(4, DIM)
    if rank == 1:
        embeddings[2:] = float("nan")
    message = (
        "step 5: embeddings are nan or infinite: 2 of the 4 of worker 1; start another run with a lower --optim.lr"
    )
    with pytest.raises(FloatingPointError, match=message):
        matrix.loss(embeddings, np.arange(4 * world_size) % 10, step=5, lr=0.1)
    assert torch.equal(matrix.weight.values, before)


def test_nan_embeddings_are_named_by_every_worker(ranks: Ranks) -> None:
    ranks.run(check_nan, 3)

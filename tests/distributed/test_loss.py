"""The partitioned, sampled loss and its updates against the one-process dense answer."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nsl_dist.proxies.matrix import ProxyMatrix, initial_rows
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import sample_rows
from tests.distributed.workers import run

DIM, BATCH, TEMPERATURE = 16, 24, 0.05
CASES = [
    (num_classes, sample_rate, step)
    for num_classes in (97, 48, 3)  # 3: more workers than classes leaves empty partitions
    for sample_rate in (1.0, 0.1)
    for step in (0, 1)
]


def batch_of(num_classes: int, step: int) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng((num_classes, step))
    return torch.from_numpy(rng.normal(size=(BATCH, DIM))), rng.integers(0, num_classes, BATCH)


def sampled_classes(labels: np.ndarray, num_classes: int, sample_rate: float, step: int, world_size: int) -> np.ndarray:
    """The classes that all workers draw together, by the rule that each draws its own part with."""
    drawn = []
    for rank in range(world_size):
        part = Partition(num_classes, rank, world_size)
        mine = labels[(labels >= part.start) & (labels < part.stop)] - part.start
        rng = np.random.default_rng((0, step, 2 + rank))
        drawn.append(part.start + sample_rows(mine, num_rows=part.num_rows, sample_rate=sample_rate, rng=rng))
    return np.concatenate(drawn)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def check_loss(rank: int, world_size: int) -> None:
    for num_classes, sample_rate, step in CASES:
        embeddings, labels = batch_of(num_classes, step)
        part = Partition(num_classes, rank, world_size)

        dense_embeddings = embeddings.clone().requires_grad_()
        dense_proxies = initial_rows(Partition(num_classes), DIM, seed=0).double().requires_grad_()
        classes = sampled_classes(labels, num_classes, sample_rate, step, world_size)
        logits = F.normalize(dense_embeddings) @ F.normalize(dense_proxies[classes]).T / TEMPERATURE
        column = {label: place for place, label in enumerate(classes.tolist())}
        exact = F.cross_entropy(logits, torch.tensor([column[label] for label in labels.tolist()]))
        exact.backward()

        group = dist.group.WORLD if world_size > 1 else None
        matrix = ProxyMatrix(part, DIM, seed=0, temperature=TEMPERATURE, sample_rate=sample_rate, group=group)
        matrix.start_optimizer(momentum=0.9, weight_decay=0.0)
        mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        local = embeddings[mine].float().requires_grad_()
        loss = matrix.loss(local, labels, step=step)
        loss.backward()
        assert relative_error(loss.detach(), exact.detach()) < 1e-5
        # The gradient of a worker's embeddings is scaled for DDP, which averages over workers.
        assert relative_error(local.grad / world_size, dense_embeddings.grad[mine]) < 1e-5

        before = matrix.weight_CD.clone()
        matrix.step(lr=1.0)
        exact_grad = dense_proxies.grad[part.start : part.stop]
        if part.num_rows and exact_grad.norm() > 0:
            assert relative_error(matrix.optimizer.velocity_CD, exact_grad) < 1e-5
            torch.testing.assert_close(matrix.weight_CD, before - matrix.optimizer.velocity_CD)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_partitioned_loss_equals_dense(world_size: int) -> None:
    run(check_loss, world_size)

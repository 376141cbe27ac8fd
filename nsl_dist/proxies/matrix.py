"""One worker's part of the class-proxy matrix: its rows, their sampling, loss and update in one place."""

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nsl_dist.proxies.optimizer import DeferredSGD
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import sample_rows
from nsl_dist.proxies.softmax import normalized_softmax_loss

ROWS_PER_SEED = 4096


def initial_rows(partition: Partition, dim: int, *, seed: int) -> Tensor:
    """Draw a partition's rows from U(-1/sqrt(D), 1/sqrt(D)) (paper, section 4.1), the same for any number of workers.

    Returns:
        float32 `[partition.num_rows, dim]`.

    """
    rows_CD = torch.empty(partition.num_rows, dim)
    bound = dim**-0.5
    for block in range(partition.start // ROWS_PER_SEED, -(-partition.stop // ROWS_PER_SEED)):
        block_seed = int(np.random.SeedSequence((seed, block)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(block_seed)
        first, last = block * ROWS_PER_SEED, (block + 1) * ROWS_PER_SEED
        start, stop = max(first, partition.start), min(last, partition.stop)
        drawn = torch.empty(ROWS_PER_SEED, dim).uniform_(-bound, bound, generator=generator)
        rows_CD[start - partition.start : stop - partition.start] = drawn[start - first : stop - first]
    return rows_CD


class ProxyMatrix:
    """This worker's part of the class-proxy matrix, its optimiser and the loss against it.

    Use, once a step and in this order: `loss`, `backward()` on what it returns, `step`.
    """

    def __init__(
        self,
        partition: Partition,
        dim: int,
        *,
        seed: int,
        temperature: float,
        sample_rate: float,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.partition = partition
        self.seed = seed
        self.temperature = temperature
        self.sample_rate = sample_rate
        self.group = group
        self.weight_CD = initial_rows(partition, dim, seed=seed).to(device)
        self.optimizer: DeferredSGD | None = None

    def start_optimizer(self, *, momentum: float, weight_decay: float) -> None:
        """Begin with a fresh optimiser, all rows first brought up to date with the one before."""
        if self.optimizer is not None:
            self.optimizer.catch_up_all()
        self.optimizer = DeferredSGD(self.weight_CD, momentum=momentum, weight_decay=weight_decay)

    def loss(self, embeddings_bD: Tensor, labels_B: NDArray[np.int64], *, step: int) -> Tensor:
        """Return the loss of the global batch over the classes sampled for this step.

        Args:
            embeddings_bD: this worker's embeddings.
            labels_B: the classes of the global batch in rank order, the same on every worker; the plan knows them, so
                that no collective is spent on them.
            step: seeds the sampling, with this worker's rank.

        Raises:
            ValueError: a label is outside [0, num_classes).

        """
        assert self.optimizer is not None, "start_optimizer comes first"
        partition = self.partition
        if labels_B.min() < 0 or labels_B.max() >= partition.num_classes:
            raise ValueError(
                f"labels span {labels_B.min()} to {labels_B.max()} in step {step}, but there are "
                f"{partition.num_classes} classes; the plan and the shards belong to different data"
            )
        mine_B = (labels_B >= partition.start) & (labels_B < partition.stop)
        # numpy takes (seed, step, 0) for (seed, step), the plan's own stream, and 1 is the augmentation's.
        rng = np.random.default_rng((self.seed, step, 2 + partition.rank))
        rows = sample_rows(
            labels_B[mine_B] - partition.start, num_rows=partition.num_rows, sample_rate=self.sample_rate, rng=rng
        )
        columns_B = np.full(len(labels_B), -1)
        columns_B[mine_B] = np.searchsorted(rows, labels_B[mine_B] - partition.start)

        device = self.weight_CD.device
        self._rows = torch.from_numpy(rows).to(device, non_blocking=True)
        self.optimizer.catch_up(self._rows)
        # A leaf of its own: `weight[rows]` inside autograd would make a dense gradient as large as the matrix.
        self._sampled_SD = self.weight_CD[self._rows].requires_grad_()
        return normalized_softmax_loss(
            embeddings_bD,
            self._sampled_SD,
            torch.from_numpy(columns_B).to(device, non_blocking=True),
            temperature=self.temperature,
            group=self.group,
        )

    def step(self, *, lr: float) -> None:
        """Update the rows of the last `loss` by their gradient."""
        assert self.optimizer is not None
        assert self._sampled_SD.grad is not None, "backward comes before step"
        self.optimizer.step(self._rows, self._sampled_SD.grad, lr=lr)

"""One worker's part of the class-proxy matrix: its rows, their sampling, loss and update in one place."""

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nsl_dist.config import ProxyConfig
from nsl_dist.proxies.optimizer import DeferredSGD, RowwiseAdagrad
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import sample_rows
from nsl_dist.proxies.softmax import SampledProxies, normalized_softmax_loss, split_into_chunks
from nsl_dist.proxies.table import Table

# On a CPU the proxies of a chunk, their gradients and logits stay in the cache while one operation follows the other.
CPU_CHUNK_BYTES = 8 * 2**20


class ProxyMatrix:
    """This worker's part of the class-proxy matrix, its optimiser and the loss against it.

    Use, once a step: `loss`, then `backward()` on what it returns, which also updates the proxies. `prefetch` in
    between steps gets the next one's ready.

    Attributes:
        partition: the classes of this worker.
        weight: their proxies.
        optimizer: None until `start_optimizer`.

    """

    def __init__(
        self,
        partition: Partition,
        dim: int,
        config: ProxyConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Draw the proxies from U(-1/sqrt(D), 1/sqrt(D)) (paper, section 4.1), the same for any number of workers.

        Raises:
            ValueError: the matrix does not fit where the configuration puts it.

        """
        self.partition = partition
        self.config = config
        self.seed = seed
        self.group = group
        self.weight = Table(
            partition,
            dim,
            dtype=getattr(torch, config.dtype),
            placement=config.placement,
            device=device,
            directory=config.directory,
            seed=seed,
            initial_bound=dim**-0.5,
        )
        self.optimizer: DeferredSGD | RowwiseAdagrad | None = None
        self._unchecked: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._spare: deque[tuple[Tensor, Tensor]] = deque()
        self._prefetched: Future[SampledProxies] | None = None
        # The CPU's own proxies are where they are needed; drawing them beside the model's work would only slow that.
        self._background = ThreadPoolExecutor(1) if self.weight.device.type == "cuda" else None

    @property
    def num_sampled(self) -> int:
        """Classes of this worker that take part in an iteration, if the batch has no more."""
        num_rows, num_classes = self.partition.num_rows, self.partition.num_classes
        if self.config.num_sampled is None:
            return math.ceil(self.config.sample_rate * num_rows)
        return -(-min(self.config.num_sampled, num_classes) * num_rows // num_classes)

    def start_optimizer(self, *, momentum: float, weight_decay: float, step: int) -> None:
        """Begin with a fresh optimiser at `step`, all rows first brought up to date with the one before."""
        self._drop_prefetched()
        self._spare.clear()  # another optimiser keeps something else
        if self.optimizer is not None:
            self.optimizer.catch_up(step=step)
            self.optimizer = None  # frees its memory before the next one takes as much
        if self.config.optimizer == "sgd":
            self.optimizer = DeferredSGD(self.weight, momentum=momentum, weight_decay=weight_decay)
        else:
            self.optimizer = RowwiseAdagrad(self.weight, weight_decay=weight_decay)

    def prefetch(self, labels_B: NDArray[np.int64], *, step: int) -> None:
        """Draw the classes of the next step and fetch their proxies while the device works; `loss` then finds them.

        Does nothing where the CPU is the device.
        """
        if self._background is not None:
            self._prefetched = self._background.submit(self._sample, labels_B, step=step)

    def loss(
        self,
        embeddings_bD: Tensor,
        labels_B: NDArray[np.int64],
        *,
        step: int,
        lr: float,
        accuracy: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the global batch over the classes sampled for this step.

        `backward()` on it updates their proxies with learning rate `lr`.

        Args:
            embeddings_bD: this worker's embeddings.
            labels_B: the classes of the global batch in rank order, the same on every worker; the plan knows them, so
                that no collective is spent on them.
            step: of the run; seeds the sampling, with this worker's rank.
            lr: learning rate of the proxies.
            accuracy: see `normalized_softmax_loss`.

        Raises:
            ValueError: a label is outside [0, num_classes), or the labels are not those of the global batch.
            FloatingPointError: embeddings or proxies are not finite; on a GPU, those of the step before.

        """
        self._check_finite()
        world_size = self.partition.world_size
        if len(labels_B) != world_size * len(embeddings_bD):
            raise ValueError(
                f"{len(labels_B)} labels in step {step}, expected those of the global batch: {world_size} workers x "
                f"{len(embeddings_bD)} images = {world_size * len(embeddings_bD)}"
            )
        if self._prefetched is not None:
            proxies, self._prefetched = self._prefetched.result(), None
            assert proxies.step == step, f"prefetched for step {proxies.step}, not {step}"
        else:
            proxies = self._sample(labels_B, step=step)
        if not embeddings_bD.requires_grad:  # the proxies are still to be trained
            embeddings_bD = embeddings_bD.detach().requires_grad_(torch.is_grad_enabled())
        loss, finite_2B = normalized_softmax_loss(
            embeddings_bD,
            proxies,
            lr=lr,
            temperature=self.config.temperature,
            smoothing=self.config.label_smoothing,
            group=self.group,
            accuracy=accuracy,
        )
        if self.weight.device.type == "cuda":  # which is left to work on, and asked when it has long been done
            self._unchecked = (step, finite_2B.to("cpu", non_blocking=True), torch.cuda.Event())
            self._unchecked[2].record()
        else:
            self._unchecked = (step, finite_2B, None)
            self._check_finite()
        return loss

    def complete(self, *, step: int) -> dict[str, Tensor]:
        """Bring every row up to date with the steps before `step`, as at the end of a run; return `state`."""
        assert self.optimizer is not None
        self._check_finite()
        self._drop_prefetched()
        self.weight.make_all()
        self.optimizer.catch_up(step=step)
        return self._rows()

    def state(self) -> dict[str, Tensor]:
        """Return this worker's rows of everything that a checkpoint keeps, by name; tensors over the very memory.

        They are made if they were not yet, but not brought up to date: what they have missed is the optimiser's
        `history`. So a checkpoint changes nothing of what comes after it.

        Raises:
            FloatingPointError: see `loss`.

        """
        assert self.optimizer is not None
        self._check_finite()
        self._drop_prefetched()
        self.weight.make_all()
        return self._rows()

    def overwrite(self) -> dict[str, Tensor]:
        """Return the tensors of `state` to be written over; then call `resume`."""
        self._drop_prefetched()
        self.weight.declare_made()
        return self._rows()

    def resume(self, history: dict[str, Tensor]) -> None:
        """Go on with what was written into the tensors of `overwrite`, and the optimiser's `history`."""
        assert self.optimizer is not None
        self.optimizer.resume(history)

    def _rows(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        return {"weight": self.weight.values, **self.optimizer.state}

    def _drop_prefetched(self) -> None:
        if self._prefetched is not None:
            self._prefetched.result()  # it reads what is about to be written
            self._prefetched = None

    def _sample(self, labels_B: NDArray[np.int64], *, step: int) -> SampledProxies:
        assert self.optimizer is not None, "start_optimizer comes first"
        partition, weight = self.partition, self.weight
        if labels_B.min() < 0 or labels_B.max() >= partition.num_classes:
            raise ValueError(
                f"labels span {labels_B.min()} to {labels_B.max()} in step {step}, but there are "
                f"{partition.num_classes} classes; the plan and the shards belong to different data"
            )
        positives = np.unique(labels_B[(labels_B >= partition.start) & (labels_B < partition.stop)]) - partition.start
        # numpy takes (seed, step, 0) for (seed, step), the plan's own stream, and 1 is the augmentation's.
        rng = np.random.default_rng((self.seed, step, 2 + partition.rank))
        num_others = partition.num_rows - len(positives)
        num_sampled = self.num_sampled
        if self.config.correct_sampling:
            num_sampled = max(num_sampled, len(positives) + min(1, num_others))  # someone must stand for the rest
        rows = sample_rows(positives, num_rows=partition.num_rows, num_sampled=num_sampled, rng=rng)
        correct = self.config.correct_sampling and len(positives) < len(rows) < partition.num_rows

        bytes_per_row = self.optimizer.bytes_per_row + 4 * len(labels_B)
        budget = int(self.config.memory * 2**30)
        keep = len(rows) * bytes_per_row <= budget
        # The work on a chunk takes a few times what is kept of it.
        chunk_bytes = min(budget // 4, CPU_CHUNK_BYTES) if weight.device.type == "cpu" else budget // 4
        chunks = split_into_chunks(
            rows,
            labels_B - partition.start,
            rows_at_once=max(1, chunk_bytes // bytes_per_row),
            multiplicity=num_others / (len(rows) - len(positives)) if correct else None,
            table_device=weight.values.device,
            device=weight.device,
        )
        proxies = SampledProxies(chunks, self.optimizer, step, keep, self._spare, self.optimizer.num_finished)
        if keep and weight.values.device != weight.device:
            proxies.prefetched = [proxies.read(chunk) for chunk in range(len(chunks))]
        return proxies

    def _check_finite(self) -> None:
        if self._unchecked is None:
            return
        (step, finite_2B, event), self._unchecked = self._unchecked, None
        if event is not None:
            event.synchronize()
        if bool(finite_2B.all()):
            return
        embeddings_B = finite_2B[0].numpy()
        if embeddings_B.all():
            raise FloatingPointError(
                f"step {step}: class proxies are nan or infinite although all embeddings are finite; start "
                "another run with a lower --optim.lr or --proxies.lr-scale"
            )
        images = np.flatnonzero(~embeddings_B)
        per_worker = len(embeddings_B) // self.partition.world_size
        ranks, counts = np.unique(images // per_worker, return_counts=True)
        blame = ", ".join(
            f"{count} of the {per_worker} of worker {rank}" for rank, count in zip(ranks, counts, strict=True)
        )
        raise FloatingPointError(
            f"step {step}: embeddings are nan or infinite: {blame}; start another run with a lower "
            "--optim.lr, or look at these images"
        )

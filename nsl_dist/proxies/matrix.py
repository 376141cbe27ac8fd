"""One worker's partition of the class-proxy matrix: its rows, their sampling, loss and update."""

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

# Small enough for a CPU's cache to hold the proxies of a chunk, their gradients and logits between operations.
CPU_CHUNK_BYTES = 8 * 2**20


class ProxyMatrix:
    """This worker's partition of the class-proxy matrix, with optimiser and loss.

    In each step, call `loss` and then `backward()` on its result, which also updates the proxies. Call `prefetch`
    between steps to load the proxies of the next step ahead of time.

    Attributes:
        partition: the classes of this worker.
        weight: their proxies.
        optimizer: None until `start_optimizer` is called.

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
        """Draw the proxies from U(-1/sqrt(D), 1/sqrt(D)) (paper, section 4.1), independent of the number of workers.

        Raises:
            ValueError: the matrix does not fit in the configured placement.

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
        # On a CPU the proxies need no copy, and a background thread would only slow the model down.
        self._background = ThreadPoolExecutor(1) if self.weight.device.type == "cuda" else None

    @property
    def num_sampled(self) -> int:
        """Classes of this worker sampled in an iteration, unless the batch has more."""
        num_rows, num_classes = self.partition.num_rows, self.partition.num_classes
        if self.config.num_sampled is None:
            return math.ceil(self.config.sample_rate * num_rows)
        return -(-min(self.config.num_sampled, num_classes) * num_rows // num_classes)

    def start_optimizer(self, *, momentum: float, weight_decay: float, step: int) -> None:
        """Start a new optimiser at `step`, after the previous one has brought all rows up to date."""
        self._drop_prefetched()
        self._spare.clear()  # its contents depend on the optimiser
        if self.optimizer is not None:
            self.optimizer.catch_up(step=step)
            self.optimizer = None  # free its memory before the next one allocates as much
        if self.config.optimizer == "sgd":
            self.optimizer = DeferredSGD(self.weight, momentum=momentum, weight_decay=weight_decay)
        else:
            self.optimizer = RowwiseAdagrad(self.weight, weight_decay=weight_decay)

    def prefetch(self, labels_B: NDArray[np.int64], *, step: int) -> None:
        """Sample the classes of the next step and fetch their proxies for `loss` while the device is busy.

        Does nothing on a CPU.
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
        """Return the loss of the global batch over the classes sampled in this step.

        Calling `backward()` on it updates their proxies with learning rate `lr`.

        Args:
            embeddings_bD: this worker's embeddings.
            labels_B: classes of the global batch in rank order, the same on every worker. They come from the plan, so
                that no collective is needed.
            step: step of the run; seeds the sampling together with this worker's rank.
            lr: learning rate of the proxies.
            accuracy: see `normalized_softmax_loss`.

        Raises:
            ValueError: a label is outside [0, num_classes), or the number of labels is not that of the global batch.
            FloatingPointError: embeddings or proxies are not finite; on a GPU, those of the previous step.

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
        if not embeddings_bD.requires_grad:  # backward must still run to train the proxies
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
        if self.weight.device.type == "cuda":  # checked in the next step, so that this one need not synchronise
            self._unchecked = (step, finite_2B.to("cpu", non_blocking=True), torch.cuda.Event())
            self._unchecked[2].record()
        else:
            self._unchecked = (step, finite_2B, None)
            self._check_finite()
        return loss

    def complete(self, *, step: int) -> dict[str, Tensor]:
        """Bring every row up to date with all steps before `step`, as at the end of a run, and return the `state`."""
        assert self.optimizer is not None
        self._check_finite()
        self._drop_prefetched()
        self.weight.make_all()
        self.optimizer.catch_up(step=step)
        return self._rows()

    def state(self) -> dict[str, Tensor]:
        """Return this worker's rows of everything that a checkpoint saves, by name, without copying.

        Rows are initialised if necessary but not brought up to date; the updates they have missed are in the
        optimiser's `history`. Hence writing a checkpoint does not change the rest of the run.

        Raises:
            FloatingPointError: see `loss`.

        """
        assert self.optimizer is not None
        self._check_finite()
        self._drop_prefetched()
        self.weight.make_all()
        return self._rows()

    def overwrite(self) -> dict[str, Tensor]:
        """Return the tensors of `state` to be overwritten; call `resume` afterwards."""
        self._drop_prefetched()
        self.weight.declare_made()
        return self._rows()

    def resume(self, history: dict[str, Tensor]) -> None:
        """Resume from the contents of the tensors of `overwrite` and the optimiser's `history`."""
        assert self.optimizer is not None
        self.optimizer.resume(history)

    def _rows(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        return {"weight": self.weight.values, **self.optimizer.state}

    def _drop_prefetched(self) -> None:
        if self._prefetched is not None:
            self._prefetched.result()  # it reads rows that are about to be written
            self._prefetched = None

    def _sample(self, labels_B: NDArray[np.int64], *, step: int) -> SampledProxies:
        assert self.optimizer is not None, "call start_optimizer first"
        partition, weight = self.partition, self.weight
        if labels_B.min() < 0 or labels_B.max() >= partition.num_classes:
            raise ValueError(
                f"labels span {labels_B.min()} to {labels_B.max()} in step {step}, but there are "
                f"{partition.num_classes} classes; the plan and the shards belong to different data sets"
            )
        positives = np.unique(labels_B[(labels_B >= partition.start) & (labels_B < partition.stop)]) - partition.start
        # To numpy, (seed, step, 0) equals (seed, step), which seeds the plan; 1 seeds the augmentation.
        rng = np.random.default_rng((self.seed, step, 2 + partition.rank))
        num_others = partition.num_rows - len(positives)
        num_sampled = self.num_sampled
        if self.config.correct_sampling:
            num_sampled = max(num_sampled, len(positives) + min(1, num_others))  # at least one must represent the rest
        rows = sample_rows(positives, num_rows=partition.num_rows, num_sampled=num_sampled, rng=rng)
        correct = self.config.correct_sampling and len(positives) < len(rows) < partition.num_rows

        bytes_per_row = self.optimizer.bytes_per_row + 4 * len(labels_B)
        budget = int(self.config.memory * 2**30)
        keep = len(rows) * bytes_per_row <= budget
        # Processing a chunk needs a few times the memory that is kept of it.
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
        counted = ", ".join(
            f"{count} of the {per_worker} of worker {rank}" for rank, count in zip(ranks, counts, strict=True)
        )
        raise FloatingPointError(
            f"step {step}: embeddings are nan or infinite: {counted}; start another run with a lower "
            "--optim.lr, or inspect these images"
        )

"""One worker's partition of the class-proxy matrix: its rows, their sampling, loss and update."""

import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nsl_dist.config import ProxyConfig
from nsl_dist.proxies.optimizer import DeferredSGD, RowwiseAdagrad
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import Draw, draw_classes
from nsl_dist.proxies.softmax import LOWEST_TEMPERATURE, normalized_softmax_loss
from nsl_dist.proxies.table import Table
from nsl_dist.proxies.torch_step import TorchStep

if TYPE_CHECKING:  # Triton is only there and only needed where there is a GPU
    from nsl_dist.proxies.recording import Recorder
    from nsl_dist.proxies.row_transfer import RowTransfer
    from nsl_dist.proxies.triton_step import TritonStep


class ProxyMatrix:
    """This worker's partition of the class-proxy matrix, with optimiser and loss.

    In each step, call `loss` and then `backward()` on its result, which also updates the proxies. Call `prefetch`
    between steps to load the proxies of the next step ahead of time.

    Attributes:
        partition: the classes of this worker.
        weight: their proxies, `config.per_class` rows for each.
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
        kernels: bool = False,
    ) -> None:
        """Draw the proxies from U(-1/sqrt(D), 1/sqrt(D)) (paper, section 4.1), independent of the number of workers.

        GPUs use Triton kernels; with `kernels`, so does a CPU, for tests by Triton's interpreter.

        Raises:
            ValueError: the matrix does not fit in the configured placement, or the temperature is too low for float32.

        """
        if config.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature {config.temperature} is below {LOWEST_TEMPERATURE:.4f}, the lowest that float32 can "
                "represent"
            )
        self.partition = partition
        self.config = config
        self.seed = seed
        self.group = group
        self.weight = Table(
            partition.rows(config.per_class),
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
        self._kernels = kernels or self.weight.device.type == "cuda"
        self._transfer: RowTransfer | None = None
        self._recorder: Recorder | None = None
        self._prefetched: tuple[NDArray[np.int64], TritonStep] | None = None

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
            # Free its memory before the next one allocates as much.
            self.optimizer = self._transfer = self._recorder = None
        if self.config.optimizer == "sgd":
            self.optimizer = DeferredSGD(self.weight, momentum=momentum, weight_decay=weight_decay)
        else:
            self.optimizer = RowwiseAdagrad(self.weight, weight_decay=weight_decay)
        if self._kernels and self.config.placement != "device":
            from nsl_dist.proxies.row_transfer import RowTransfer

            self._transfer = RowTransfer(self.optimizer.tables)
        if self.weight.device.type == "cuda" and self.config.placement != "disk":
            from nsl_dist.proxies.recording import Recorder

            self._recorder = Recorder()

    def prefetch(self, labels_B: NDArray[np.int64], *, step: int) -> None:
        """Sample the classes of the next step and fetch their proxies for `loss`, while a GPU is busy.

        Does nothing on a CPU.
        """
        if self._kernels:
            self._discard_prefetched()
            self._prefetched = labels_B, self._launch(labels_B, step=step)

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
        if self._prefetched is None:
            sampled = self._sample(labels_B, step=step)
        else:
            (prefetched_B, sampled), self._prefetched = self._prefetched, None
            if sampled.step != step or not np.array_equal(prefetched_B, labels_B):
                raise ValueError(
                    f"step {step} is not what was prefetched, step {sampled.step}, or has other labels; prefetch the "
                    "batch that comes next"
                )
        if not embeddings_bD.requires_grad:  # backward must still run to train the proxies
            embeddings_bD = embeddings_bD.detach().requires_grad_(torch.is_grad_enabled())
        loss, finite_2B = normalized_softmax_loss(embeddings_bD, sampled, lr=lr, group=self.group, accuracy=accuracy)
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
        """Let go of rows that may be about to change, and wait until all changes have landed."""
        self._discard_prefetched()
        if self._transfer is not None:
            self._transfer.finish()

    def _discard_prefetched(self) -> None:
        if self._prefetched is not None:
            self._prefetched[1].discard()
            self._prefetched = None

    def _sample(self, labels_B: NDArray[np.int64], *, step: int) -> "TorchStep | TritonStep":
        assert self.optimizer is not None, "call start_optimizer first"
        if self._kernels:
            return self._launch(labels_B, step=step)
        draw = self._draw(labels_B, step=step)
        return TorchStep(draw, self.optimizer, self.config, step=step, spare=self._spare)

    def _launch(self, labels_B: NDArray[np.int64], *, step: int) -> "TritonStep":
        from nsl_dist.proxies.triton_step import TritonStep

        assert self.optimizer is not None, "call start_optimizer first"
        draw = self._draw(labels_B, step=step)
        # A batch with more classes than are to be sampled is an exception, and its size varies.
        recorder = self._recorder if draw.num_sampled == self.num_sampled else None
        return TritonStep(draw, self.optimizer, self.config, step=step, transfer=self._transfer, recorder=recorder)

    def _draw(self, labels_B: NDArray[np.int64], *, step: int) -> Draw:
        partition = self.partition
        if labels_B.min() < 0 or labels_B.max() >= partition.num_classes:
            raise ValueError(
                f"labels span {labels_B.min()} to {labels_B.max()} in step {step}, but there are "
                f"{partition.num_classes} classes; the plan and the shards belong to different data sets"
            )
        return draw_classes(
            labels_B,
            partition,
            num_sampled=self.num_sampled,
            correct=self.config.correct_sampling,
            seed=(self.seed, step, partition.rank),
        )

    def _check_finite(self) -> None:
        if self._unchecked is None:
            return
        (step, finite_2B, event), self._unchecked = self._unchecked, None
        if event is not None:
            event.synchronize()
        if bool(finite_2B.all()):
            return
        embeddings_B = finite_2B[0].bool().numpy()
        if embeddings_B.all():
            filtered = ", or a higher --proxies.filter-above" if self.config.filter_above is not None else ""
            raise FloatingPointError(
                f"step {step}: class proxies are nan or infinite although all embeddings are finite, or an image's "
                f"loss has no terms; start another run with a lower --optim.lr or --proxies.lr-scale{filtered}"
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

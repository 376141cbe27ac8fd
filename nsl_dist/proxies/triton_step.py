"""The proxies' step by Triton kernels, for GPUs; letters as in `softmax`.

Classes with an image in the batch come first, so that columns of targets, and classes that stand for others, are known
without a search. Nothing waits for the device, but for placement disk.
"""

import math
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton import cdiv

from nsl_dist.config import ProxyConfig
from nsl_dist.device import products_in
from nsl_dist.proxies import kernels
from nsl_dist.proxies.counter_random import stream_key
from nsl_dist.proxies.optimizer import DeferredSGD, MapProducts, RowwiseAdagrad
from nsl_dist.proxies.recording import Recorder
from nsl_dist.proxies.row_transfer import RowTransfer, Staged
from nsl_dist.proxies.sampling import Draw
from nsl_dist.proxies.softmax import BEST, shift_of

ALIGNMENT = 16  # classes; products with other sizes cannot use tensor cores


@dataclass
class Chunk:
    """Sampled classes of this worker that are processed together."""

    first: int
    num_classes: int
    rows_R: Tensor
    stored_rows_R: Tensor
    """The same, where `RowTransfer` needs them."""
    fetched: Future[Staged] | None = None
    """Their proxies, unless the device keeps them."""
    staged: Staged | None = None
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    """What `_cosines` returned."""


class TritonStep:
    """One worker's sampled proxies in one iteration; see `softmax.ProxyStep`."""

    def __init__(
        self,
        draw: Draw,
        optimizer: DeferredSGD | RowwiseAdagrad,
        config: ProxyConfig,
        *,
        step: int,
        transfer: RowTransfer | None,
        recorder: Recorder | None,
    ) -> None:
        """Sample on the device, and start to fetch rows that are kept elsewhere, with `transfer`.

        What the backward pass needs is kept if it fits in `config.memory`; otherwise it is computed again, in chunks.
        """
        self.step = step
        self._draw = draw
        self.batch = len(draw.columns_B)
        self._optimizer = optimizer
        self._num_finished = optimizer.num_finished
        self._transfer = transfer
        self.has_transfer = transfer is not None
        self._device = optimizer.weight.device
        self.dim = optimizer.weight.values.shape[1]
        self._size = kernels.rows_at_once(self.dim)
        self._scale, self._shift = 1 / config.temperature, shift_of(config.temperature)
        self._smoothing = config.label_smoothing
        self._margin = config.margin
        self._most = math.inf if config.filter_above is None else config.filter_above * self._scale
        self._per_class = config.per_class
        self._loss_options = {"PER_CLASS": config.per_class, "ANGULAR": config.margin_kind == "angular"}
        self._matmul = config.matmul_on(self._device.type)
        self.dtype = torch.bfloat16 if self._matmul == "bfloat16" else torch.float32

        bytes_per_class = self._per_class * (self.dtype.itemsize * self.dim + 4 * self.batch)
        if transfer is not None:
            bytes_per_class += self._per_class * optimizer.bytes_per_row
        budget = int(config.memory * 2**30)
        self.keep = draw.num_sampled * bytes_per_class <= budget
        # A chunk needs about as much again in the backward pass.
        classes_at_once = max(1, budget // 2 // bytes_per_class)
        self._recorder = recorder if self.keep or transfer is None else None
        self._recording = self._recorder.recording_of(self) if self._recorder is not None else None
        self._turn = 0
        words = torch.from_numpy(_words_of(draw))
        if self._recording is not None:
            self._turn = self._recording.begin()
            self.sampling, self.rows_R, self.chunks = self._recording.tensors
            with self._transfer_stream(after=self._recording.free):
                self.sampling.copy_(self._pinned(words), non_blocking=True)
                if transfer is not None:
                    self._draw_rows()  # otherwise recorded
        else:
            with self._transfer_stream(after=None):
                self.sampling = self._pinned(words).to(self._device, non_blocking=True)
                num_rows = draw.num_sampled * self._per_class
                self.rows_R = torch.empty(num_rows, dtype=torch.int64, device=self._device)
                stored_rows_R = self._draw_rows()
            if self._transfer is not None and self._transfer.stream is not None:
                for made in (self.sampling, self.rows_R):
                    made.record_stream(torch.cuda.current_stream(self._device))
            self.chunks = []
            for first in range(0, draw.num_sampled, classes_at_once):
                stop = min(first + classes_at_once, draw.num_sampled)
                rows = slice(first * self._per_class, stop * self._per_class)
                self.chunks.append(Chunk(first, stop - first, self.rows_R[rows], stored_rows_R[rows]))
        for chunk in self.chunks if self.keep else self.chunks[:1]:
            self._fetch(chunk)

    @property
    def is_current(self) -> bool:
        """The proxies were not updated since they were read."""
        if self._recording is not None and self._recording.turn != self._turn:
            return False  # another step has overwritten what this one keeps
        return self._optimizer.num_finished == self._num_finished

    @property
    def shape(self) -> tuple[object, ...]:
        """What a recording of this step depends on."""
        sizes = (self.batch, self._draw.num_sampled)
        if isinstance(self._optimizer, RowwiseAdagrad):
            return sizes
        # Tensors that are replaced when they are full, or by another start of the optimiser.
        return (*sizes, self._catches_up, *(tensor.data_ptr() for tensor in self.history()[:3]))

    def discard(self) -> None:
        """Give back what was fetched, instead of using it."""
        for chunk in self.chunks:
            self.read(chunk)
            self._release(chunk)

    def normalise(self, embeddings_bD: Tensor) -> tuple[Tensor, Tensor]:
        """See `softmax.ProxyStep`."""
        if self._recording is None and self._recorder is not None and self.chunks:
            self._recording = self._recorder.record(self, embeddings_bD)
        if self._recording is not None:
            for chunk in self.chunks:
                self.read(chunk)
            return self._recording.normalise(embeddings_bD)
        return self.compute_queries(embeddings_bD)

    def normalise_backward(self, grad_queries_bD: Tensor, embeddings_bD: Tensor, lengths_b: Tensor) -> Tensor:
        """See `softmax.ProxyStep`."""
        if self._recording is not None:
            return self._recording.normalise_backward(grad_queries_bD)
        return self.compute_grad(grad_queries_bD, embeddings_bD, lengths_b)

    def forward(self, queries_BD: Tensor, *, best: bool) -> Tensor:  # noqa: ARG002  the kernel has it for nothing
        """See `softmax.ProxyStep`."""
        if self._recording is None:
            return self.compute_sums(queries_BD)
        return self._recording.forward(queries_BD)

    def results(self, queries_BD: Tensor, sums_5B: Tensor) -> tuple[Tensor, Tensor]:
        """See `softmax.ProxyStep`."""
        if self._recording is not None:
            return self._recording.results()
        return self.compute_results(queries_BD, sums_5B)

    def backward(self, queries_BD: Tensor, sums_5B: Tensor, grad_loss: Tensor, *, lr: float) -> Tensor:
        """See `softmax.ProxyStep`."""
        update = self._pinned(torch.from_numpy(self._update_words(lr)))
        if self._recording is not None:
            grad_queries_BD = self._recording.backward(update, grad_loss)
        else:
            update = update.to(self._device, non_blocking=True)
            grad_queries_BD = self.update_proxies(queries_BD, sums_5B, _aligned(grad_loss), update)
        for chunk in self.chunks:
            self._store(chunk)
        if self._recorder is not None:
            self._recorder.has_run(self)
        self._optimizer.count_step(len(self.rows_R))
        return grad_queries_BD

    def compute_queries(self, embeddings_bD: Tensor) -> tuple[Tensor, Tensor]:
        """See `normalise`."""
        embeddings_bD = _aligned(embeddings_bD.float().contiguous())
        queries_bD = torch.empty_like(embeddings_bD, dtype=self.dtype)
        lengths_b = torch.empty(len(queries_bD), device=self._device)
        kernels.normalise_kernel[(len(queries_bD),)](
            embeddings_bD, queries_bD, lengths_b, self.dim, DP=self._size["DP"]
        )
        return queries_bD, lengths_b

    def compute_grad(self, grad_queries_bD: Tensor, embeddings_bD: Tensor, lengths_b: Tensor) -> Tensor:
        """See `normalise_backward`."""
        grad_bD = torch.empty_like(grad_queries_bD)
        kernels.normalise_backward_kernel[(len(grad_bD),)](
            grad_queries_bD, _aligned(embeddings_bD.float().contiguous()), lengths_b, grad_bD, self._scale, self.dim,
            DP=self._size["DP"],
        )  # fmt: skip
        return grad_bD

    def compute_results(self, queries_BD: Tensor, sums_5B: Tensor) -> tuple[Tensor, Tensor]:
        """See `results`."""
        results_4B = torch.empty(4, len(queries_BD), device=self._device)
        kernels.loss_kernel[(len(queries_BD),)](
            queries_BD, sums_5B, results_4B, self._shift, self._smoothing, self._scale, self._margin, self.dim,
            ANGULAR=self._loss_options["ANGULAR"], DP=self._size["DP"],
        )  # fmt: skip
        return results_4B[:2].mean(dim=1), results_4B[2:]

    def _draw_rows(self) -> Tensor:
        """Draw the rows on the device; return them where `RowTransfer` needs them: for a file on the CPU."""
        in_file = self._optimizer.weight.placement == "disk"
        draw = self._draw
        if draw.everything:
            torch.arange(len(self.rows_R), out=self.rows_R)
            return self.rows_R.cpu() if in_file else self.rows_R
        if in_file:
            rows_R = torch.from_numpy(draw.rows(ascending=False, per_class=self._per_class))
            self.rows_R.copy_(rows_R)
            return rows_R
        kernels.sample_kernel[(cdiv(draw.num_sampled, 256),)](
            self.sampling, self.rows_R, self.batch, draw.num_sampled, PER_CLASS=self._per_class, BITS=draw.bits,
            SEARCH=self.batch.bit_length(), BLOCK=256,
        )  # fmt: skip
        return self.rows_R

    def sample_and_sum(self, queries_BD: Tensor) -> Tensor:
        """Draw the rows anew, unless that happens on the transfer's stream, and return `sums_5B`."""
        if not self.has_transfer:
            self._draw_rows()
        return self.compute_sums(queries_BD)

    def compute_sums(self, queries_BD: Tensor) -> Tensor:
        """See `forward`."""
        if not self.chunks:
            sums_5B = torch.zeros(5, len(queries_BD), device=self._device)
            sums_5B[BEST] = -math.inf
            return sums_5B
        sums_5B = torch.empty(5, len(queries_BD), device=self._device)
        for index, chunk in enumerate(self.chunks):
            self.read(chunk)
            self._fetch_ahead(index)
            chunk.kept = self._cosines(chunk, queries_BD)
            cosines_BR = chunk.kept[0]
            kernels.sums_kernel[(len(queries_BD),)](
                cosines_BR, cosines_BR.shape[1], sums_5B, self.sampling, chunk.first, chunk.num_classes, self._scale,
                self._shift, self._margin, self._most, **self._loss_options, BLOCK=4096, num_warps=16,
            )  # fmt: skip
            if not self.keep:
                chunk.kept = None
                self._release(chunk)
        return sums_5B

    def update_proxies(self, queries_BD: Tensor, sums_5B: Tensor, grad_loss: Tensor, update: Tensor) -> Tensor:
        """See `backward`; rows that are kept until the end are not stored yet."""
        grad_queries_BD = torch.zeros(0, device=self._device)
        if not self.keep and self.chunks:
            self._fetch(self.chunks[0])
        for index, chunk in enumerate(self.chunks):
            if chunk.kept is None:
                self.read(chunk)
                self._fetch_ahead(index)
                chunk.kept = self._cosines(chunk, queries_BD)
            (cosines_BR, unit_RD, lengths_R), chunk.kept = chunk.kept, None
            in_place = self.dtype == torch.float32 and self._per_class == 1
            grad_BR = cosines_BR if in_place else torch.empty_like(cosines_BR, dtype=self.dtype)
            along_R = torch.empty_like(lengths_R)
            # Wide enough for whole lines of memory, narrow enough for all multiprocessors to have some.
            columns, images = (128, 16) if grad_BR.element_size() == 4 and grad_BR.shape[1] >= 2**15 else (32, 64)
            kernels.grad_logits_kernel[(cdiv(grad_BR.shape[1], columns),)](
                cosines_BR, grad_BR, grad_BR.shape[1], sums_5B, self.sampling, grad_loss, along_R, chunk.first,
                chunk.num_classes, len(grad_BR), self._scale, self._shift, self._smoothing, self._margin, self._most,
                **self._loss_options, BS=columns, BB=images,
            )  # fmt: skip
            part_BD = self._product(grad_BR, unit_RD)
            grad_queries_BD = part_BD if index == 0 else grad_queries_BD.add_(part_BD)
            grad_RD = self._product(grad_BR.T, queries_BD)
            del cosines_BR, grad_BR, unit_RD
            self._update(chunk, grad_RD, along_R, lengths_R, update)
            if not self.keep:
                self._store(chunk)
        if isinstance(self._optimizer, DeferredSGD):
            missed = self._optimizer.missed
            num_blocks = missed.after.shape[2]
            kernels.append_map_kernel[(1 + cdiv(num_blocks, missed.STEPS_PER_BLOCK),)](
                missed.within, missed.after, missed.within.shape[2], num_blocks, update,
                PER_BLOCK=missed.STEPS_PER_BLOCK,
            )  # fmt: skip
        return grad_queries_BD if self.chunks else torch.zeros(queries_BD.shape, device=self._device)

    def _cosines(self, chunk: Chunk, queries_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return cosines `[B, R]`, proxies divided by their lengths `[R, D]`, and these, R rounded up."""
        num_rows = len(chunk.rows_R)
        padded = -(-num_rows // ALIGNMENT) * ALIGNMENT
        unit_RD = torch.empty(padded, self.dim, dtype=self.dtype, device=self._device)
        lengths_R = torch.empty(padded, device=self._device)
        kernels.gather_kernel[(cdiv(padded, self._size["RB"]),)](
            *self._tables(chunk), chunk.rows_R, *self.history(), unit_RD, lengths_R, num_rows, padded, self.dim,
            **self._options(chunk), **self._size,
        )  # fmt: skip
        return self._product(queries_BD, unit_RD.T), unit_RD, lengths_R

    def _update(self, chunk: Chunk, grad_RD: Tensor, along_R: Tensor, lengths_R: Tensor, update: Tensor) -> None:
        grid = (cdiv(len(chunk.rows_R), self._size["RB"]),)
        first_row = self._optimizer.weight.rows.start
        rest = (grad_RD, along_R, lengths_R, update, first_row, len(chunk.rows_R), self.dim, self._scale)
        weight, velocity = self._tables(chunk)
        if isinstance(self._optimizer, DeferredSGD):
            kernels.update_sgd_kernel[grid](
                weight, velocity, chunk.rows_R, *self.history(), *rest, **self._options(chunk), **self._size
            )
        else:
            kernels.update_adagrad_kernel[grid](
                weight, self._optimizer.accumulator, chunk.rows_R, *rest, STAGED=chunk.staged is not None, **self._size
            )

    def _tables(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return weight and velocity; for Adagrad, which has none, the weight twice."""
        stored = [table.values for table in self._optimizer.tables]
        tables = stored if chunk.staged is None else chunk.staged.tables
        return tables[0], tables[-1]

    def history(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Return the last steps of all rows and the maps since each step; for Adagrad, which has none, anything."""
        if isinstance(self._optimizer, DeferredSGD):
            missed = self._optimizer.missed
            return (
                self._optimizer.step_of_C, missed.within, missed.after, missed.within.shape[2], missed.after.shape[2],
            )  # fmt: skip
        return (self.sampling,) * 3 + (0, 0)

    @property
    def _catches_up(self) -> bool:
        return isinstance(self._optimizer, DeferredSGD) and not self._optimizer.all_current

    def _options(self, chunk: Chunk) -> dict[str, int | bool]:
        return {
            "CATCH_UP": self._catches_up,
            "PER_BLOCK": MapProducts.STEPS_PER_BLOCK,
            "STAGED": chunk.staged is not None,
        }

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply in the configured precision; the result is float32."""
        if self.dtype == torch.bfloat16 and self._device.type == "cuda":
            return torch.mm(left, right, out_dtype=torch.float32)
        with products_in(self._matmul, self._device):
            return left.float() @ right.float()

    def _fetch(self, chunk: Chunk) -> None:
        if self._transfer is not None:
            chunk.fetched = self._transfer.fetch(chunk.stored_rows_R, into=chunk.staged)

    def _fetch_ahead(self, index: int) -> None:
        """Fetch the next chunk while this one is computed, unless all were fetched at once."""
        if not self.keep and index + 1 < len(self.chunks):
            self._fetch(self.chunks[index + 1])

    def read(self, chunk: Chunk) -> None:
        """Let the device go on when the rows of a chunk have arrived."""
        if self._transfer is not None and chunk.fetched is not None:
            chunk.staged, chunk.fetched = self._transfer.wait_for(chunk.fetched), None

    def _store(self, chunk: Chunk) -> None:
        if self._transfer is not None and chunk.staged is not None:
            self._transfer.store(chunk.stored_rows_R, chunk.staged)
            self._release(chunk)

    def _release(self, chunk: Chunk) -> None:
        """Let other rows use the memory, unless a recording has its address."""
        if self._transfer is not None and chunk.staged is not None and self._recording is None:
            self._transfer.release(chunk.staged)
            chunk.staged = None

    def _transfer_stream(self, *, after: torch.cuda.Event | None) -> AbstractContextManager[object]:
        return self._transfer.on_stream(after) if self._transfer is not None else nullcontext()

    def _pinned(self, words: Tensor) -> Tensor:
        return words.pin_memory() if self._device.type == "cuda" else words

    def _update_words(self, lr: float) -> NDArray[np.int64]:
        """Return what `kernels` calls `update`."""
        optimizer, seed = self._optimizer, self._optimizer.weight.seed
        momentum, step = 0.0, 0
        if isinstance(optimizer, DeferredSGD):
            momentum, step = optimizer.momentum, optimizer.missed.num_steps + 1
        keys = [stream_key(seed, 4 * self.step + 1), stream_key(seed, 4 * self.step + 2)]
        floats = np.array([lr, momentum, optimizer.weight_decay])
        return np.concatenate([np.array([step, *keys]), floats.view(np.int64)])


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor whose address is one that kernels are compiled for, like those of a recording."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _words_of(draw: Draw) -> NDArray[np.int64]:
    """Return what `kernels` calls `sampling`; its size depends on that of the batch alone."""
    num_positives = len(draw.positives)
    words = np.zeros(kernels.SAMPLING_WORDS.value + 2 * len(draw.columns_B), dtype=np.int64)
    header = [*draw.keys, num_positives, draw.num_rows - num_positives, np.float64(draw.multiplicity).view(np.int64)]
    words[: len(header)] = header
    words[len(header) :][: len(draw.columns_B)] = draw.columns_B
    words[len(header) + len(draw.columns_B) :][:num_positives] = draw.positives
    return words

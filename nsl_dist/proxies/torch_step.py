"""The proxies' step in plain PyTorch, for CPUs; letters as in `softmax`."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsl_dist.config import ProxyConfig
from nsl_dist.device import products_in
from nsl_dist.proxies.optimizer import DeferredSGD, RowwiseAdagrad
from nsl_dist.proxies.sampling import Draw
from nsl_dist.proxies.softmax import (
    BEST,
    CLASSES,
    NORMALISER,
    TARGET,
    TOTAL,
    shift_of,
    slope_of_angular_margin,
    with_margin,
)
from nsl_dist.proxies.table import Rows

# Small enough for a CPU's cache to hold the proxies of a chunk, their gradients and logits between operations.
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Sampled classes of this worker that are processed together."""

    rows: Rows
    num_classes: int
    target_images: Tensor
    """Images of the global batch whose class is in this chunk."""
    target_columns: Tensor
    """Index of each such image's class in the chunk."""
    num_positives: int
    """Classes at the start of the chunk that have an image."""
    multiplicity: float
    """Number of classes that each of the others represents in the normaliser."""

    def weighted(self, values_BS: Tensor) -> Tensor:
        """Multiply values in place by the number of classes that each column represents."""
        if self.multiplicity != 1:
            values_BS[:, self.num_positives :] *= self.multiplicity
        return values_BS


def split_into_chunks(draw: Draw, *, classes_at_once: int, per_class: int) -> list[Chunk]:
    """Split sampled classes into chunks; all classes are addressed by slices, which are read without a copy."""
    rows = None if draw.everything else torch.from_numpy(draw.rows(ascending=True, per_class=per_class))
    chunks = []
    for start in range(0, draw.num_sampled, classes_at_once):
        stop = min(start + classes_at_once, draw.num_sampled)
        places = slice(start * per_class, stop * per_class)
        images = np.flatnonzero((draw.columns_B >= start) & (draw.columns_B < stop))
        chunks.append(
            Chunk(
                rows=places if rows is None else rows[places],
                num_classes=stop - start,
                target_images=torch.from_numpy(images),
                target_columns=torch.from_numpy(draw.columns_B[images] - start),
                num_positives=min(max(len(draw.positives) - start, 0), stop - start),
                multiplicity=draw.multiplicity,
            )
        )
    return chunks


Read = tuple[Tensor, Tensor]


class TorchStep:
    """One worker's sampled proxies in one iteration; see `softmax.ProxyStep`."""

    def __init__(
        self,
        draw: Draw,
        optimizer: DeferredSGD | RowwiseAdagrad,
        config: ProxyConfig,
        *,
        step: int,
        spare: deque[Read],
    ) -> None:
        """Split the classes into chunks; if all fit in `config.memory`, keep what the backward pass needs of them.

        `spare` holds buffers of earlier reads, for reuse: allocating costs more than reading into them.
        """
        budget = int(config.memory * 2**30)
        bytes_per_class = config.per_class * (optimizer.bytes_per_row + 4 * len(draw.columns_B))
        self.keep = draw.num_sampled * bytes_per_class <= budget
        # Processing a chunk needs a few times the memory that is kept of it.
        classes_at_once = max(1, min(budget // 4, CHUNK_BYTES) // bytes_per_class)
        self.chunks = split_into_chunks(draw, classes_at_once=classes_at_once, per_class=config.per_class)
        self._optimizer = optimizer
        self._config = config
        self._temperature = config.temperature
        self._shift = shift_of(config.temperature)
        self._smoothing = config.label_smoothing
        self._matmul = config.matmul_on("cpu")
        self.step = step
        self._spare = spare
        self._kept: list[tuple[Read, Tensor, Tensor]] = []
        self._num_finished = optimizer.num_finished

    @property
    def is_current(self) -> bool:
        """The proxies were not updated since they were read."""
        return self._optimizer.num_finished == self._num_finished

    def normalise(self, embeddings_bD: Tensor) -> tuple[Tensor, Tensor]:
        """See `softmax.ProxyStep`."""
        embeddings_bD = embeddings_bD.float()
        lengths_b = torch.linalg.vector_norm(embeddings_bD, dim=1).clamp_min_(1e-12)
        return embeddings_bD / lengths_b[:, None], lengths_b

    def normalise_backward(self, grad_queries_bD: Tensor, embeddings_bD: Tensor, lengths_b: Tensor) -> Tensor:
        """See `softmax.ProxyStep`."""
        queries_bD = embeddings_bD.float() / lengths_b[:, None]
        along_b1 = (grad_queries_bD * queries_bD).sum(dim=1, keepdim=True)
        return (grad_queries_bD - along_b1 * queries_bD) / lengths_b[:, None]

    def forward(self, queries_BD: Tensor, *, best: bool) -> Tensor:
        """See `softmax.ProxyStep`."""
        with products_in(self._matmul, queries_BD.device):
            return self._sums(queries_BD, best=best)

    def backward(self, queries_BD: Tensor, sums_5B: Tensor, grad_loss: Tensor, *, lr: float) -> Tensor:
        """See `softmax.ProxyStep`."""
        with products_in(self._matmul, queries_BD.device):
            return self._updates(queries_BD, sums_5B, grad_loss, lr=lr)

    def _sums(self, queries_BD: Tensor, *, best: bool) -> Tensor:
        sums_5B = queries_BD.new_zeros(5, len(queries_BD))
        sums_5B[BEST] = -math.inf
        for index, chunk in enumerate(self.chunks):
            read = self._read(index)
            logits_BR, lengths_R = self._logits(queries_BD, read[0])
            logits_BS, _ = self._nearest(logits_BR)
            filtered_BS = self._filtered(logits_BS, chunk)
            targets = chunk.target_images, chunk.target_columns
            sums_5B[NORMALISER] += self._normaliser_terms(logits_BS, filtered_BS, chunk).sum(dim=1)
            sums_5B[TARGET, chunk.target_images] = logits_BS[targets]
            if self._smoothing:
                counts_BS = self._counts(filtered_BS, chunk)
                sums_5B[CLASSES] += counts_BS.sum(dim=1)
                counted_BS = counts_BS * logits_BS
                counted_BS[targets] = with_margin(logits_BS[targets], self._config)
                sums_5B[TOTAL] += counted_BS.sum(dim=1)
            if best:
                torch.maximum(sums_5B[BEST], logits_BS.amax(dim=1), out=sums_5B[BEST])
            if self.keep:
                self._kept.append((read, logits_BR, lengths_R))
            else:
                self._release(index, read)
        return sums_5B

    def results(self, queries_BD: Tensor, sums_5B: Tensor) -> tuple[Tensor, Tensor]:
        """See `softmax.ProxyStep`."""
        wanted_B = with_margin(sums_5B[TARGET], self._config)
        if self._smoothing:
            mean_B = sums_5B[TOTAL] / sums_5B[CLASSES]
            wanted_B = (1 - self._smoothing) * wanted_B + self._smoothing * mean_B
        losses_B = sums_5B[NORMALISER].log() + self._shift - wanted_B
        right_B = (sums_5B[TARGET] >= sums_5B[BEST]).float()
        finite_2B = torch.stack([queries_BD.sum(dim=1), sums_5B[NORMALISER].log()]).isfinite()
        return torch.stack([losses_B, right_B]).mean(dim=1), finite_2B

    def _updates(self, queries_BD: Tensor, sums_5B: Tensor, grad_loss: Tensor, *, lr: float) -> Tensor:
        grad_image = grad_loss / len(queries_BD)
        scaled_BD = queries_BD / self._temperature
        grad_queries_BD = torch.zeros_like(queries_BD)
        for index, chunk in enumerate(self.chunks):
            if self.keep:
                read, logits_BR, lengths_R = self._kept.pop(0)
            else:
                read = self._read(index)
                logits_BR, lengths_R = self._logits(queries_BD, read[0])
            weight_RD = read[0]
            logits_BS, nearest_BS = self._nearest(logits_BR)
            filtered_BS = self._filtered(logits_BS, chunk)
            targets = chunk.target_images, chunk.target_columns
            grad_BS = self._normaliser_terms(logits_BS, filtered_BS, chunk)
            grad_BS *= (grad_image / sums_5B[NORMALISER])[:, None]
            grad_BS[targets] -= (1 - self._smoothing) * grad_image
            if self._smoothing:
                shares_B1 = (self._smoothing * grad_image / sums_5B[CLASSES])[:, None]
                grad_BS -= self._counts(filtered_BS, chunk) * shares_B1
            if self._config.margin_kind == "angular":
                grad_BS[targets] *= slope_of_angular_margin(logits_BS[targets], self._config)
            grad_BR = grad_BS if nearest_BS is None else self._to_nearest(grad_BS, nearest_BS)
            # Logits are divided by the proxy's length, so the loss does not depend on it: remove the component of
            # the gradient along the proxy.
            along_R = logits_BR.mul_(grad_BR).sum(dim=0).div_(lengths_R.square())
            shrink_R = self._optimizer.weight_decay - along_R
            grad_BR /= lengths_R
            grad_queries_BD.addmm_(grad_BR, weight_RD)
            grad_RD = (grad_BR.T @ scaled_BD).addcmul_(weight_RD, shrink_R[:, None])
            self._optimizer.update(chunk.rows, read, grad_RD, lr=lr, step=self.step)
            self._release(index, read)
        num_updated = self._config.per_class * sum(chunk.num_classes for chunk in self.chunks)
        self._optimizer.finish_step(num_updated, lr=lr)
        return grad_queries_BD.div_(self._temperature)

    def _read(self, index: int) -> Read:
        chunk = self.chunks[index]
        out = self._spare.popleft() if self._spare else None
        if out is not None and len(out[0]) != self._config.per_class * chunk.num_classes:
            out = None
        return self._optimizer.read(chunk.rows, out=out)

    def _release(self, index: int, read: Read) -> None:
        if not isinstance(self.chunks[index].rows, slice):  # a slice may be a view of the table itself
            self._spare.append(read)

    def _logits(self, queries_BD: Tensor, weight_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits `[B, R]` and the lengths of the proxies `[R]`."""
        lengths_R = torch.linalg.vector_norm(weight_RD, dim=1).clamp_min_(1e-12)
        logits_BR = queries_BD @ weight_RD.T
        return logits_BR.div_(lengths_R * self._temperature), lengths_R

    def _nearest(self, logits_BR: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits of classes `[B, S]` and, if these have several proxies, which is the nearest `[B, S]`."""
        if self._config.per_class == 1:
            return logits_BR, None
        logits_BS, nearest_BS = logits_BR.unflatten(1, (-1, self._config.per_class)).max(dim=2)
        return logits_BS, nearest_BS

    def _to_nearest(self, grad_BS: Tensor, nearest_BS: Tensor) -> Tensor:
        """Return the gradient of all logits `[B, R]`: zero but for the nearest proxies."""
        grad_BSK = grad_BS.new_zeros(*grad_BS.shape, self._config.per_class)
        return grad_BSK.scatter_(2, nearest_BS[..., None], grad_BS[..., None]).flatten(1)

    def _filtered(self, logits_BS: Tensor, chunk: Chunk) -> Tensor | None:
        """Return which classes are left out of which images' losses `[B, S]`; None if none are."""
        if self._config.filter_above is None:
            return None
        filtered_BS = logits_BS > self._config.filter_above / self._temperature
        filtered_BS[chunk.target_images, chunk.target_columns] = False
        return filtered_BS

    def _counts(self, filtered_BS: Tensor | None, chunk: Chunk) -> Tensor:
        """Return the number of classes that each stands for: `[B, S]`, or `[1, S]` if the same for all images."""
        counts_1S = chunk.weighted(torch.ones(1, chunk.num_classes))
        return counts_1S if filtered_BS is None else counts_1S.masked_fill(filtered_BS, 0)

    def _normaliser_terms(self, logits_BS: Tensor, filtered_BS: Tensor | None, chunk: Chunk) -> Tensor:
        """Return the terms of the normaliser `[B, S]`, multiplied by e^-shift."""
        terms_BS = chunk.weighted((logits_BS - self._shift).exp_() if self._shift > 0 else logits_BS.exp())
        if filtered_BS is not None:
            terms_BS.masked_fill_(filtered_BS, 0)
        if self._config.margin > 0:
            targets = chunk.target_images, chunk.target_columns
            terms_BS[targets] = (with_margin(logits_BS[targets], self._config) - self._shift).exp_()
        return terms_BS

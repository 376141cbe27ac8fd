"""The Normalized Softmax Loss over a class-proxy matrix that is partitioned across workers.

Letters in tensor names: b images of this worker, B images of the global batch, S sampled classes in one chunk of this
worker, D dimensions, K sums over the classes.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsl_dist.proxies.optimizer import DeferredSGD, RowwiseAdagrad
from nsl_dist.proxies.table import Rows

# float32 spans e^-87 to e^88 and logits lie in [-1/t, 1/t]. Shifting the upper end to e^60 leaves e^28 for the sum over
# classes, and no maximum over all workers' logits is needed for temperatures down to 2 / (60 + 87).
HIGHEST_EXPONENT = 60.0
LOWEST_TEMPERATURE = 2 / (HIGHEST_EXPONENT + 87)


@dataclass(frozen=True)
class Chunk:
    """Sampled classes of this worker that are processed together."""

    rows: Rows
    num_rows: int
    target_images: Tensor
    """Images of the global batch whose class is in this chunk."""
    target_columns: Tensor
    """Index of each such image's class in the chunk."""
    multiplicity_S: Tensor | None
    """Number of classes that each one represents in the normaliser; None means one."""


@dataclass
class SampledProxies:
    """This worker's proxies in one iteration: read in the forward pass, updated in the backward pass."""

    chunks: list[Chunk]
    optimizer: DeferredSGD | RowwiseAdagrad
    step: int
    keep: bool
    """Keep proxies and logits for the backward pass instead of computing them again."""
    spare: deque[tuple[Tensor, Tensor]]
    """Buffers of earlier reads, for reuse: allocating costs more than reading into them."""
    num_finished: int
    """Number of finished optimiser steps when the proxies were read."""
    prefetched: list[tuple[Tensor, Tensor]] | None = None
    """Output of the optimiser's `read` for each chunk, if it was called ahead of time."""

    def read(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return the proxies `[S, D]` of a chunk and their optimiser state."""
        if self.prefetched:
            return self.prefetched[chunk]
        out = self.spare.popleft() if self.spare else None
        if out is not None and len(out[0]) != self.chunks[chunk].num_rows:
            out = None
        return self.optimizer.read(self.chunks[chunk].rows, out=out)

    def release(self, chunk: int, read: tuple[Tensor, Tensor]) -> None:
        """Return the output of `read` for reuse."""
        if not isinstance(self.chunks[chunk].rows, slice):  # a slice may be a view of the table itself
            self.spare.append(read)


class _PartitionedNormalizedSoftmax(torch.autograd.Function):
    """Cross-entropy over classes that are partitioned across workers, and the update of their proxies.

    Collectives in the forward pass: one all-gather of embeddings (b x D floats per worker), one all-reduce of 2 x B
    floats (4 x B with label smoothing), and another of B floats if accuracy is measured. In the backward pass: one
    reduce-scatter of B x D floats. Partitions may differ in size or be empty; b must be the same on all workers.

    Proxies have no gradient tensor. Each chunk's gradient goes to the optimiser as soon as it is computed, so the extra
    memory is that of one chunk, or of all sampled classes if they are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings_bD: Tensor,
        proxies: SampledProxies,
        lr: float,
        temperature: float,
        smoothing: float,
        group: dist.ProcessGroup | None,
        accuracy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        embeddings_BD = _all_gather(embeddings_bD, group)
        ctx.queries_BD = embeddings_BD / temperature
        ctx.shift = max(0.0, 1 / temperature - HIGHEST_EXPONENT)
        # Normaliser and target; with label smoothing also the sum of logits and the number of classes they represent.
        sums_KB = embeddings_BD.new_zeros(4 if smoothing else 2, len(embeddings_BD))
        best_B = embeddings_BD.new_full((len(embeddings_BD),), -math.inf)
        ctx.kept = []
        for index, chunk in enumerate(proxies.chunks):
            read = proxies.read(index)
            logits_BS, lengths_S = _logits(ctx.queries_BD, read[0])
            sums_KB[0] += _normaliser_terms(logits_BS, chunk, ctx.shift).sum(dim=1)
            if accuracy is not None:
                torch.maximum(best_B, logits_BS.amax(dim=1), out=best_B)
            sums_KB[1, chunk.target_images] = logits_BS[chunk.target_images, chunk.target_columns]
            if smoothing:
                sums_KB[2] += logits_BS.sum(dim=1) if chunk.multiplicity_S is None else logits_BS @ chunk.multiplicity_S
                sums_KB[3] += chunk.num_rows if chunk.multiplicity_S is None else chunk.multiplicity_S.sum()
            if proxies.keep:
                ctx.kept.append((read, logits_BS, lengths_S))
            else:
                proxies.release(index, read)
        if group is not None:
            dist.all_reduce(sums_KB, group=group)
            if accuracy is not None:
                dist.all_reduce(best_B, dist.ReduceOp.MAX, group=group)
        normaliser_B, target_B = sums_KB[:2]
        if accuracy is not None:
            accuracy.copy_((target_B >= best_B).float().mean())
        ctx.normaliser_B, ctx.proxies = normaliser_B, proxies
        ctx.lr, ctx.temperature, ctx.group, ctx.smoothing = lr, temperature, group, smoothing
        wanted_B = target_B
        if smoothing:
            ctx.num_classes = sums_KB[3, 0]
            wanted_B = (1 - smoothing) * target_B + smoothing * sums_KB[2] / ctx.num_classes
        finite_2B = torch.stack([embeddings_BD.sum(dim=1), normaliser_B]).isfinite()
        ctx.mark_non_differentiable(finite_2B)
        return (normaliser_B.log() + ctx.shift - wanted_B).mean(), finite_2B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        proxies, queries_BD = ctx.proxies, ctx.queries_BD
        if proxies.optimizer.num_finished != proxies.num_finished:
            raise RuntimeError(
                "the proxies were updated since this loss was computed; call loss and backward in turn, once each"
            )
        grad_image = grad_loss / len(queries_BD)
        grad_queries_BD = torch.zeros_like(queries_BD)
        with torch.autocast(queries_BD.device.type, enabled=False):
            for index, chunk in enumerate(proxies.chunks):
                if proxies.keep:
                    read, logits_BS, lengths_S = ctx.kept[index]
                    ctx.kept[index] = None
                else:
                    read = proxies.read(index)
                    logits_BS, lengths_S = _logits(queries_BD, read[0])
                weight_SD = read[0]
                grad_BS = _normaliser_terms(logits_BS, chunk, ctx.shift)
                grad_BS *= (grad_image / ctx.normaliser_B)[:, None]
                grad_BS[chunk.target_images, chunk.target_columns] -= (1 - ctx.smoothing) * grad_image
                if ctx.smoothing:
                    share = ctx.smoothing * grad_image / ctx.num_classes
                    grad_BS -= share if chunk.multiplicity_S is None else share * chunk.multiplicity_S
                # Logits are divided by the proxy's length, so the loss does not depend on it: remove the component of
                # the gradient along the proxy.
                along_S = logits_BS.mul_(grad_BS).sum(dim=0).div_(lengths_S.square())
                shrink_S = proxies.optimizer.weight_decay - along_S
                grad_BS /= lengths_S
                grad_queries_BD.addmm_(grad_BS, weight_SD)
                grad_SD = (grad_BS.T @ queries_BD).addcmul_(weight_SD, shrink_S[:, None])
                proxies.optimizer.update(chunk.rows, read, grad_SD, lr=ctx.lr, step=proxies.step)
                proxies.release(index, read)
            proxies.optimizer.finish_step(sum(chunk.num_rows for chunk in proxies.chunks), lr=ctx.lr)
        grad_embeddings_bD = _reduce_scatter(grad_queries_BD.div_(ctx.temperature), ctx.group)
        if ctx.group is not None:
            # DDP averages the backbone's gradients over ranks; this loss is already a mean over the global batch.
            grad_embeddings_bD *= dist.get_world_size(ctx.group)
        return grad_embeddings_bD, None, None, None, None, None, None


def _logits(queries_BD: Tensor, weight_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits `[B, S]` and the lengths of the proxies `[S]`."""
    lengths_S = torch.linalg.vector_norm(weight_SD, dim=1).clamp_min_(1e-12)
    return (queries_BD @ weight_SD.T).div_(lengths_S), lengths_S


def _normaliser_terms(logits_BS: Tensor, chunk: Chunk, shift: float) -> Tensor:
    """Return the terms of the normaliser `[B, S]`, scaled by e^-shift."""
    terms_BS = (logits_BS - shift).exp_() if shift > 0 else logits_BS.exp()
    return terms_BS if chunk.multiplicity_S is None else terms_BS.mul_(chunk.multiplicity_S)


def _all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return local
    gathered = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered


def _reduce_scatter(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return partial
    local = partial.new_empty(len(partial) // dist.get_world_size(group), *partial.shape[1:])
    dist.reduce_scatter_tensor(local, partial.contiguous(), group=group)
    return local


def normalized_softmax_loss(
    embeddings_bD: Tensor,
    proxies: SampledProxies,
    *,
    lr: float,
    temperature: float = 0.05,
    smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    accuracy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the Normalized Softmax Loss (paper, section 3.1) of the global batch over all workers' sampled classes.

    This is cross-entropy on cosine similarity divided by temperature, in float32 regardless of autocast. Every worker
    gets the same value. `backward()` updates the proxies. The gradient of `embeddings_bD` is multiplied by the world
    size, because DistributedDataParallel averages over ranks.

    Args:
        embeddings_bD: this worker's embeddings, not necessarily normalised. b must be the same on every worker.
        proxies: this worker's sampled classes. Exactly one worker must hold the class of each image.
        lr: learning rate of the proxies.
        temperature: sigma in the paper; at least `LOWEST_TEMPERATURE`.
        smoothing: fraction of each label that is spread evenly over all classes, including those that sampled classes
            represent.
        group: workers that share the classes; None for a single worker.
        accuracy: scalar to overwrite with the fraction of the global batch whose class is the nearest of all sampled
            ones. None skips this additional pass over the logits.

    Returns:
        The loss, and a `[2, B]` tensor that tells for each image of the global batch whether its embedding and its
        normaliser are finite.

    Raises:
        ValueError: the temperature is too low for float32.

    """
    if temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature} is below {LOWEST_TEMPERATURE:.4f}, the lowest that float32 can represent"
        )
    with torch.autocast(embeddings_bD.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _PartitionedNormalizedSoftmax.apply(
            F.normalize(embeddings_bD.float()), proxies, lr, temperature, smoothing, group, accuracy
        )
    return result


def split_into_chunks(
    rows: NDArray[np.int64],
    labels_B: NDArray[np.int64],
    *,
    rows_at_once: int,
    multiplicity: float | None,
    table_device: torch.device,
    device: torch.device,
) -> list[Chunk]:
    """Split this worker's sampled classes into chunks.

    Args:
        rows: rows of the sampled classes, ascending and distinct.
        labels_B: row of each image's class; outside [0, C) if another worker owns it.
        rows_at_once: classes per chunk.
        multiplicity: number of classes that a sampled class without images represents; None means one.
        table_device: device that stores the rows.
        device: device that processes them.

    """
    columns_B = np.searchsorted(rows, labels_B)
    sampled_B = columns_B < len(rows)
    sampled_B[sampled_B] = rows[columns_B[sampled_B]] == labels_B[sampled_B]
    chunks = []
    for start in range(0, len(rows), rows_at_once):
        part = rows[start : start + rows_at_once]
        images = np.flatnonzero(sampled_B & (columns_B >= start) & (columns_B < start + len(part)))
        columns = torch.from_numpy(columns_B[images] - start).to(device, non_blocking=True)
        multiplicity_S = None
        if multiplicity is not None:
            multiplicity_S = torch.full((len(part),), multiplicity, device=device).index_fill_(0, columns, 1.0)
        consecutive = part[-1] - part[0] + 1 == len(part)
        chunks.append(
            Chunk(
                rows=slice(int(part[0]), int(part[-1]) + 1)
                if consecutive
                else torch.from_numpy(part).to(table_device, non_blocking=True),
                num_rows=len(part),
                target_images=torch.from_numpy(images).to(device, non_blocking=True),
                target_columns=columns,
                multiplicity_S=multiplicity_S,
            )
        )
    return chunks

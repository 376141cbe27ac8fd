"""The Normalized Softmax Loss over a class-proxy matrix partitioned over the workers.

Letters of tensor names: b images of this worker, B images of the global batch, S sampled classes of one chunk of this
worker's, D dimensions, K sums over the classes.
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

# float32 spans e^-87 to e^88. Logits lie in [-1/t, 1/t]; moving the upper end to e^60 leaves e^28 for the sum over
# classes and makes every temperature down to 2 / (60 + 87) exact without the maximum over all workers' logits.
HIGHEST_EXPONENT = 60.0
LOWEST_TEMPERATURE = 2 / (HIGHEST_EXPONENT + 87)


@dataclass(frozen=True)
class Chunk:
    """Sampled classes of this worker that are worked on at once."""

    rows: Rows
    num_rows: int
    target_images: Tensor
    """Images of the global batch whose class is in this chunk."""
    target_columns: Tensor
    """The place of their class in the chunk."""
    multiplicity_S: Tensor | None
    """How many classes each one stands for in the normaliser; None: one."""


@dataclass
class SampledProxies:
    """This worker's proxies in one iteration: read in the forward pass, updated in the backward pass."""

    chunks: list[Chunk]
    optimizer: DeferredSGD | RowwiseAdagrad
    step: int
    keep: bool
    """Keep proxies and logits from the forward to the backward pass, or make them again."""
    spare: deque[tuple[Tensor, Tensor]]
    """Memory that earlier reads are done with: new memory costs more than what is read into it."""
    num_finished: int
    """Steps that the optimiser had done when the proxies were read."""
    prefetched: list[tuple[Tensor, Tensor]] | None = None
    """What the optimiser read for each chunk, where that was done ahead."""

    def read(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return the proxies of a chunk `[S, D]` and what else the optimiser keeps of them."""
        if self.prefetched:
            return self.prefetched[chunk]
        out = self.spare.popleft() if self.spare else None
        if out is not None and len(out[0]) != self.chunks[chunk].num_rows:
            out = None
        return self.optimizer.read(self.chunks[chunk].rows, out=out)

    def release(self, chunk: int, read: tuple[Tensor, Tensor]) -> None:
        """Give back what `read` returned, to be used again."""
        if not isinstance(self.chunks[chunk].rows, slice):  # which may be a view of the table itself
            self.spare.append(read)


class _PartitionedNormalizedSoftmax(torch.autograd.Function):
    """Cross-entropy whose classes are spread over the workers, and the update of their proxies.

    Collectives: forward, one all-gather of embeddings (b x D floats a worker) and one all-reduce of 2 x B floats (4 x B
    with label smoothing), and where accuracy is measured another of B floats; backward, one reduce-scatter of B x D
    floats. Partitions may differ in size, an empty one included; b may not.

    Proxies have no gradient tensor: each chunk's gradient goes to the optimiser as soon as it is there, so that beside
    the tables no memory is needed but for a chunk, or for all sampled classes where they are kept.
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
        # Normaliser and target; for label smoothing also all logits and how many classes they stand for.
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
                # A logit is the product with a proxy over the proxy's length, on which the loss does not depend: what
                # the gradient has along the proxy is taken off.
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
    """Return the logits `[B, S]` and the proxies' lengths `[S]`."""
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

    Cross-entropy on cosine similarity over temperature, in float32 whatever the autocast. Every worker gets the same
    value. `backward()` updates the proxies. The gradient of `embeddings_bD` is scaled by the world size, for a model
    under DistributedDataParallel, which averages over ranks.

    Args:
        embeddings_bD: this worker's embeddings, of any length; normalised here. b must be the same on every worker.
        proxies: this worker's part of the sampled classes; together the workers hold the class of every image once.
        lr: learning rate of the proxies.
        temperature: sigma of the paper; at least `LOWEST_TEMPERATURE`.
        smoothing: share of each image's label that is spread evenly over all classes, those that sampled ones stand for
            included.
        group: the workers that share the classes; None computes alone.
        accuracy: a scalar that is overwritten with the share of the images of the global batch whose own class is the
            nearest of all that were sampled; None: it is not measured, which spares one more look at every logit.

    Returns:
        The loss, and for each image of the global batch, `[2, B]`, whether its embedding and its normaliser are finite.

    Raises:
        ValueError: the temperature is below float32's reach.

    """
    if temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"temperature {temperature} is below {LOWEST_TEMPERATURE:.4f}, which float32 can express")
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
    """Cut this worker's sampled classes into chunks.

    Args:
        rows: of the sampled classes, ascending and distinct.
        labels_B: the row of each image's class; outside [0, C) where another worker owns it.
        rows_at_once: classes in a chunk.
        multiplicity: how many classes a sampled one that no image belongs to stands for; None: one.
        table_device: where the rows are kept.
        device: where they are worked on.

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

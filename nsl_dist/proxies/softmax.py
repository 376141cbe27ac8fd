"""The Normalized Softmax Loss over a class-proxy matrix that is partitioned across workers.

Letters in tensor names: b images of this worker, B images of the global batch, S sampled classes in one chunk of this
worker, R proxies of these, which are as many unless classes have several, D dimensions.
"""

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsl_dist.config import ProxyConfig

# float32 spans e^-87 to e^88 and logits lie in [-1/t, 1/t]. Shifting the upper end to e^60 leaves e^28 for the sum over
# classes, and no maximum over all workers' logits is needed for temperatures down to 2 / (60 + 87). A margin may put
# the logit of an image's own class below, which matters only if all others are left out of its loss.
HIGHEST_EXPONENT = 60.0
LOWEST_TEMPERATURE = 2 / (HIGHEST_EXPONENT + 87)

# Rows of `sums_5B`, over all sampled classes: terms of the normaliser, multiplied by e^-shift, the logit of the image's
# own class, without its margin, logits, classes that they represent; and the highest logit, without a margin. Only the
# last is not a sum.
NORMALISER, TARGET, TOTAL, CLASSES, BEST = range(5)


def shift_of(temperature: float) -> float:
    """Return what is subtracted from logits before the exponential."""
    return max(0.0, 1 / temperature - HIGHEST_EXPONENT)


# Of the square of a sine: rounding leaves nothing of it where the cosine is nearly 1.
LEAST_SQUARED_SINE = 1e-7


def with_margin(logits: Tensor, config: ProxyConfig) -> Tensor:
    """Return the logits of images' own classes with the margin that `config` sets.

    CosFace (Wang et al. 2018, equation 4) subtracts it from the cosine; ArcFace (Deng et al. 2019, equation 3) adds it
    to the angle. Where that would exceed 180 degrees, the cosine is reduced by m sin m, so that it still falls with the
    angle, as in the authors' code.
    """
    margin, scale = config.margin, 1 / config.temperature
    if config.margin_kind == "cosine":
        return logits - margin * scale
    cosines, sines = _cosines_and_sines(logits, config)
    turned = cosines * math.cos(margin) - sines * math.sin(margin)
    return torch.where(cosines > -math.cos(margin), turned, cosines - margin * math.sin(margin)) * scale


def slope_of_angular_margin(logits: Tensor, config: ProxyConfig) -> Tensor:
    """Return the derivative of `with_margin` if the margin is angular; that of the other kind is 1."""
    cosines, sines = _cosines_and_sines(logits, config)
    slopes = math.cos(config.margin) + cosines / sines * math.sin(config.margin)
    return torch.where(cosines > -math.cos(config.margin), slopes, 1.0)


def _cosines_and_sines(logits: Tensor, config: ProxyConfig) -> tuple[Tensor, Tensor]:
    cosines = logits * config.temperature
    return cosines, (1 - cosines.square()).clamp_min(LEAST_SQUARED_SINE).sqrt()


class ProxyStep(Protocol):
    """One worker's sampled proxies in one iteration: read in the forward pass, updated in the backward pass."""

    @property
    def is_current(self) -> bool:
        """The proxies were not updated since they were read."""

    def normalise(self, embeddings_bD: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings divided by their lengths, in the type of the products, and the lengths `[b]`."""

    def normalise_backward(self, grad_queries_bD: Tensor, embeddings_bD: Tensor, lengths_b: Tensor) -> Tensor:
        """Return the gradient of `normalise`."""

    def forward(self, queries_BD: Tensor, *, best: bool) -> Tensor:
        """Return `sums_5B` over this worker's sampled classes; the highest logit only if `best` is set."""

    def results(self, queries_BD: Tensor, sums_5B: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy `[2]`, and `[2, B]`: 1 where embeddings are finite, and normalisers and not zero."""

    def backward(self, queries_BD: Tensor, sums_5B: Tensor, grad_loss: Tensor, *, lr: float) -> Tensor:
        """Update the proxies; return this worker's part of the gradient of the queries `[B, D]`."""


class _PartitionedNormalizedSoftmax(torch.autograd.Function):
    """Cross-entropy over classes that are partitioned across workers, and the update of their proxies.

    Collectives in the forward pass: one all-gather of embeddings (b x D numbers per worker), one all-reduce of 4 x B
    floats, and another of B floats if accuracy is measured. In the backward pass: one reduce-scatter of the gradient of
    the embeddings (B x D floats per worker). Every worker computes the loss of the global batch. Partitions may differ
    in size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings_bD: Tensor,
        step: ProxyStep,
        lr: float,
        group: dist.ProcessGroup | None,
        accuracy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        queries_bD, lengths_b = step.normalise(embeddings_bD)
        queries_BD = _all_gather(queries_bD, group)
        sums_5B = step.forward(queries_BD, best=accuracy is not None)
        if group is not None:
            dist.all_reduce(sums_5B[:BEST], group=group)
            if accuracy is not None:
                dist.all_reduce(sums_5B[BEST], dist.ReduceOp.MAX, group=group)
        means_2, finite_2B = step.results(queries_BD, sums_5B)
        if accuracy is not None:
            accuracy.copy_(means_2[1])
        ctx.step, ctx.lr, ctx.group = step, lr, group
        ctx.save_for_backward(embeddings_bD, lengths_b, queries_BD, sums_5B)
        ctx.mark_non_differentiable(finite_2B)
        return means_2[0], finite_2B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        if not ctx.step.is_current:
            raise RuntimeError(
                "the proxies were updated since this loss was computed; call loss and backward in turn, once each"
            )
        embeddings_bD, lengths_b, queries_BD, sums_5B = ctx.saved_tensors
        with torch.autocast(queries_BD.device.type, enabled=False):
            grad_queries_BD = ctx.step.backward(queries_BD, sums_5B, grad_loss, lr=ctx.lr)
            grad_queries_bD = _reduce_scatter(grad_queries_BD, ctx.group)
            if ctx.group is not None:
                # DDP averages the backbone's gradients over ranks; this loss is already a mean over the global batch.
                grad_queries_bD *= dist.get_world_size(ctx.group)
            grad_bD = ctx.step.normalise_backward(grad_queries_bD, embeddings_bD, lengths_b)
        return grad_bD, None, None, None, None


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
    step: ProxyStep,
    *,
    lr: float,
    group: dist.ProcessGroup | None = None,
    accuracy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the Normalized Softmax Loss (paper, section 3.1) of the global batch over all workers' sampled classes.

    This is cross-entropy on cosine similarity divided by temperature, after the margin if there is one. It is float32
    but for the inputs of the products, regardless of autocast. Every worker gets the same value. `backward()` updates
    the proxies. The gradient of `embeddings_bD` is multiplied by the world size, because DistributedDataParallel
    averages over ranks.

    Args:
        embeddings_bD: this worker's embeddings, not necessarily normalised. b must be the same on every worker.
        step: this worker's sampled classes. Exactly one worker must hold the class of each image.
        lr: learning rate of the proxies.
        group: workers that share the classes; None for a single worker.
        accuracy: scalar to overwrite with the fraction of the global batch whose class is the nearest of all sampled
            ones.

    Returns:
        The loss, and a `[2, B]` tensor with 1 for each image of the global batch whose embedding, and whose normaliser,
        is finite and not zero, and 0 for others.

    """
    with torch.autocast(embeddings_bD.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _PartitionedNormalizedSoftmax.apply(embeddings_bD, step, lr, group, accuracy)
    return result

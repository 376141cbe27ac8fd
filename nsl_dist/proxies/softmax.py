"""The Normalized Softmax Loss over a class-proxy matrix partitioned over the workers.

Letters of tensor names: b images of this worker, B images of the global batch, S sampled classes of this worker,
D dimensions.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# float32 spans e^-87 to e^88. Logits lie in [-1/t, 1/t]; moving the upper end to e^60 leaves e^28 for the sum over
# classes and makes every temperature down to 2 / (60 + 87) exact without the maximum over all workers' logits.
HIGHEST_EXPONENT = 60.0
LOWEST_TEMPERATURE = 2 / (HIGHEST_EXPONENT + 87)


class _PartitionedNormalizedSoftmax(torch.autograd.Function):
    """Cross-entropy whose classes are spread over the workers.

    Collectives: forward, one all-gather of embeddings (b x D floats a worker) and one all-reduce of 2 x B floats;
    backward, one reduce-scatter of B x D floats. Partitions may differ in S, an empty one included; b may not differ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings_bD: Tensor,
        proxies_SD: Tensor,
        columns_B: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        embeddings_BD = _all_gather(embeddings_bD, group)
        lengths_S = proxies_SD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        directions_SD = proxies_SD / lengths_S
        logits_BS = embeddings_BD @ directions_SD.T
        logits_BS /= temperature

        mine_B = columns_B >= 0
        rows = mine_B.nonzero().squeeze(1)
        columns = columns_B[rows]
        shift = max(0.0, 1 / temperature - HIGHEST_EXPONENT)
        target_B = logits_BS.new_zeros(len(logits_BS)).index_put_((rows,), logits_BS[rows, columns])
        exp_BS = logits_BS.sub_(shift).exp_()
        sums_2B = torch.stack([exp_BS.sum(dim=1), target_B])
        if group is not None:
            dist.all_reduce(sums_2B, group=group)
        normaliser_B, target_B = sums_2B

        probabilities_BS = exp_BS.div_(normaliser_B[:, None])
        ctx.save_for_backward(embeddings_BD, directions_SD, lengths_S, probabilities_BS, rows, columns)
        ctx.temperature, ctx.group = temperature, group
        return (normaliser_B.log() + shift - target_B).mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        embeddings_BD, directions_SD, lengths_S, probabilities_BS, rows, columns = ctx.saved_tensors
        grad_BS = probabilities_BS.clone()
        grad_BS[rows, columns] -= 1
        grad_BS *= grad_outputs[0] / (len(embeddings_BD) * ctx.temperature)

        grad_directions_SD = grad_BS.T @ embeddings_BD
        along_S = (grad_directions_SD * directions_SD).sum(dim=1, keepdim=True)
        grad_proxies_SD = (grad_directions_SD - along_S * directions_SD) / lengths_S

        grad_embeddings_bD = _reduce_scatter(grad_BS @ directions_SD, ctx.group)
        if ctx.group is not None:
            # DDP averages the backbone's gradients over ranks; this loss is already a mean over the global batch.
            grad_embeddings_bD *= dist.get_world_size(ctx.group)
        return grad_embeddings_bD, grad_proxies_SD, None, None, None


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
    proxies_SD: Tensor,
    columns_B: Tensor,
    *,
    temperature: float = 0.05,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute the Normalized Softmax Loss (paper, section 3.1) of the global batch over all workers' sampled classes.

    Cross-entropy on cosine similarity over temperature, in float32 whatever the autocast. Every worker gets the same
    value. The gradient of `proxies_SD` is complete on its owner. That of `embeddings_bD` is scaled by the world size,
    for a model under DistributedDataParallel, which averages over ranks.

    Args:
        embeddings_bD: this worker's embeddings, of any length; normalised here. b must be the same on every worker.
        proxies_SD: this worker's sampled proxies, not normalised.
        columns_B: for each image of the global batch, in rank order, the row of `proxies_SD` that is its class, or -1
            where another worker owns the class.
        temperature: sigma of the paper; at least `LOWEST_TEMPERATURE`.
        group: the workers that share the classes; None computes alone.

    Raises:
        ValueError: the shapes contradict each other or the temperature is below float32's reach.

    """
    world_size = 1 if group is None else dist.get_world_size(group)
    if len(columns_B) != world_size * len(embeddings_bD):
        raise ValueError(
            f"columns_B has {len(columns_B)} entries, expected world size {world_size} x {len(embeddings_bD)} images "
            f"of this worker = {world_size * len(embeddings_bD)}"
        )
    if temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"temperature {temperature} is below {LOWEST_TEMPERATURE:.4f}, which float32 can express")
    with torch.autocast(embeddings_bD.device.type, enabled=False):
        loss: Tensor = _PartitionedNormalizedSoftmax.apply(
            F.normalize(embeddings_bD.float()), proxies_SD.float(), columns_B, temperature, group
        )
    return loss

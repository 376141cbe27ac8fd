"""How the model is updated: its optimiser, which of its parameters are frozen, and the average of its weights."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nsl_dist.config import OptimConfig
from nsl_dist.model import TIMM, EmbeddingModel

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def build_optimizer(model: EmbeddingModel, config: OptimConfig) -> torch.optim.Optimizer | None:
    """Return an optimiser of the parameters that require gradients, or None if there are none.

    Parameters are grouped by learning rate and weight decay: a single group, unless the configuration tells some from
    others, because each group costs launches of kernels. The learning rate of a group is its `lr_scale` times that of
    the schedule.

    Raises:
        ValueError: layers are to differ in their learning rate, but nothing names the backbone's layers.

    """
    scales = _layer_scales(model, config.layer_decay)
    if model.linear is not None:
        scales[model.linear.weight] = config.new_layers_lr_scale
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            weight_decay = config.weight_decay if config.decay_norms or parameter.ndim > 1 else 0.0
            groups.setdefault((scales.get(parameter, 1.0), weight_decay), []).append(parameter)
    if not groups:
        return None
    options: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scale, "weight_decay": weight_decay}
        for (scale, weight_decay), parameters in groups.items()
    ]
    fused = next(model.parameters()).is_cuda
    if config.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=config.lr, betas=(config.momentum, config.beta2), fused=fused)
    return torch.optim.SGD(options, lr=config.lr, momentum=config.momentum, fused=fused)


def _layer_scales(model: EmbeddingModel, layer_decay: float) -> dict[Tensor, float]:
    """Return the learning rate of the backbone's parameters relative to its topmost layer's, as timm has it."""
    if layer_decay == 1:
        return {}
    # torchvision's models do not name their layers: timm would take every twelve parameters of them for one.
    if not hasattr(model.network, "group_matcher"):
        raise ValueError(
            f"--optim.layer-decay {layer_decay} needs a backbone whose layers timm names, and "
            f"{type(model.network).__name__} is none; choose a --model.backbone {TIMM}NAME, or --optim.layer-decay 1"
        )
    import timm.optim

    groups = timm.optim.param_groups_layer_decay(model.network, layer_decay=layer_decay)
    return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}


def freeze(model: EmbeddingModel, expression: str) -> list[nn.Module]:
    """Freeze the parameters of the backbone whose name begins with a match of a regular expression.

    Returns:
        The batch norms without any other parameters, whose statistics are to stay as well.

    Raises:
        ValueError: no name matches.

    """
    names = [name for name, _ in model.network.named_parameters()]
    matches = {name for name in names if re.match(expression, name)}
    if not matches:
        raise ValueError(
            f"--optim.frozen {expression!r} matches no parameter of the backbone; the first of its {len(names)} are: "
            f"{', '.join(names[:10])}"
        )
    for name, parameter in model.network.named_parameters():
        if name in matches:
            parameter.requires_grad_(False)
    norms: list[nn.Module] = []
    for path, module in model.network.named_modules():
        if isinstance(module, BATCH_NORMS):
            own = {f"{path}.{name}" for name, _ in module.named_parameters()}
            if own and own <= matches:
                norms.append(module)
    return norms


class MovingAverage:
    """Exponential moving average of a model's weights, with a decay that grows from 0.1 to `decay`.

    torch.optim.swa_utils.AveragedModel waits for the device in every step. This does not, and needs no state but the
    averaged weights, since the decay is a function of the step.

    Attributes:
        model: has the averaged weights.

    """

    def __init__(self, model: EmbeddingModel, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        self._averaged: list[tuple[Tensor, Tensor]] = list(
            zip(self.model.parameters(), model.parameters(), strict=True)
        )
        self._copied: list[tuple[Tensor, Tensor]] = []
        for (name, ours), theirs in zip(self.model.named_buffers(), model.buffers(), strict=True):
            # Averaged like the weights and over the same iterations: statistics of the newest weights would not fit
            # the average. All other buffers are constants, or count batches, of which an average has no meaning.
            is_statistic = name.endswith(("running_mean", "running_var"))
            (self._averaged if is_statistic else self._copied).append((ours, theirs))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after iteration `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, currents = zip(*self._averaged, strict=True)
        get_ema_multi_avg_fn(decay)(averages, currents, step)
        for ours, theirs in self._copied:
            ours.copy_(theirs)

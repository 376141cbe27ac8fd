"""The embedding model: backbone -> pool -> LayerNorm -> linear -> L2 (paper, section 3.2)."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from nsl_dist.config import ModelConfig


class EmbeddingModel(nn.Module):
    """Images to unit vectors.

    Attributes:
        backbone: images to pooled features.
        linear: features to `dim`, without bias; None where `dim` is the feature width.

    """

    def __init__(self, backbone: nn.Module, num_features: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = num_features
        self.linear = None if dim == num_features else nn.Linear(num_features, dim, bias=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embed normalised images (see `transforms.normalise`).

        Returns:
            float32 `[B, dim]` of length 1, whatever the autocast.

        """
        features = self.backbone(images_BCHW)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            features = F.layer_norm(features.float(), (self.num_features,))
            return F.normalize(features if self.linear is None else self.linear(features))


def build_model(config: ModelConfig, *, seed: int, pretrained: bool = True) -> EmbeddingModel:
    """Build the model, its random weights drawn from `seed`.

    Args:
        config: backbone by torchvision's name, its weights, dimensions, batch norm.
        seed: of the random weights; the global generator is left as it was.
        pretrained: False leaves `config.weights` out, for a model about to load a checkpoint.

    Raises:
        ValueError: unknown backbone, one whose last layer is not linear, or weights that cannot be had.

    """
    names = torchvision.models.list_models(module=torchvision.models)
    if config.backbone not in names:
        raise ValueError(f"unknown --model.backbone {config.backbone!r}; torchvision has: {', '.join(names)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _build_backbone(config, pretrained=pretrained)
        num_features = _remove_classifier(backbone, config.backbone)
        model = EmbeddingModel(backbone, num_features, config.dim)
    if config.batch_norm == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.batch_norm == "frozen":
        _freeze_batch_norm(model)
    return model


def _build_backbone(config: ModelConfig, *, pretrained: bool) -> nn.Module:
    extra: dict[str, Any] = {}
    if config.backbone in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers are of no use to an embedding; their pretrained weights rescale the inputs.
        extra = {"aux_logits": False, "init_weights": False, "transform_input": config.weights is not None}
    if config.weights is None or not pretrained:
        return torchvision.models.get_model(config.backbone, weights=None, **extra)
    path = Path(config.weights).expanduser()
    if path.is_file():
        backbone: nn.Module = torchvision.models.get_model(config.backbone, weights=None, **extra)
        try:
            backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, UnpicklingError) as error:
            raise ValueError(f"--model.weights {path} is no state_dict of {config.backbone}: {error}") from error
        return backbone
    available = torchvision.models.get_model_weights(config.backbone)
    if config.weights not in available.__members__:
        raise ValueError(
            f"--model.weights {config.weights!r} is neither a file nor weights of {config.backbone}, which has: "
            f"{', '.join(available.__members__)}"
        )
    weights = available[config.weights]
    try:
        return torchvision.models.get_model(config.backbone, weights=weights, **extra)
    except OSError as error:
        raise ValueError(
            f"weights {config.weights} of {config.backbone} cannot be downloaded from {weights.url}: {error}; on a "
            "machine without internet put that file there and give its path as --model.weights, or train from scratch "
            "with --model.weights None"
        ) from error


def _remove_classifier(backbone: nn.Module, name: str) -> int:
    """Replace the last linear layer by the identity; return its input width."""
    path, last = list(backbone.named_modules())[-1]
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"--model.backbone {name} ends in {type(last).__name__}, not in a linear layer on pooled features; choose "
            "one like resnet50, googlenet, efficientnet_b0, convnext_tiny or vit_b_16"
        )
    parent, _, attribute = path.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, nn.Identity())
    return last.in_features


def _freeze_batch_norm(module: nn.Module) -> None:
    """Replace batch norms by fixed affine maps: running statistics and affine parameters no longer change."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)

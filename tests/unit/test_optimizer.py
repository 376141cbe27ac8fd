"""Which parameters an optimiser trains, at which rates, and options that do not fit a model."""

import dataclasses

import pytest
import torch
from torch import nn

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from nsl_dist.model import build_model
from nsl_dist.training.optimizer import build_optimizer, freeze
from nsl_dist.training.preflight import check_model

VIT = ModelConfig("timm/test_vit", dim=16)


def rates_of(config: OptimConfig, model: ModelConfig = VIT) -> dict[str, tuple[float, float]]:
    """Return scale of the learning rate and weight decay by parameter."""
    built = build_model(model, seed=0)
    optimizer = build_optimizer(built, config)
    assert optimizer is not None
    groups = {each: group for group in optimizer.param_groups for each in group["params"]}
    named = {name: groups[each] for name, each in built.named_parameters()}
    return {name: (group["lr_scale"], group["weight_decay"]) for name, group in named.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", [ModelConfig(dim=16), VIT])
def test_by_default_all_parameters_are_one_group(optimizer: str, model: ModelConfig) -> None:
    built = build_model(model, seed=0)
    config = dataclasses.replace(OptimConfig(), optimizer=optimizer)  # type: ignore[arg-type]
    ours = build_optimizer(built, config)
    assert ours is not None
    assert type(ours) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    (group,) = ours.param_groups
    assert [id(each) for each in group["params"]] == [id(each) for each in built.parameters()]
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 1e-4)


def test_norms_and_biases_may_be_free_of_weight_decay() -> None:
    rates = rates_of(OptimConfig(decay_norms=False))
    assert {name for name, (_, decay) in rates.items() if decay == 0} == {
        name for name, each in build_model(VIT, seed=0).named_parameters() if each.ndim == 1
    }
    assert rates["linear.weight"] == rates["backbone.1.blocks.0.mlp.fc1.weight"] == (1.0, 1e-4)


def test_layers_learn_more_slowly_the_lower_they_are() -> None:
    rates = rates_of(OptimConfig(layer_decay=0.5, new_layers_lr_scale=4))
    scales = [rates[f"backbone.1.blocks.{layer}.mlp.fc1.weight"][0] for layer in range(6)]
    assert scales == [2.0 ** (layer - 5) for layer in range(6)]
    assert rates["backbone.1.pos_embed"][0] == scales[0] / 2
    assert rates["backbone.1.norm.weight"][0] == 1
    assert rates["linear.weight"][0] == 4
    assert rates_of(OptimConfig(layer_decay=0.5), ModelConfig("timm/test_vit", dim=64)).keys() == rates.keys() - {
        "linear.weight"
    }


def test_a_frozen_backbone_leaves_the_linear_layer() -> None:
    model = build_model(ModelConfig(dim=16), seed=0)
    norms = freeze(model, ".*")
    assert len(norms) == sum(isinstance(each, nn.BatchNorm2d) for each in model.modules()) == 20
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["linear.weight"]
    optimizer = build_optimizer(model, OptimConfig())
    assert optimizer is not None
    assert optimizer.param_groups[0]["params"] == [model.get_parameter("linear.weight")]


@pytest.mark.parametrize(
    ("model", "optim", "message"),
    [
        (ModelConfig(), OptimConfig(layer_decay=0.5), r"--optim.layer-decay 0.5 needs a backbone .* ResNet is none"),
        (
            ModelConfig(),
            OptimConfig(frozen="blocks"),
            r"--optim.frozen 'blocks' matches no .* 60 are: conv1.weight, bn1",
        ),
        (VIT, OptimConfig(frozen="1.blocks"), r"--optim.frozen '1.blocks' matches no .* cls_token, pos_embed, "),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_at_the_start(
    model: ModelConfig, optim: OptimConfig, message: str
) -> None:
    config = TrainConfig(model=model, data=DataConfig(image_size=32), optim=optim)
    with pytest.raises(ValueError, match=message):
        check_model(config)

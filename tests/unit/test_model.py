from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from nsl_dist.config import ModelConfig, OptimConfig
from nsl_dist.model import build_model
from nsl_dist.training.schedule import Schedule

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "googlenet", "shufflenet_v2_x0_5"])
def test_embeddings_are_unit_vectors(name: str) -> None:
    model = build_model(ModelConfig(backbone=name, dim=32), seed=0).eval()
    embeddings = model(IMAGES)
    assert embeddings.shape == (2, 32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert not any(isinstance(module, nn.Linear) for module in model.backbone.modules())


def test_no_linear_at_feature_width() -> None:
    assert build_model(ModelConfig(dim=512), seed=0).linear is None
    assert build_model(ModelConfig(dim=511), seed=0).linear.weight.shape == (511, 512)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_model(ModelConfig(), seed=seed).linear.weight for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_frozen_batch_norm_ignores_the_batch() -> None:
    model = build_model(ModelConfig(batch_norm="frozen"), seed=0).train()
    torch.testing.assert_close(model(IMAGES)[:1], model(IMAGES[:1]))


def test_weights_from_a_file(tmp_path: Path) -> None:
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = build_model(ModelConfig(weights=str(tmp_path / "weights.pth")), seed=0)
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(backbone="resnet19"), "unknown --model.backbone 'resnet19'; torchvision has: .*resnet18"),
        (ModelConfig(backbone="squeezenet1_0"), "squeezenet1_0 ends in .*, not in a linear layer"),
        (
            ModelConfig(weights="IMAGENET"),
            "'IMAGENET' is neither a file nor weights of resnet18, which has: IMAG",
        ),
    ],
)
def test_clear_errors(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(config, seed=0)


def test_papers_schedule() -> None:
    config = OptimConfig(epochs=30, new_layers_epochs=1, lr=0.01, schedule="step", step_epochs=15, warmup_steps=0)
    schedule = Schedule(config, steps_per_epoch=10)
    assert (schedule.num_new_layers_steps, schedule.num_steps) == (10, 310)
    assert [schedule.learning_rate(step) for step in (0, 9, 10, 159)] == [0.01] * 4
    assert [schedule.learning_rate(step) for step in (160, 309)] == pytest.approx([0.001] * 2)


def test_cosine_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = Schedule(OptimConfig(epochs=10, lr=1.0, schedule="cosine", warmup_steps=4), steps_per_epoch=10)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.25)
    assert max(rates) <= 1.0
    assert rates[-1] < 0.001
    assert all(a > b for a, b in pairwise(rates[4:]))

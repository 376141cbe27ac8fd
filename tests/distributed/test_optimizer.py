"""The optimiser's options against plain PyTorch on one process, and checkpoints of what they add to the state."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.embedder import load_embedder
from nsl_dist.run import OPTIMIZER_FILE
from nsl_dist.schedule import Schedule
from nsl_dist.training import checkpoint
from nsl_dist.training.step import TrainingStep
from tests.support.checkpoints import write_step
from tests.support.ranks import Ranks

PLAN = ClassBalancedPlan(np.full(11, 5), batch_size=12, images_per_class=2, seed=0)  # 4 steps an epoch, 11 classes
NUM_BLOCKS = 6  # of timm's test_vit
VIT = TrainConfig(
    precision="float32",
    data=DataConfig(batch_size=12, images_per_class=2, image_size=64),
    model=ModelConfig(backbone="timm/test_vit", dim=16),
    proxies=ProxyConfig(lr_scale=100),
)
ADAMW = OptimConfig(
    epochs=13, lr=2e-4, new_layers_lr_scale=3, layer_decay=0.7, optimizer="adamw", momentum=0.8, beta2=0.98,
    weight_decay=0.05, decay_norms=False, warmup_steps=7,
)  # fmt: skip
CLIPPED = OptimConfig(epochs=13, lr=1e-4, clip_norm=100, warmup_steps=7)
# Of what a parameter moved, both sides in float32 from the features on: five times the greatest that was seen.
BOUND = 1e-5
RESNET = dataclasses.replace(
    VIT,
    data=dataclasses.replace(VIT.data, image_size=32),
    model=ModelConfig(backbone="timm/test_resnet", dim=16),
    optim=dataclasses.replace(ADAMW, epochs=2, new_layers_epochs=1, clip_norm=0.5, ema=0.9),
)


def images_of(step: int, edge: int) -> Tensor:
    labels = PLAN.batch(step).labels
    pixels = labels[:, None, None, None] * 20 + np.random.default_rng((9, step)).integers(0, 30, (12, 3, edge, edge))
    return torch.from_numpy(pixels.astype(np.uint8))


def start(config: TrainConfig, rank: int = 0, world_size: int = 1) -> TrainingStep:
    return TrainingStep(
        config,
        num_classes=PLAN.num_classes,
        schedule=Schedule(config.optim, PLAN.steps_per_epoch),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        group=dist.group.WORLD if world_size > 1 else None,
    )


def run(training: TrainingStep, step: int, rank: int = 0, world_size: int = 1) -> None:
    size = PLAN.batch_size // world_size
    images_BCHW = images_of(step, training.config.data.image_size)
    training.run(images_BCHW[rank * size : (rank + 1) * size], PLAN.batch(step).labels, step=step)


class Reference:
    """A ViT with a linear layer and dense proxies; groups, schedule and clipping are written out."""

    def __init__(self, weights: dict[str, Tensor], proxies_CD: Tensor, optim: OptimConfig) -> None:
        self.vit = timm.create_model("test_vit", num_classes=0).double()
        prefix = "backbone.1."
        self.vit.load_state_dict(
            {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        )
        self.linear_DF = nn.Parameter(weights["linear.weight"].clone())
        self.proxies_CD = nn.Parameter(proxies_CD.clone())
        self.optim = optim
        self.parameters = {prefix + name: each for name, each in self.vit.named_parameters()}
        self.parameters["linear.weight"] = self.linear_DF
        groups = []
        for name, parameter in self.parameters.items():
            scale = optim.layer_decay ** (NUM_BLOCKS - self.layer(name.removeprefix(prefix)))
            scale = optim.new_layers_lr_scale if parameter is self.linear_DF else scale
            decays = optim.decay_norms or parameter.dim() > 1
            groups.append(
                {"params": [parameter], "scale": scale, "weight_decay": optim.weight_decay if decays else 0.0}
            )
        self.optimizer: torch.optim.Optimizer
        if optim.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.98))
        else:
            self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        self.of_proxies = torch.optim.SGD(
            [self.proxies_CD], lr=1.0, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
        self.norms: list[float] = []

    @staticmethod
    def layer(name: str) -> int:
        """Return 0 for the patches, 1 to 6 for the blocks; the last norm goes with the last block."""
        parts = name.split(".")
        return int(parts[1]) + 1 if parts[0] == "blocks" else NUM_BLOCKS if parts[0] == "norm" else 0

    def run(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int) -> None:
        mean, deviation = (
            torch.tensor(self.vit.pretrained_cfg[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std")
        )
        features_BF = self.vit((images_BCHW / 255 - mean) / deviation).float()
        embeddings_BD = F.normalize(F.layer_norm(features_BF, features_BF.shape[1:]) @ self.linear_DF.T)
        loss = F.cross_entropy(embeddings_BD @ F.normalize(self.proxies_CD).T / 0.05, labels_B)
        self.optimizer.zero_grad()
        self.of_proxies.zero_grad()
        loss.backward()
        gradients = [each.grad for each in self.parameters.values() if each.grad is not None]
        norm = math.sqrt(sum(float(each.double().square().sum()) for each in gradients))
        self.norms.append(norm)
        if self.optim.clip_norm is not None and norm > self.optim.clip_norm:
            for each in gradients:
                each.mul_(self.optim.clip_norm / norm)
        lr = self.optim.lr * min(1, (step + 1) / 7) * 0.5 * (1 + math.cos(math.pi * step / 52))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.of_proxies.param_groups[0]["lr"] = 100 * lr
        self.optimizer.step()
        self.of_proxies.step()


def compare_with_reference(rank: int, world_size: int, optim: OptimConfig, num_steps: int) -> None:
    """Features are float64: AdamW makes steps of the gradients of keys' biases, which are rounding errors alone."""
    training = start(dataclasses.replace(VIT, optim=optim), rank, world_size)
    training.model.network.double().register_forward_pre_hook(lambda _, arguments: (arguments[0].double(),))
    training.wrap_model(compiled=False)
    parts = [training.proxies.weight.values] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, training.proxies.weight.values)
    reference = Reference(training.model.state_dict(), torch.cat(parts), optim)
    before = {name: each.detach().clone() for name, each in reference.parameters.items()}
    for step in range(num_steps):
        run(training, step, rank, world_size)
        reference.run(images_of(step, 64), torch.from_numpy(PLAN.batch(step).labels), step=step)
    assert optim.clip_norm is None or min(reference.norms) < optim.clip_norm < max(reference.norms), reference.norms
    for name, ours in training.model.named_parameters():
        theirs = reference.parameters[name]
        moved, error = ((each - theirs).detach().norm() for each in (before[name], ours))
        assert float(error) <= BOUND * float(moved), (name, error, moved)


@pytest.mark.parametrize(
    ("world_size", "optim", "num_steps"), [(1, ADAMW, 50), (2, ADAMW, 50), (1, CLIPPED, 20), (2, CLIPPED, 20)]
)
def test_steps_equal_those_of_plain_pytorch(ranks: Ranks, world_size: int, optim: OptimConfig, num_steps: int) -> None:
    ranks.run(compare_with_reference, world_size, optim, num_steps)


def test_the_average_is_that_of_the_weights_and_statistics_so_far() -> None:
    training = start(RESNET)
    assert training.average is not None
    expected = {name: each.clone() for name, each in training.model.state_dict().items()}
    counts = {name for name in expected if name.endswith("num_batches_tracked")}
    for step in range(12):
        run(training, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, each in training.model.state_dict().items():
            expected[name] = each.clone() if name in counts else decay * expected[name] + (1 - decay) * each
    ours = training.average.model.state_dict()
    assert ours.keys() == expected.keys()
    for name, each in ours.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-5, atol=1e-6)
    assert {int(ours[name]) for name in counts} == {12}
    newest = training.model.state_dict()
    assert not torch.equal(ours["linear.weight"], newest["linear.weight"])
    assert any(name.endswith("running_var") and not torch.equal(ours[name], newest[name]) for name in ours)


@pytest.mark.parametrize(
    ("backbone", "frozen", "kept"),
    [
        ("resnet18", "conv1|bn1|layer[12]", ("backbone.conv1", "backbone.bn1", "backbone.layer1", "backbone.layer2")),
        ("timm/test_resnet", "layer1", ("backbone.1.layer1",)),
        ("resnet18", ".*", ("backbone.",)),
        ("resnet18", r".*weight", ()),
    ],
)
def test_frozen_layers_stay_with_their_statistics(backbone: str, frozen: str, kept: tuple[str, ...]) -> None:
    optim = OptimConfig(epochs=2, new_layers_epochs=1, frozen=frozen)
    training = start(dataclasses.replace(RESNET, model=ModelConfig(backbone=backbone, dim=16), optim=optim))
    before = {name: each.clone() for name, each in training.model.state_dict().items()}
    proxies_CD = training.proxies.weight.values.clone()
    for step in range(6):
        run(training, step)
    changed = {name for name, each in training.model.state_dict().items() if not torch.equal(each, before[name])}
    expected = {name for name in before if not name.startswith(kept)} if kept else set(before)
    if not kept:  # the weights alone: the norms have a trained bias, and keep counting
        expected -= {name for name in before if name.endswith("weight") and name != "linear.weight"}
    assert changed == expected
    assert not torch.equal(proxies_CD, training.proxies.weight.values)


def state_of(training: TrainingStep, *, averaged: bool) -> dict[str, Tensor]:
    assert training.average is not None
    assert training.optimizer is not None
    state = dict(training.model.state_dict())
    state |= {f"proxies.{name}": each for name, each in training.proxies.state().items()}
    for name, parameter in training.model.named_parameters():
        state |= {f"{kind}.{name}": each for kind, each in training.optimizer.state[parameter].items()}
    if averaged:
        state |= {f"average.{name}": each for name, each in training.average.model.state_dict().items()}
    return state


def interrupt_and_compare(rank: int, world_size: int, folder: Path, interrupted: int) -> None:
    whole, first, second = (start(RESNET, rank, world_size) for _ in range(3))
    for step in range(9):
        run(whole, step, rank, world_size)
    for step in range(interrupted):
        run(first, step, rank, world_size)
    write_step(first, folder, step=interrupted)
    if world_size > 1:
        dist.barrier()
    assert checkpoint.load(str(folder), second, digest="d").step == interrupted
    for step in range(interrupted, 9):
        run(second, step, rank, world_size)
    # Statistics of batch norm are each worker's own until DDP sends those of the first; their average is never sent.
    expected, ours = (state_of(training, averaged=rank == 0) for training in (whole, second))
    assert ours.keys() == expected.keys()
    assert {name.partition(".")[0] for name in ours} >= {"exp_avg", "exp_avg_sq", "step"}
    for name, each in ours.items():
        assert torch.equal(each, expected[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("interrupted", [2, 4, 7])  # the first epoch, of 4 steps, trains the new layers alone
def test_going_on_from_a_checkpoint_is_exact(ranks: Ranks, tmp_path: Path, world_size: int, interrupted: int) -> None:
    ranks.run(interrupt_and_compare, world_size, tmp_path, interrupted)


def test_the_average_is_the_embedder_of_a_checkpoint(tmp_path: Path) -> None:
    training = start(RESNET)
    assert training.average is not None
    for step in range(6):
        run(training, step)
    write_step(training, tmp_path, step=6)
    saved = load_embedder(str(tmp_path)).model.state_dict()
    assert all(torch.equal(saved[name], each) for name, each in training.average.model.state_dict().items())
    assert not torch.equal(saved["linear.weight"], training.model.state_dict()["linear.weight"])


def test_momentum_of_sgd_is_saved_as_before(tmp_path: Path) -> None:
    training = start(dataclasses.replace(RESNET, optim=OptimConfig(epochs=1)))
    run(training, 0)
    write_step(training, tmp_path, step=1)
    names = {name for name in load_file(tmp_path / OPTIMIZER_FILE) if not name.startswith("proxies.")}
    assert names == {name for name, _ in training.model.named_parameters()}

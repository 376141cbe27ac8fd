"""The paper's recipes, step for step, against an implementation of them in plain PyTorch on one process.

That one, `Paper`, is written from the paper alone (Zhai & Wu 2019, sections 3 and 4.1).
"""

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from nsl_dist.config import TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.recipes import cars196_resnet50, sop_resnet50
from nsl_dist.schedule import Schedule
from nsl_dist.training.step import TrainingStep
from tests.support.networks import remove_kinks
from tests.support.ranks import Ranks

NUM_CLASSES, DIM, EDGE = 41, 64, 32  # classes that neither 2 nor 3 workers share evenly
EPOCH = 3  # steps: one epoch of the new layers alone, two at the full learning rate, one at a tenth of it
NUM_STEPS = 4 * EPOCH
# Of relative errors, both sides in float32: about three times the greatest that were seen, 3.4e-6, 1.4e-4, 1.0e-5,
# 2.4e-5 and 3.1e-7. A learning rate of the proxies 1% too high moves them by 1e-2 more; weight decay
# 10% too low changes the lengths by 1.3e-6 within 5 steps.
BOUNDS = {"loss": 1e-5, "gradients": 4e-4, "proxies moved": 3e-5, "proxies' momentum": 1e-4, "lengths": 1e-6}


class Paper:
    """Everything dense and on one process, the numbers those of the paper, not of a configuration."""

    def __init__(self, backbone: str, weights: dict[str, Tensor], proxies_CD: Tensor, *, frozen: bool) -> None:
        self.network = torchvision.models.get_model(backbone)
        del self.network.fc
        remove_kinks(self.network)
        copied = {name.removeprefix("backbone."): each for name, each in weights.items() if name != "linear.weight"}
        counters = {name: each for name, each in self.network.state_dict().items() if "num_batches" in name}
        self.network.load_state_dict(counters | copied)
        self.network.train(not frozen)
        norms = [each for each in self.network.modules() if frozen and isinstance(each, nn.BatchNorm2d)]
        constant = {parameter for norm in norms for parameter in norm.parameters()}
        self.backbone = {
            f"backbone.{name}": each for name, each in self.network.named_parameters() if each not in constant
        }
        self.linear_DF = nn.Parameter(weights["linear.weight"].clone())
        self.proxies_CD = nn.Parameter(proxies_CD.clone())

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.backbone | {"linear.weight": self.linear_DF}

    def embed(self, images_BCHW: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        x = (images_BCHW / 255 - mean) / deviation
        for layer in self.network.children():
            x = x if isinstance(layer, nn.AdaptiveAvgPool2d) else layer(x)
        x_BF = x.mean(dim=(2, 3))
        x_BF = x_BF - x_BF.mean(dim=1, keepdim=True)
        x_BF = x_BF / (x_BF.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        x_BD = x_BF @ self.linear_DF.T
        return x_BD / x_BD.norm(dim=1, keepdim=True)

    def run(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int) -> float:
        if step in (0, EPOCH):
            for each in self.backbone.values():
                each.requires_grad_(step == EPOCH)
            trained = [each for each in (*self.parameters.values(), self.proxies_CD) if each.requires_grad]
            self.optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
        if step == 3 * EPOCH:
            self.optimizer.param_groups[0]["lr"] *= 0.1
        loss = F.cross_entropy(self.embed(images_BCHW) @ F.normalize(self.proxies_CD).T / 0.05, labels_B)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def spread_weights(network: nn.Module, *, frozen: bool) -> None:
    """Give weights with which steps of the paper's size are small, as they are for it after pretraining."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if not frozen:
                module.weight.data.mul_(10)  # batch norm takes it out again


def config_of(images_per_class: int, batch_size: int, *, frozen: bool) -> TrainConfig:
    """The paper's recipe but for its size."""
    recipe = {5: sop_resnet50, 25: cars196_resnet50}[images_per_class]()
    assert (recipe.data.batch_size, recipe.data.images_per_class) == (75, images_per_class)
    backbone = "shufflenet_v2_x0_5" if frozen else "resnet18"
    batch_norm: Literal["frozen", "local"] = "frozen" if frozen else "local"
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, batch_size=batch_size, image_size=EDGE),
        model=dataclasses.replace(recipe.model, backbone=backbone, weights=None, dim=DIM, batch_norm=batch_norm),
        optim=dataclasses.replace(recipe.optim, epochs=3, step_epochs=2),
    )


def images_of(labels_B: Tensor, step: int) -> Tensor:
    patterns = np.random.default_rng(9).integers(0, 200, (NUM_CLASSES, 3, EDGE, EDGE))
    noise = np.random.default_rng((9, step)).integers(0, 56, (len(labels_B), 3, EDGE, EDGE))
    return torch.from_numpy((patterns[labels_B.numpy()] + noise).astype(np.uint8))


def all_rows(own_cD: Tensor) -> Tensor:
    if not dist.is_initialized():
        return own_cD.clone()
    parts = [own_cD] * dist.get_world_size()
    dist.all_gather_object(parts, own_cD)
    return torch.cat(parts)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    difference, norm = (torch.linalg.vector_norm(each.detach(), dtype=torch.float64) for each in (ours - exact, exact))
    return float(difference / norm)


def error_of_lengths(ours: Tensor, exact: Tensor) -> float:
    """Weight decay shows in the lengths of the rows, hardly in loss and gradients."""
    lengths = [torch.linalg.vector_norm(each.detach().flatten(1), dim=1, dtype=torch.float64) for each in (ours, exact)]
    return relative_error(*lengths)


def check(rank: int, world_size: int, images_per_class: int, batch_size: int, frozen: bool) -> None:
    config = config_of(images_per_class, batch_size, frozen=frozen)
    sizes = np.full(NUM_CLASSES, 2 * batch_size // 25)
    plan = ClassBalancedPlan(sizes, batch_size, images_per_class, seed=config.seed)
    assert sizes.sum() // batch_size == plan.steps_per_epoch == EPOCH
    training = TrainingStep(
        config,
        num_classes=NUM_CLASSES,
        schedule=Schedule(config.optim, EPOCH),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        group=dist.group.WORLD if world_size > 1 else None,
    )
    remove_kinks(training.model)
    spread_weights(training.model, frozen=frozen)
    start_CD = all_rows(training.proxies.weight.values)
    assert 0.99 * DIM**-0.5 < start_CD.abs().max() <= DIM**-0.5
    assert start_CD.std().item() == pytest.approx((3 * DIM) ** -0.5, rel=0.05)
    paper = Paper(config.model.backbone, training.model.state_dict(), start_CD, frozen=frozen) if rank == 0 else None
    if paper is not None:
        assert dict(training.model.named_parameters()).keys() == paper.parameters.keys()

    own = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
    for step in range(NUM_STEPS):
        labels_B = torch.from_numpy(plan.batch(step).labels)
        images_BCHW = images_of(labels_B, step)
        loss = training.run(images_BCHW[own], labels_B.numpy(), step=step)
        proxies_CD = all_rows(training.proxies.weight.values)
        if step == NUM_STEPS - 1:
            state = training.proxies.complete(step=NUM_STEPS)
            proxies_CD, velocity_CD = all_rows(state["weight"]), all_rows(state["velocity"])
        if paper is None:
            continue
        exact = paper.run(images_BCHW, labels_B, step=step)
        errors = {name: [0.0] for name in BOUNDS} | {"loss": [abs(loss.item() - exact) / max(1.0, exact)]}
        for name, ours in training.model.named_parameters():
            theirs = paper.parameters[name]
            assert (ours.grad is None) == (theirs.grad is None), (step, name)
            if ours.grad is not None and theirs.grad is not None:
                errors["gradients"].append(relative_error(ours.grad, theirs.grad))
            if ours.dim() > 1:
                errors["lengths"].append(error_of_lengths(ours, theirs))
        errors["proxies moved"].append(relative_error(proxies_CD - start_CD, paper.proxies_CD - start_CD))
        errors["lengths"].append(error_of_lengths(proxies_CD, paper.proxies_CD))
        if step == NUM_STEPS - 1:
            momentum_CD = paper.optimizer.state[paper.proxies_CD]["momentum_buffer"]
            errors["proxies' momentum"].append(relative_error(velocity_CD, momentum_CD))
        worst = {name: max(each) for name, each in errors.items()}
        assert all(worst[name] <= bound for name, bound in BOUNDS.items()), (step, worst)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "images_per_class"), [(1, 75, 25), (1, 75, 5), (2, 150, 5), (3, 75, 25)]
)
def test_twelve_steps_equal_the_papers(ranks: Ranks, world_size: int, batch_size: int, images_per_class: int) -> None:
    """With batch norm on one worker; on several, whose statistics are those of their own part, with frozen ones."""
    ranks.run(check, world_size, images_per_class, batch_size, world_size > 1)

"""One function is one recipe: a complete configuration that flags may override."""

from collections.abc import Callable

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig


def sop_resnet50() -> TrainConfig:
    """The paper's recipe for Stanford Online Products with ResNet-50 at 2048 dimensions.

    Zhai & Wu 2019, section 4.1 and the results table for SOP: recall@1/10/100/1000 of 79.55 / 91.54 / 96.66 / 98.95 for
    float and 78.03 / 90.71 / 96.24 / 98.72 for 2048-bit embeddings (authors' code).
    """
    return TrainConfig(
        recipe="sop_resnet50",
        data=DataConfig(batch_size=75, images_per_class=5, image_size=224),
        model=ModelConfig(backbone="resnet50", weights="IMAGENET1K_V1", dim=2048),
        proxies=ProxyConfig(sample_rate=1.0),
        optim=OptimConfig(epochs=30, new_layers_epochs=1, lr=0.01, schedule="step", step_epochs=15, warmup_steps=0),
    )


def laptop() -> TrainConfig:
    """A small recipe that trains from scratch on two CPU cores in minutes: synthetic products, characters, your own.

    It aims at no figure of the paper. Small rotations, scales and shears stand in for the pretraining and the mirror
    images that it does without.
    """
    return TrainConfig(
        recipe="laptop",
        data=DataConfig(image_size=48, flip=False, rotation=10, scale=0.15, shear=8),
        model=ModelConfig(backbone="resnet18", dim=128),
        proxies=ProxyConfig(sample_rate=0.5),
        optim=OptimConfig(epochs=20, lr=0.015),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {recipe.__name__: recipe for recipe in (laptop, sop_resnet50)}

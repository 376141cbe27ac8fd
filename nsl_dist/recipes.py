"""One function is one recipe: a complete configuration that flags may override."""

import dataclasses
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


def inshop_resnet50() -> TrainConfig:
    """The paper's recipe for In-Shop Clothes Retrieval with ResNet-50 at 2048 dimensions.

    Zhai & Wu 2019, section 4.1 and the results table for In-Shop: recall@1/10/20/30/40/50 of 89.35 / 97.81 / 98.61 /
    98.87 / 99.05 / 99.13 for float and 88.76 / 97.65 / 98.47 / 98.73 / 98.94 / 99.05 for 2048-bit embeddings (authors'
    code). The same as for Stanford Online Products.
    """
    return dataclasses.replace(sop_resnet50(), recipe="inshop_resnet50")


def cars196_resnet50() -> TrainConfig:
    """The paper's recipe for CARS196 with ResNet-50 at 2048 dimensions: 3 classes of 25 images in a batch.

    Zhai & Wu 2019, section 4.1 and the results table for CARS196: recall@1/2/4/8 of 89.50 / 94.18 / 96.84 / 98.41 for
    float and 89.29 / 93.95 / 96.61 / 98.14 for 2048-bit embeddings (authors' code).
    """
    base = sop_resnet50()
    data = dataclasses.replace(base.data, images_per_class=25)
    return dataclasses.replace(base, recipe="cars196_resnet50", data=data)


def cub200_resnet50() -> TrainConfig:
    """The paper's recipe for CUB-200-2011 with ResNet-50 at 2048 dimensions: as for CARS196, learning rate 0.001.

    Zhai & Wu 2019, section 4.1 and the results table for CUB-200-2011: recall@1/2/4/8 of 65.36 / 76.76 / 85.42 / 91.51
    for float and 63.67 / 75.37 / 84.54 / 90.99 for 2048-bit embeddings (authors' code).
    """
    base = cars196_resnet50()
    return dataclasses.replace(base, recipe="cub200_resnet50", optim=dataclasses.replace(base.optim, lr=0.001))


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


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (laptop, sop_resnet50, inshop_resnet50, cars196_resnet50, cub200_resnet50)
}

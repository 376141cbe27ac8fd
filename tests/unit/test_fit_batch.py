"""A recipe's batch that a data set is too small for is made smaller; one that the user chose is not."""

import dataclasses

import numpy as np
import pytest

from nsl_dist.commandline import parse_train_config
from nsl_dist.config import DataConfig, TrainConfig
from nsl_dist.training.train import advise, fit_batch

FIVE_EACH = TrainConfig(data=DataConfig(root="/photos", batch_size=80, images_per_class=5))


def sizes(num_classes: int) -> np.ndarray:
    return np.full(num_classes, 38)


@pytest.mark.parametrize(
    ("num_workers", "fitted"),
    [(None, 30), (1, 30), (2, 30), (4, 20), ("1..4", 0)],
    ids=["none", "1", "2", "4", "elastic"],
)
def test_a_batch_is_fitted(num_workers: int | str | None, fitted: int, capsys: pytest.CaptureFixture[str]) -> None:
    """To all classes that there are, evenly divided among any number of workers; where that cannot be it stays."""
    config = dataclasses.replace(FIVE_EACH, num_workers=num_workers) if num_workers != "1..4" else elastic()
    assert fit_batch(config, sizes(6)).data.batch_size == (fitted or config.data.batch_size)
    said = capsys.readouterr().out
    assert (f"batch 80 -> {fitted}: 6 training classes x 5" in said) is bool(fitted)


def elastic() -> TrainConfig:
    data = dataclasses.replace(FIVE_EACH.data, batch_size=120)
    return dataclasses.replace(FIVE_EACH, num_workers="1..4", data=data)


def test_a_batch_that_fits_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_batch(FIVE_EACH, sizes(60)) == FIVE_EACH
    assert capsys.readouterr().out == ""


def test_few_classes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    advise(50)
    assert capsys.readouterr().out == ""
    advise(6)
    assert capsys.readouterr().out.startswith("6 training classes are few: 50 or more are advised")


@pytest.mark.parametrize(("num_classes", "fitted"), [(10, 30), (20, 60)])
def test_a_batch_is_fitted_to_few_images(num_classes: int, fitted: int) -> None:
    """Of classes of three images each."""
    assert fit_batch(FIVE_EACH, np.full(num_classes, 3)).data.batch_size == fitted


def test_a_batch_of_any_images_is_fitted_to_their_number() -> None:
    data = dataclasses.replace(FIVE_EACH.data, images_per_class=None)
    config = dataclasses.replace(FIVE_EACH, data=data, num_workers=2)
    assert fit_batch(config, np.array([10, 20, 7])).data.batch_size == 36


def test_one_class_is_too_few() -> None:
    with pytest.raises(ValueError, match="/photos: too few training classes, 1; training by classification needs"):
        fit_batch(FIVE_EACH, sizes(1))


@pytest.mark.parametrize("flag", ["--batch-size=80", "--data.batch-size=80", "--data.images-per-class=5"])
def test_a_batch_that_was_chosen_is_kept(flag: str) -> None:
    config = parse_train_config(["--data.root=/photos", flag], description="")
    assert fit_batch(config, sizes(6)) == config
    assert parse_train_config(["--data.root=/photos"], description="").data.fit_batch


def test_short_forms() -> None:
    config = parse_train_config(["--epochs", "3", "--batch-size=40", "--lr=0.5", "--layout", "folders"], description="")
    assert (config.optim.epochs, config.data.batch_size, config.optim.lr, config.data.layout) == (3, 40, 0.5, "folders")

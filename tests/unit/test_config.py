import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nsl_dist.commandline import parse_train_config
from nsl_dist.config import OptimConfig, TrainConfig, config_from_dict, differences
from nsl_dist.recipes import FIGURES, RECIPES

WRITTEN_BY_0_1_0 = Path(__file__).parents[1] / "support" / "run_0.1.0.json"


def parse(*arguments: str) -> TrainConfig:
    return parse_train_config(list(arguments), description="")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.batch-size", "81"], "81 is not a positive multiple of --data.images-per-class 5"),
        (["--num-workers", "3"], "global batch 80 is not divisible by 3 workers"),
        (["--proxies.sample-rate", "0"], "--proxies.sample-rate 0.0 must be in (0, 1]"),
        (["--proxies.sample-rate", "1.5"], "--proxies.sample-rate 1.5 must be in (0, 1]"),
        (["--proxies.margin", "-0.1"], "--proxies.margin -0.1 must be in [0, 1) if cosine"),
        (["--proxies.margin", "2", "--proxies.margin-kind", "angular"], "2.0 must be in [0, 1.571) if angular"),
        (["--proxies.margin-kind", "additive"], "invalid choice 'additive'"),
        (["--proxies.per-class", "0"], "--proxies.per-class 0 must be >= 1"),
        (["--proxies.filter-above", "1"], "--proxies.filter-above 1.0 must be a cosine similarity in [-1, 1)"),
        (["--num-workers", "0"], "--num-workers 0 must be at least 1"),
        (["--optim.epochs", "0"], "--optim.epochs 0 must be >= 1"),
        (["--optim.new-layers-lr-scale", "0"], "--optim.new-layers-lr-scale 0.0 must be positive"),
        (["--optim.layer-decay", "1.1"], "--optim.layer-decay 1.1 must be in (0, 1]; 1 is no decay"),
        (["--optim.beta2", "1"], "--optim.beta2 1.0 must be in [0, 1)"),
        (["--optim.clip-norm", "0"], "--optim.clip-norm 0.0 must be positive"),
        (["--optim.ema", "1"], "--optim.ema 1.0 must be in [0, 1)"),
        (["--optim.frozen", "layer("], "--optim.frozen 'layer(' is not a regular expression: missing )"),
        (["--run-name", "a/b"], "--run-name 'a/b'"),
        (["--tracking.register", "a/b"], "--tracking.register 'a/b' must not contain / or :"),
    ],
)
def test_bad_values_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*flags)
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_flags_override_the_recipe() -> None:
    config = parse(
        "--recipe", "sop_resnet50", "--optim.epochs", "3", "--data.root", "/x", "--model.backbone", "resnet18"
    )
    assert (config.optim.epochs, config.data.root, config.model.backbone) == (3, "/x", "resnet18")
    assert (config.optim.lr, config.model.dim, config.data.resized_edge) == (0.01, 2048, 256)


def test_a_run_of_the_release_before_goes_on_with_the_same_optimiser() -> None:
    """Its configuration lacks the fields that were added since."""
    fields = json.loads(WRITTEN_BY_0_1_0.read_text())["config"]
    added = {field.name for field in dataclasses.fields(OptimConfig)} - fields["optim"].keys()
    assert {"optimizer", "layer_decay", "ema", "frozen"} <= added
    before = config_from_dict(fields, location="config.json")
    assert differences(before, before) == []
    changes: dict[str, Any] = {"optimizer": "adamw", "ema": 0.9, "frozen": ".*", "clip_norm": 1.0}
    for name, value in changes.items():
        now = dataclasses.replace(before, optim=dataclasses.replace(before.optim, **{name: value}))
        old = getattr(before.optim, name)
        assert differences(before, now) == [f"--optim.{name.replace('_', '-')} {old} -> {value}"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_names_itself(name: str) -> None:
    assert RECIPES[name]().recipe == name


def test_recipes_cite_the_figures_that_they_aim_at() -> None:
    for name, published in FIGURES.items():
        cited = re.findall(r"\d+(?:\.\d+)?", RECIPES[name].__doc__ or "")
        for figures in published:
            values = [*figures.recall.values(), *([figures.nmi] if figures.nmi is not None else [])]
            assert {str(value) for value in values} <= {str(float(each)) for each in cited}, name


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())

    def check(config: object, prefix: str) -> None:
        for field in dataclasses.fields(config):  # type: ignore[arg-type]
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                check(value, f"{prefix}{field.name}.")
            else:
                assert f"--{prefix}{field.name}".replace("_", "-") in text

    check(RECIPES["laptop"](), "")
    assert text.count("(default:") >= 40

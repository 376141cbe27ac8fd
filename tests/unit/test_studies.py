"""What the studies compare, and what they say of it."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest

from nsl_dist.ablation.studies import STUDIES, Claim, Study
from nsl_dist.ablation.summary import Outcome, draw, summarise
from nsl_dist.config import differences
from nsl_dist.recipes import cub200_resnet50_512, laptop, sop_resnet50

BASE = cub200_resnet50_512()


def outcomes_of(study: Study, scores: dict[str, list[float]]) -> list[Outcome]:
    """One for each arm and seed; 50% where `scores` has none, binary ones 5 points lower."""
    history = {"loss": [(1.0, 3.0), (2.0, 2.0)], "recall": [(1.0, 20.0), (2.0, 30.0)]}
    return [
        Outcome(arm.name, seed, f"x-{arm.name}-{seed}", {"float": score, "binary": score - 5}, 1.5, 90.0, history)
        for arm in study.arms
        for seed, score in enumerate(scores.get(arm.name, [50.0, 50.0]))
    ]


def changed(study: Study) -> dict[str, list[str]]:
    return {arm.name: differences(BASE, arm.config) for arm in study.arms}


def test_arms_differ_in_what_is_studied_alone() -> None:
    sampling = changed(STUDIES["class-sampling"](BASE))
    assert sampling["rate-1"] == []
    assert sampling["rate-0.1"] == ["--proxies.sample-rate 1.0 -> 0.1"]
    assert sampling["rate-0.1-corrected"] == [
        "--proxies.sample-rate 1.0 -> 0.1", "--proxies.correct-sampling False -> True",
    ]  # fmt: skip
    assert len(sampling) == 11
    assert changed(STUDIES["layer-norm"](BASE)) == {"with": [], "without": ["--model.neck layer_norm -> None"]}
    dimensions = changed(STUDIES["dimension"](BASE))
    assert dimensions["dim-512"] == []
    assert dimensions["dim-64"] == ["--model.dim 512 -> 64"]
    images = changed(STUDIES["images-per-class"](BASE))
    assert images["images-25"] == []
    assert images["images-none"] == ["--data.images-per-class 25 -> None"]
    assert images["images-37"] == ["--data.batch-size 75 -> 74", "--data.images-per-class 25 -> 37"]  # whole classes
    assert changed(STUDIES["temperature"](BASE))["temperature-0.2"] == ["--proxies.temperature 0.05 -> 0.2"]
    margins = changed(STUDIES["margin"](BASE))
    assert margins["none"] == []
    assert margins["cosine-0.1"] == ["--proxies.margin 0.0 -> 0.1"]
    assert margins["angular-0.4"] == ["--proxies.margin 0.0 -> 0.4", "--proxies.margin-kind cosine -> angular"]


def test_a_batch_too_small_for_the_study_is_refused() -> None:
    small = dataclasses.replace(laptop(), data=dataclasses.replace(laptop().data, batch_size=60))
    with pytest.raises(ValueError, match=r"--data.batch-size 60 must be at least 75"):
        STUDIES["images-per-class"](small)


def test_layer_norm_is_evaluated_on_the_way() -> None:
    for base, every in ((sop_resnet50(), 5), (laptop(), 1)):
        assert {arm.config.eval.every for arm in STUDIES["layer-norm"](base).arms} == {every}


@pytest.mark.parametrize(
    ("with_layer_norm", "said"),
    [
        ([60.0, 61.0], r"holds here\. .*: \+5\.5 points \(\+5\.0 to \+6\.0 over 2 seeds\)\."),
        ([60.0, 54.0], r"is inconclusive\. .*: \+2\.0 points \(-1\.0 to \+5\.0 over 2 seeds\)\."),
        ([50.0, 54.0], r"does not hold here\. .*: -3\.0 points"),
    ],
)
def test_a_finding_holds_if_it_does_for_every_seed(with_layer_norm: list[float], said: str) -> None:
    study = STUDIES["layer-norm"](BASE)
    text, found = summarise(study, outcomes_of(study, {"with": with_layer_norm, "without": [55.0, 55.0]}))
    assert re.search(f"LayerNorm raises recall@1: {said}", text)
    assert found["findings"] == [text.splitlines()[-1]]


def sentences(name: str, scores: dict[str, list[float]]) -> list[str]:
    study = STUDIES[name](BASE)
    return list(summarise(study, outcomes_of(study, scores))[1]["findings"])


def test_findings_of_the_paper_hold_for_figures_like_the_papers() -> None:
    rates = {"rate-1": [79.5, 79.4], "rate-0.1": [78.8, 78.9], "rate-0.1-corrected": [77.0, 77.0]}
    plain, corrected = sentences("class-sampling", rates)
    assert "not corrected as in the paper, recall@1 falls by less than a point: holds" in plain
    assert "corrected, recall@1 falls by less than a point: does not hold" in corrected
    images = {"images-none": [59.5, 59.5], "images-25": [61.3, 61.3], "images-75": [40.9, 40.9]}
    assert all(": holds here." in sentence for sentence in sentences("images-per-class", images))
    assert ": does not hold here." in sentences("dimension", {})[0]  # binary ones 5 points lower at any dimension
    warmer = {"temperature-0.05": [60.0, 60.5], "temperature-0.1": [62.0, 60.0]}
    assert "within a point of the best: is inconclusive" in sentences("temperature", warmer)[0]
    cosine, angular = sentences(
        "margin", {"none": [70.0, 71.0], "cosine-0.2": [72.0, 72.0], "angular-0.2": [69.0, 72.0]}
    )
    assert "With a cosine margin of 0.2, recall@1 rises: holds here" in cosine
    assert "With an angular margin of 0.2, recall@1 rises: is inconclusive" in angular


def test_summary_has_all_settings() -> None:
    study = STUDIES["dimension"](BASE)
    text, found = summarise(study, outcomes_of(study, {"dim-64": [40.0, 42.0]}))
    assert "| dim-64 | 41.0 (40.0 to 42.0) | 36.0 (35.0 to 37.0) | 1.50 (1.50 to 1.50) | 1.5 |" in text
    assert len([line for line in text.splitlines() if line.startswith("| dim-")]) == 6
    assert len(found["outcomes"]) == 12


@pytest.mark.parametrize("name", list(STUDIES))
def test_figures_show_every_setting(name: str) -> None:
    study = STUDIES[name](BASE)
    figure = ElementTree.fromstring(draw(study, outcomes_of(study, {})))
    texts = {element.text.strip() for element in figure.iter() if element.text and element.tag.endswith("text")}
    lines = {arm.line or kind for arm in study.arms for kind in study.kinds}
    assert lines <= texts
    assert study.over_epochs or {arm.label for arm in study.arms} <= texts
    assert study.axis in texts


def test_a_claim_says_which_difference_it_measures() -> None:
    claim = Claim("One is better", lambda scores: scores["a", "float"] - 1, of="a less 1", above=2)
    assert claim.sentence([{("a", "float"): 4.0}]) == (
        "One is better: holds here. a less 1: +3.0 points (+3.0 to +3.0 over 1 seeds)."
    )

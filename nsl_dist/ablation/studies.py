"""Definitions of the studies: each function returns the settings to train and the paper's claims about them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from nsl_dist.config import Kind, TrainConfig

Scores = dict[tuple[str, Kind], float]  # recall@1 in % of one seed, by arm and kind of embeddings


@dataclass(frozen=True)
class Arm:
    """One setting, trained once per seed."""

    name: str
    """Part of the names of its runs."""
    label: str
    """Tick label in the figure."""
    line: str
    """Line of the figure that the setting is a point of."""
    config: TrainConfig


@dataclass(frozen=True)
class Claim:
    """A statement, of the paper but for margins, tested per seed by a difference of recall@1 in points."""

    text: str
    difference: Callable[[Scores], float]
    """Computes the difference from the scores of one seed."""
    of: str
    """The difference in words."""
    above: float = 0.0
    """The claim holds if the difference is larger than this."""

    def sentence(self, scores: list[Scores]) -> str:
        """Say whether the claim holds for all seeds, for none, or for some of them."""
        differences = [self.difference(each) for each in scores]
        held = [difference > self.above for difference in differences]
        said = "holds here" if all(held) else "is inconclusive" if any(held) else "does not hold here"
        mean = sum(differences) / len(differences)
        spread = f"{min(differences):+.1f} to {max(differences):+.1f} over {len(scores)} seeds"
        return f"{self.text}: {said}. {self.of}: {mean:+.1f} points ({spread})."


@dataclass(frozen=True)
class Study:
    """The settings to compare and the claims to test."""

    title: str
    axis: str
    """The parameter that differs between arms."""
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    kinds: tuple[Kind, ...] = ("float", "binary")
    """Kinds of embeddings shown in the figure."""
    over_epochs: bool = False
    """Plot loss and recall over epochs instead of final recall."""


RATES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)
DIMENSIONS = (64, 128, 256, 512, 1024, 2048)
IMAGES_PER_CLASS = (None, 1, 3, 12, 25, 37, 75)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.4)
MARGINS = (0.1, 0.2, 0.4)
EVALUATIONS = 6  # approximate number during a training


def class_sampling(base: TrainConfig) -> Study:
    """Recall against the fraction of classes sampled per iteration, with and without correction (paper, figure 4).

    On SOP with ResNet-50, recall@1 drops by less than a point with 10% of the classes. Classes of the batch are always
    included, so the effective rate is at least their fraction.
    """

    def arm(rate: float, *, correct: bool) -> Arm:
        line = "corrected" if correct else "not corrected"
        proxies = replace(base.proxies, sample_rate=rate, num_sampled=None, correct_sampling=correct)
        name = f"rate-{rate:g}{'-corrected' if correct else ''}"
        return Arm(name, f"{rate:g}", line, replace(base, proxies=proxies))

    def loses_less_than_a_point(suffix: str, how: str) -> Claim:
        return Claim(
            f"With 10% of the classes in each iteration, {how}, recall@1 falls by less than a point",
            lambda scores: scores[f"rate-0.1{suffix}", "float"] - scores["rate-1", "float"],
            of="Recall@1 with 10% minus recall@1 with all",
            above=-1,
        )

    return Study(
        title="Class sampling",
        axis="fraction of classes per iteration",
        arms=(
            *(arm(rate, correct=False) for rate in RATES),
            *(arm(rate, correct=True) for rate in RATES if rate < 1),
        ),
        claims=(
            loses_less_than_a_point("", "not corrected as in the paper"),
            loses_less_than_a_point("-corrected", "corrected"),
        ),
        kinds=("float",),
    )


def layer_norm(base: TrainConfig) -> Study:
    """Loss and recall during training, with and without LayerNorm on the pooled features (figure 3).

    On CUB-200-2011 recall@1 reaches about 61 with it and peaks near 56 without.
    """
    evaluation = replace(base.eval, every=max(1, round(base.optim.epochs / EVALUATIONS)))
    base = replace(base, eval=evaluation)
    arms = (
        Arm("with", "LayerNorm", "LayerNorm", replace(base, model=replace(base.model, neck="layer_norm"))),
        Arm("without", "none", "none", replace(base, model=replace(base.model, neck=None))),
    )
    claim = Claim(
        "LayerNorm raises recall@1",
        lambda scores: scores["with", "float"] - scores["without", "float"],
        of="Recall@1 with it minus recall@1 without",
    )
    return Study("Layer normalisation", "epoch", arms, (claim,), kinds=("float",), over_epochs=True)


def dimension(base: TrainConfig) -> Study:
    """Recall of float and binary embeddings against the number of dimensions (figure 2).

    On CARS196 with ResNet-50, from 64 to 2048 dimensions: 80 to 86.3 for float and 45 to 84 for binary embeddings. The
    linear layer is omitted where the dimension equals the backbone's feature width.
    """
    arms = tuple(
        Arm(f"dim-{dim}", str(dim), "", replace(base, model=replace(base.model, dim=dim))) for dim in DIMENSIONS
    )

    def gap(scores: Scores, dim: int) -> float:
        return scores[f"dim-{dim}", "float"] - scores[f"dim-{dim}", "binary"]

    claim = Claim(
        "Binary embeddings approach float ones as dimensions grow",
        lambda scores: gap(scores, DIMENSIONS[0]) - gap(scores, DIMENSIONS[-1]),
        of=f"Gap between float and binary recall@1 at {DIMENSIONS[0]} dimensions minus the gap at {DIMENSIONS[-1]}",
    )
    return Study("Dimensions", "dimensions", arms, (claim,))


def images_per_class(base: TrainConfig) -> Study:
    """Recall against the number of images per class in a batch (table of images per class).

    On CUB-200-2011 with ResNet-50 at 512 dimensions and batches of 75, recall@1 is 59.5 without class-balanced batches
    and 59.6 / 60.0 / 60.8 / 61.3 / 59.6 / 40.9 with 1 / 3 / 12 / 25 / 37 / 75 images per class. If the batch
    size is not a multiple, batches are made smaller.
    """
    batch_size = base.data.batch_size
    if batch_size < IMAGES_PER_CLASS[-1]:
        raise ValueError(
            f"--data.batch-size {batch_size} must be at least {IMAGES_PER_CLASS[-1]}, the largest number of images per "
            "class in this study"
        )

    def arm(count: int | None) -> Arm:
        size = batch_size // count * count if count is not None else batch_size
        name = "none" if count is None else str(count)
        data = replace(base.data, images_per_class=count, batch_size=size)
        return Arm(f"images-{name}", name, "", replace(base, data=data))

    return Study(
        title="Images per class in a batch",
        axis="images per class in a batch",
        arms=tuple(arm(count) for count in IMAGES_PER_CLASS),
        claims=(
            Claim(
                "Batches with 25 images per class are better than unbalanced batches",
                lambda scores: scores["images-25", "float"] - scores["images-none", "float"],
                of="Recall@1 with 25 minus recall@1 with unbalanced batches",
            ),
            Claim(
                "Batches with 75 images of one class are far worse than unbalanced batches",
                lambda scores: scores["images-none", "float"] - scores["images-75", "float"],
                of="Recall@1 with unbalanced batches minus recall@1 with 75",
                above=10,
            ),
        ),
    )


def temperature(base: TrainConfig) -> Study:
    """Recall against the temperature sigma, which the paper sets to 0.05 (section 4.1) without a figure."""
    arms = tuple(
        Arm(f"temperature-{sigma:g}", f"{sigma:g}", "", replace(base, proxies=replace(base.proxies, temperature=sigma)))
        for sigma in TEMPERATURES
    )
    claim = Claim(
        "The paper's temperature of 0.05 is within a point of the best",
        lambda scores: (
            scores["temperature-0.05", "float"] - max(scores[f"temperature-{each:g}", "float"] for each in TEMPERATURES)
        ),
        of="Recall@1 at 0.05 minus the best",
        above=-1,
    )
    return Study("Temperature", "temperature", arms, (claim,))


def margin(base: TrainConfig) -> Study:
    """Recall against margins, cosine (CosFace) and angular (ArcFace); the paper has none."""

    def arm(kind: Literal["cosine", "angular"], size: float) -> Arm:
        proxies = replace(base.proxies, margin=size, margin_kind=kind)
        return Arm(f"{kind}-{size:g}" if size else "none", f"{size:g}", kind, replace(base, proxies=proxies))

    def claim(kind: str) -> Claim:
        return Claim(
            f"With {'a cosine' if kind == 'cosine' else 'an angular'} margin of 0.2, recall@1 rises",
            lambda scores: scores[f"{kind}-0.2", "float"] - scores["none", "float"],
            of="Recall@1 with it minus recall@1 without a margin",
        )

    return Study(
        title="Margins",
        axis="margin",
        arms=(
            arm("cosine", 0.0),
            *(arm("cosine", size) for size in MARGINS),
            *(arm("angular", size) for size in MARGINS),
        ),
        claims=(claim("cosine"), claim("angular")),
        kinds=("float",),
    )


STUDIES: dict[str, Callable[[TrainConfig], Study]] = {
    study.__name__.replace("_", "-"): study
    for study in (class_sampling, layer_norm, dimension, images_per_class, temperature, margin)
}

"""Results of a study: a table, a figure, and whether the paper's claims hold."""

import io
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from nsl_dist.ablation.studies import Arm, Scores, Study
from nsl_dist.config import Kind
from nsl_dist.retrieval.figures import BLUE, GREEN, LINES, ORANGE, STYLE, TEXT


@dataclass(frozen=True)
class Outcome:
    """One training of a study."""

    arm: str
    seed: int
    run_name: str
    recall: dict[Kind, float]
    """Recall@1 in %."""
    loss: float | None
    """Mean over the last tenth of the training, or None if MLflow does not have it."""
    seconds: float
    """Training and evaluation together."""
    history: dict[str, list[tuple[float, float]]]
    """Loss, and recall@1 in %, by epoch."""


def summarise(study: Study, outcomes: list[Outcome]) -> tuple[str, dict[str, Any]]:
    """Return a study's summary as Markdown and as a JSON object."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    sentences = [claim.sentence([_scores(outcomes, seed) for seed in seeds]) for claim in study.claims]
    heads = ["setting", "R@1 float", "R@1 binary", "loss", "minutes"]
    rows = []
    for arm in study.arms:
        mine = [outcome for outcome in outcomes if outcome.arm == arm.name]
        losses = [outcome.loss for outcome in mine if outcome.loss is not None]
        rows.append(
            [
                arm.name,
                *(_spread([outcome.recall[kind] for outcome in mine]) for kind in ("float", "binary")),
                _spread(losses, digits=2) if losses else "-",
                f"{statistics.mean(outcome.seconds for outcome in mine) / 60:.1f}",
            ]
        )
    lines = [
        f"# {study.title}",
        f"Recall@1 on the test classes in %, mean and range over {len(seeds)} seeds.",
        "\n".join([_row(heads), _row(["---", *["---:"] * (len(heads) - 1)]), *map(_row, rows)]),
        *sentences,
    ]
    found = {"title": study.title, "findings": sentences, "outcomes": [asdict(outcome) for outcome in outcomes]}
    return "\n\n".join(lines) + "\n", found


def _scores(outcomes: list[Outcome], seed: int) -> Scores:
    return {(each.arm, kind): recall for each in outcomes if each.seed == seed for kind, recall in each.recall.items()}


def _spread(values: list[float], *, digits: int = 1) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(study: Study, outcomes: list[Outcome]) -> str:
    """Return the study's figure as an SVG document, with mean and range over the seeds."""
    from matplotlib import rc_context  # takes a second to import
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(8.4 if study.over_epochs else 5.6, 3.6), layout="constrained")
        if study.over_epochs:
            _draw_courses(figure, study, outcomes)
        else:
            _draw_points(figure, study, outcomes)
        written = io.StringIO()
        metadata = {"Title": study.title, "Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(written, format="svg", facecolor="white", metadata=metadata)
    return written.getvalue().replace(TEXT, "#202020")


def _draw_points(figure: Any, study: Study, outcomes: list[Outcome]) -> None:
    axes = figure.add_subplot(xlabel=study.axis, ylabel="recall@1 in %")
    labels = list(dict.fromkeys(arm.label for arm in study.arms))
    lines = list(dict.fromkeys(arm.line for arm in study.arms))
    for number, line in enumerate(lines):
        arms = [arm for arm in study.arms if arm.line == line]
        places = [labels.index(arm.label) for arm in arms]
        for kind in study.kinds:
            scores = [[each.recall[kind] for each in outcomes if each.arm == arm.name] for arm in arms]
            means = [statistics.mean(each) for each in scores]
            below = [mean - min(each) for mean, each in zip(means, scores, strict=True)]
            above = [max(each) - mean for mean, each in zip(means, scores, strict=True)]
            style = LINES[kind] if len(lines) == 1 else (LINES["float"], LINES["binary"])[number]
            axes.errorbar(places, means, [below, above], label=line or kind, capsize=3, **style)
    axes.set_xticks(range(len(labels)), labels)
    figure.legend(loc="outside upper center", ncols=2)


def _draw_courses(figure: Any, study: Study, outcomes: list[Outcome]) -> None:
    panels = figure.subplots(1, 2)
    for axes, metric, label in zip(panels, ("loss", "recall"), ("loss", "recall@1 in %"), strict=True):
        axes.set(xlabel=study.axis, ylabel=label)
        for arm, colour, line in zip(study.arms, (BLUE, ORANGE, GREEN), ("-", "--", ":"), strict=False):
            _draw_course(axes, arm, [each.history.get(metric, []) for each in outcomes if each.arm == arm.name],
                         color=colour, linestyle=line)  # fmt: skip
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(study.arms))


def _draw_course(axes: Any, arm: Arm, courses: list[list[tuple[float, float]]], **style: Any) -> None:
    """Draw the mean over seeds, and the range as a band, at the epochs that all seeds have."""
    by_epoch = [dict(course) for course in courses]
    epochs = sorted(set(by_epoch[0]).intersection(*by_epoch))
    values = [[course[epoch] for course in by_epoch] for epoch in epochs]
    axes.plot(epochs, [statistics.mean(each) for each in values], label=arm.label, **style)
    axes.fill_between(epochs, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.2, linewidth=0)

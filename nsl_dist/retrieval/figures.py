"""The figures of a report as SVG, legible on light and dark pages."""

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nsl_dist.retrieval.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = "#010203"  # replaced by the colour of the text around a figure
BLUE, ORANGE, GREEN, RED = "#2f7fd0", "#d9730d", "#2a9d4a", "#d1495b"  # legible on white and on near black
LINES: dict[str, dict[str, Any]] = {
    "float": {"color": BLUE, "marker": "o"},
    "binary": {"color": ORANGE, "marker": "s", "linestyle": "--"},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "nsl_dist", "text.parse_math": False, "font.size": 10, "savefig.dpi": 130,
    "text.color": TEXT, "axes.edgecolor": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": TEXT, "grid.alpha": 0.15, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9, "legend.handlelength": 2.5,
}  # fmt: skip
WIDTH, HEIGHT = 4.8, 3.3  # inches: small enough for their text to be legible on a phone


def draw(findings: Findings) -> dict[str, str]:
    """Return the figures as SVG documents by name, without those that have nothing to show."""
    from matplotlib import rc_context  # takes a second to import

    drawings: dict[str, tuple[str, Callable[[Findings], Figure | None]]] = {
        "loss": ("Training loss over iterations", _draw_loss),
        "recall_curves": ("Recall over iterations of the training", _draw_recall_curves),
        "recall": ("Recall at K of float and of binary embeddings", _draw_recall),
        "similarities": ("Cosine similarities within classes and between classes", _draw_similarities),
        "map": ("Embeddings on their first two principal components, coloured by class", _draw_map),
        "class_sizes": ("How many classes have how many images, by split", _draw_class_sizes),
    }
    svgs = {}
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the pages show texts in fonts of the reader, which have it
        for name, (title, drawing) in drawings.items():
            figure = drawing(findings)
            if figure is None:
                continue
            written = io.StringIO()
            metadata = {"Title": title, "Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(written, format="svg", transparent=True, metadata=metadata)
            svg = re.sub(r"font-family: [^;]*", "font-family: system-ui, sans-serif", written.getvalue())
            svgs[name] = svg.replace(TEXT, "currentColor")
    return svgs


def _figure(height: float = HEIGHT) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _draw_loss(findings: Findings) -> "Figure | None":
    points = findings.history.get("loss", [])
    if len(points) < 2:
        return None
    figure = _figure()
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss")
    axes.plot(*zip(*points, strict=True), color=BLUE)
    return figure


def _draw_recall_curves(findings: Findings) -> "Figure | None":
    curves = {name: points for name, points in findings.history.items() if name.startswith("recall_at_")}
    if max(map(len, curves.values()), default=0) < 2:
        return None
    figure = _figure()
    axes = figure.add_subplot(xlabel="iteration", ylabel="recall in %")
    for name, points in curves.items():
        k, kind = name.removeprefix("recall_at_").split("_")
        steps, shares = zip(*points, strict=True)
        axes.plot(steps, [100 * share for share in shares], label=f"recall@{k}, {kind}", **LINES[kind])
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _draw_recall(findings: Findings) -> "Figure":
    figure = _figure()
    axes = figure.add_subplot(xlabel="K", ylabel="recall@K in %")
    intervals = findings.results.intervals or {}
    for kind, shares in findings.results.recall.items():
        recall = 100 * np.array(list(shares.values()))
        errors = None
        if kind in intervals:
            bounds = 100 * np.array([intervals[kind][f"recall_at_{k}"] for k in shares]).T
            errors = np.abs(bounds - recall)
        axes.errorbar(list(map(str, shares)), recall, errors, label=kind, capsize=3, **LINES[kind])
    axes.legend(loc="lower right")
    return figure


def _draw_similarities(findings: Findings) -> "Figure | None":
    if not (len(findings.same_S) and len(findings.other_S)):
        return None
    figure = _figure()
    axes = figure.add_subplot(xlabel="cosine similarity", ylabel="density")
    axes.locator_params(axis="x", nbins=6)
    bins = np.histogram_bin_edges(np.concatenate([findings.same_S, findings.other_S]), 50).tolist()
    for values, label, colour, line in (
        (findings.same_S, "same class", GREEN, "-"),
        (findings.other_S, "other classes", RED, "--"),
    ):
        axes.hist(values, bins, density=True, color=colour, alpha=0.35)
        axes.hist(values, bins, density=True, color=colour, histtype="step", linestyle=line, linewidth=1.5, label=label)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _draw_map(findings: Findings) -> "Figure | None":
    if not len(findings.map_N2):
        return None
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    figure = _figure(HEIGHT + 0.6 + 0.1 * len(findings.class_ids))
    first, second = (f"{100 * share:.0f}% of variance" for share in findings.explained)
    axes = figure.add_subplot(xlabel=f"first component, {first}", ylabel=f"second component, {second}")
    axes.set_aspect("equal", "datalim")
    colours = colormaps["tab20" if len(findings.class_ids) > 10 else "tab10"]
    x_N, y_N = findings.map_N2.T
    size = max(3, min(18, 20_000 / len(x_N)))
    axes.scatter(
        x_N, y_N, size, colours(findings.labels_N % colours.N), alpha=0.8, linewidths=0, rasterized=True
    )  # fmt: skip
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colours(label), label=class_id)
        for label, class_id in enumerate(findings.class_ids)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1)
    return figure


def _draw_class_sizes(findings: Findings) -> "Figure":
    figure = _figure(1 + 1.3 * len(findings.sizes))
    panels = figure.subplots(len(findings.sizes), sharex=True, squeeze=False)[:, 0]
    most = max(int(sizes.max()) for sizes in findings.sizes.values())
    # A bar for each size; with many sizes, bars on a logarithmic scale.
    bins = np.unique(np.round(np.geomspace(1, most + 1, 40))) if most > 50 else np.arange(1, most + 2)
    for axes, (split, sizes) in zip(panels, findings.sizes.items(), strict=True):
        axes.hist(sizes, bins - 0.5, color=BLUE, rwidth=0.9)
        axes.set(ylabel="classes", title=f"{split}: {len(sizes):,} classes")
        if most > 50:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("")
    panels[-1].set(xlabel="images of a class")
    return figure

"""The report of an evaluation: an HTML file that needs no network, and its figures as files."""

import base64
import re
import traceback

from nsl_dist import storage
from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Manifest
from nsl_dist.retrieval.figures import draw
from nsl_dist.retrieval.findings import Findings, History, gather
from nsl_dist.retrieval.results import EvaluationResults

REPORT_FILE = "report.html"
METRICS = {"r_precision": "R-precision", "map_at_r": "MAP@R", "nmi": "NMI"}


def write_report(
    folder: str,
    results: EvaluationResults,
    *,
    name: str,
    config: TrainConfig,
    manifest: Manifest,
    history: History,
    untrained: EvaluationResults | None = None,
    facts: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write `report.html` and `figures/*.svg`. It never fails: what goes wrong is printed, and there is no report.

    Args:
        folder: folder or URI.
        results: measured on `manifest`, with `config`.
        name: of the run or checkpoint, the report's title.
        config: of the run; with it the gallery is searched again.
        manifest: of the data set.
        history: of the training; may be empty.
        untrained: results before the training, for comparison.
        facts: what else to say of the run, by heading.

    Returns:
        The files by name; none if there is no report.

    """
    try:
        findings = gather(results, name=name, config=config, manifest=manifest, history=history, untrained=untrained)
        findings.facts.update(facts or {})
        files = render(findings)
        for path, content in files.items():
            storage.write_bytes(storage.join(folder, path), content.encode())
    except Exception as error:  # even a bug in a figure must not fail a finished evaluation
        reason = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]  # of a task: below its stack
        print(f"no report: {folder}/{REPORT_FILE} was not written: {reason}; the results stand", flush=True)
        return {}
    return files


def render(findings: Findings) -> dict[str, str]:
    """Return the files of a report by name: the page, and its figures as SVG."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    figures = draw(findings)
    pages = Environment(
        loader=PackageLoader("nsl_dist.retrieval", "pages"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    heads, rows = table_of(findings.results, findings.untrained)
    page = pages.get_template(f"{REPORT_FILE}.j2").render(
        findings=findings,
        heads=heads,
        rows=rows,
        figures={name: Markup(_inline(name, svg)) for name, svg in figures.items()},
        base64=lambda content: base64.b64encode(content).decode(),
    )
    return {REPORT_FILE: page} | {f"figures/{name}.svg": svg for name, svg in figures.items()}


def _inline(name: str, svg: str) -> str:
    """Return an SVG document as an element of a page, its ids prefixed so that those of several figures differ."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", '<svg role="img"', 1)


def table_of(results: EvaluationResults, untrained: EvaluationResults | None) -> tuple[list[str], dict[str, list[str]]]:
    """Return the table of metrics: the heads of its columns, and the cells of each row by its head."""
    columns = [("", results, kind) for kind in results.recall]
    if untrained is not None:
        columns += [("untrained ", untrained, kind) for kind in results.recall]
    rows: dict[str, list[str]] = {}
    for _, each, kind in columns:
        intervals = (each.intervals or {}).get(kind, {})
        for name, share in each.of_kind(kind).items():
            low_high = intervals.get(name)
            interval = f" ({100 * low_high[0]:.2f} to {100 * low_high[1]:.2f})" if low_high else ""
            head = METRICS.get(name, name.replace("_at_", "@"))
            rows.setdefault(head, []).append(f"{100 * share:.2f}{interval}")
    for k, share in results.index.recall_of_exact.items() if results.index is not None else ():
        rows[f"of the exact {k} nearest found"] = [f"{100 * share:.2f}"] + ["-"] * (len(columns) - 1)
    rows["bytes per vector"] = [f"{each.bytes_per_vector[kind]:,}" for _, each, kind in columns]
    return [when + kind for when, _, kind in columns], rows

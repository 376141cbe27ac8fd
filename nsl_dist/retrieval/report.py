"""What a person looks at after an evaluation: an HTML file that needs no network, and its figures as files."""

import base64
import re
from typing import Any

from ray.exceptions import RayActorError

from nsl_dist import storage
from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import DamagedShardError, Manifest
from nsl_dist.retrieval.figures import draw
from nsl_dist.retrieval.findings import Findings, History, gather

REPORT_FILE = "report.html"
METRICS = {"r_precision": "R-precision", "map_at_r": "MAP@R", "nmi": "NMI"}


def write_report(
    folder: str, results: dict[str, Any], *, name: str, config: TrainConfig, manifest: Manifest, history: History
) -> dict[str, str]:
    """Write `report.html` and `figures/*.svg`; what storage or a node fails is told in a line, and there is no report.

    Args:
        folder: folder or URI.
        results: of `evaluate`.
        name: of the run or checkpoint.
        config: evaluated with.
        manifest: of the data evaluated on.
        history: of the training; may be empty.

    Returns:
        The files by name; none if there is no report.

    """
    try:
        files = render(gather(results, name=name, config=config, manifest=manifest, history=history))
        for path, content in files.items():
            storage.write_bytes(storage.join(folder, path), content.encode())
    except (OSError, DamagedShardError, RayActorError) as error:
        cause = (str(error).strip() or repr(error)).splitlines()[-1]  # of a task: below its stack
        print(f"no report: {cause}; the results stand", flush=True)
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
    heads, rows = table_of(findings.results)
    page = pages.get_template(f"{REPORT_FILE}.j2").render(
        findings=findings,
        heads=heads,
        rows=rows,
        figures={name: Markup(_inline(name, svg)) for name, svg in figures.items()},
        base64=lambda content: base64.b64encode(content).decode(),
    )
    return {REPORT_FILE: page} | {f"figures/{name}.svg": svg for name, svg in figures.items()}


def _inline(name: str, svg: str) -> str:
    """Return an SVG document as an element of a page, which other figures' ids and its own do not clash in."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", '<svg role="img"', 1)


def table_of(results: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the table of metrics: the heads of its columns, and the cells of each row by its head."""
    columns = [("", results, kind) for kind in results["recall"]]
    if "untrained" in results:
        columns += [("untrained ", results["untrained"], kind) for kind in results["recall"]]
    rows: dict[str, list[str]] = {}
    for _, each, kind in columns:
        shares = {f"recall_at_{k}": share for k, share in each["recall"][kind].items()}
        shares |= {name: each[name][kind] for name in METRICS if name in each}
        for name, share in shares.items():
            low_high = each.get("intervals", {}).get(kind, {}).get(name)
            interval = f" ({100 * low_high[0]:.2f} to {100 * low_high[1]:.2f})" if low_high else ""
            head = METRICS.get(name, name.replace("_at_", "@"))
            rows.setdefault(head, []).append(f"{100 * share:.2f}{interval}")
    for k, share in results["index"]["recall_of_exact"].items() if "index" in results else ():
        rows[f"of the exact {k} nearest found"] = [f"{100 * share:.2f}"] + ["-"] * (len(columns) - 1)
    rows["bytes per vector"] = [f"{each['bytes_per_vector'][kind]:,}" for _, each, kind in columns]
    return [when + kind for when, _, kind in columns], rows

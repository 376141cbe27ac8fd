"""What an evaluation measured, and how MLflow, the terminal and `results.json` show it. Needs neither Ray nor torch."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from nsl_dist.config import TEST_CLASSES, Kind

KINDS: tuple[Kind, ...] = ("float", "binary")


@dataclass(frozen=True)
class IndexResults:
    """How an approximate index compares with exact search.

    Attributes:
        factory: faiss's description of the index.
        parameters: of its search; None: faiss's defaults.
        sampled_queries: queries that both searched for.
        recall_of_exact: by K, the share of the exact K nearest that the index found among its own K nearest.

    """

    factory: str
    parameters: str | None
    sampled_queries: int
    recall_of_exact: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """One evaluation. Metrics are shares in [0, 1], by kind of embeddings. The fields are in the order of the JSON.

    Attributes:
        nmi: normalised mutual information of k-means clusters and classes; None: not measured.
        index: of the float embeddings; None: exact search.
        recall: by kind, then by K.
        r_precision: R-precision.
        map_at_r: MAP@R.
        intervals: 95% bootstrap intervals by kind, then by metric ("recall_at_1"); None: not measured.
        bytes_per_vector: of an embedding, by kind.
        num_queries: images that query.
        num_gallery: images that are searched.
        num_classes: classes of the queries.
        num_queries_without_match: queries whose class has no other image in the gallery; they count as misses.
        embeddings: folder or URI of the embeddings.
        seconds: by phase ("embed", "search_float").
        unseen: whether training has not seen these classes.

    """

    nmi: dict[Kind, float] | None = None
    index: IndexResults | None = None
    recall: dict[Kind, dict[int, float]]
    r_precision: dict[Kind, float]
    map_at_r: dict[Kind, float]
    intervals: dict[Kind, dict[str, tuple[float, float]]] | None = None
    bytes_per_vector: dict[Kind, int]
    num_queries: int
    num_gallery: int
    num_classes: int
    num_queries_without_match: int
    embeddings: str
    seconds: dict[str, float]
    unseen: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: K as text, intervals as lists, nothing for what was not measured."""
        measured = {name: value for name, value in asdict(self).items() if value is not None}
        return dict(json.loads(json.dumps(measured)))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "EvaluationResults":
        """Return what `to_json` was called on; other keys of `content` are ignored."""
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        known["recall"] = {kind: _by_k(shares) for kind, shares in known["recall"].items()}
        if "intervals" in known:
            known["intervals"] = {
                kind: {metric: (low, high) for metric, (low, high) in by_metric.items()}
                for kind, by_metric in known["intervals"].items()
            }
        if "index" in known:
            index = known["index"]
            known["index"] = IndexResults(**index | {"recall_of_exact": _by_k(index["recall_of_exact"])})
        return cls(**known)

    @property
    def classes(self) -> str:
        """What the classes of the queries are."""
        return TEST_CLASSES["classes" if self.unseen else "images"]

    def metrics_by_name(self) -> dict[str, float]:
        """Return the metrics of all kinds by their names in MLflow: `recall_at_1_float`."""
        return {f"{name}_{kind}": share for kind in self.recall for name, share in self.of_kind(kind).items()}

    def of_kind(self, kind: Kind) -> dict[str, float]:
        """Return the metrics of one kind of embeddings by name: `recall_at_1`, `r_precision`."""
        by_k = {f"recall_at_{k}": share for k, share in self.recall[kind].items()}
        nmi = {} if self.nmi is None else {"nmi": self.nmi[kind]}
        return by_k | {"r_precision": self.r_precision[kind], "map_at_r": self.map_at_r[kind]} | nmi

    def curves(self) -> list[str]:
        """Return the metrics that a report draws over the training, by their names in MLflow: loss and lowest K."""
        return ["loss", *(f"recall_at_{min(by_k)}_{kind}" for kind, by_k in self.recall.items())]

    def recall_line(self) -> str:
        """Return the recalls in one line."""
        return "; ".join(
            f"{kind} recall@{'/'.join(map(str, by_k))} " + " / ".join(f"{100 * share:.1f}" for share in by_k.values())
            for kind, by_k in self.recall.items()
        )


def _by_k(shares: dict[str, float]) -> dict[int, float]:
    return {int(k): share for k, share in shares.items()}


def table(results: dict[str, EvaluationResults]) -> str:
    """Return evaluations on the same data as a table for the terminal, metrics in %.

    Args:
        results: by the name that the rows begin with; "" for a single evaluation.

    """
    first = next(iter(results.values()))
    lines = [
        f"{first.num_queries:,} queries of {first.num_classes:,} {first.classes}, {first.num_gallery:,} images "
        "to find; metrics in %"
    ]
    if first.num_queries_without_match:
        lines.append(f"{first.num_queries_without_match:,} queries have no match to find and count as misses")
    heads = [f"R@{k}" for k in first.recall["float"]] + ["R-prec", "MAP@R", "NMI", "bytes", "search s"]
    lines.append(f"{'':20}" + "".join(f"{head:>9}" for head in heads))
    for name, result in results.items():
        for kind in KINDS:
            lines += _rows(f"{name} {kind}".strip(), result, kind, list(first.recall["float"]))
    return "\n".join(lines)


def _rows(name: str, result: EvaluationResults, kind: Kind, ks: list[int]) -> list[str]:
    """Return the row of one kind of embeddings, and what belongs below it."""
    shares = [result.recall[kind][k] for k in ks] + [result.r_precision[kind], result.map_at_r[kind]]
    nmi = f"{100 * result.nmi[kind]:9.2f}" if result.nmi is not None else f"{'-':>9}"
    lines = [
        f"{name:20}" + "".join(f"{100 * share:9.2f}" for share in shares) + nmi
        + f"{result.bytes_per_vector[kind]:9,}{result.seconds[f'search_{kind}']:9.1f}"
    ]  # fmt: skip
    if kind == "float" and result.index is not None:
        index = result.index
        described = " ".join(filter(None, (index.factory, index.parameters)))
        found = ", ".join(f"{k}: {100 * share:.1f}" for k, share in index.recall_of_exact.items())
        lines.append(
            f"{'':20} index {described}: of the exact K nearest it finds, in %, K = {found} "
            f"({index.sampled_queries:,} queries)"
        )
    for metric, (low, high) in (result.intervals or {}).get(kind, {}).items():
        lines.append(f"{'':20} {metric.replace('_', ' ')}: {100 * low:.2f} to {100 * high:.2f} (95%)")
    return lines

"""Results as JSON holds them, unchanged since the first release that wrote them, and as a user reads them."""

import dataclasses
import json
from typing import Any

from nsl_dist.retrieval.results import EvaluationResults, IndexResults, table
from nsl_dist.training.results import TrainingResults

EVALUATION_JSON: dict[str, Any] = {
    "nmi": {"float": 0.9, "binary": 0.85},
    "index": {
        "factory": "HNSW8", "parameters": None, "sampled_queries": 11, "recall_of_exact": {"5": 1.0, "10": 0.95}
    },
    "recall": {"float": {"5": 0.5, "10": 0.75}, "binary": {"5": 0.25, "10": 0.625}},
    "r_precision": {"float": 0.4, "binary": 0.3},
    "map_at_r": {"float": 0.2, "binary": 0.1},
    "intervals": {
        "float": {"recall_at_5": [0.4, 0.6], "map_at_r": [0.1, 0.3]},
        "binary": {"recall_at_5": [0.2, 0.3], "map_at_r": [0.0, 0.2]},
    },
    "bytes_per_vector": {"float": 2048, "binary": 64},
    "num_queries": 1100,
    "num_gallery": 1200,
    "num_classes": 5,
    "num_queries_without_match": 1,
    "embeddings": "/storage/embeddings/0123456789abcdef",
    "seconds": {
        "embed": 1.5, "index": 0.5, "search_float": 2.0, "nmi_float": 0.25, "search_binary": 1.0, "nmi_binary": 0.125
    },
    "unseen": True,
}  # fmt: skip
EVALUATION = EvaluationResults(
    nmi={"float": 0.9, "binary": 0.85},
    index=IndexResults("HNSW8", None, 11, {5: 1.0, 10: 0.95}),
    recall={"float": {5: 0.5, 10: 0.75}, "binary": {5: 0.25, 10: 0.625}},
    r_precision={"float": 0.4, "binary": 0.3},
    map_at_r={"float": 0.2, "binary": 0.1},
    intervals={
        "float": {"recall_at_5": (0.4, 0.6), "map_at_r": (0.1, 0.3)},
        "binary": {"recall_at_5": (0.2, 0.3), "map_at_r": (0.0, 0.2)},
    },
    bytes_per_vector={"float": 2048, "binary": 64},
    num_queries=1100,
    num_gallery=1200,
    num_classes=5,
    num_queries_without_match=1,
    embeddings="/storage/embeddings/0123456789abcdef",
    seconds={
        "embed": 1.5, "index": 0.5, "search_float": 2.0, "nmi_float": 0.25, "search_binary": 1.0, "nmi_binary": 0.125
    },
)  # fmt: skip
EXACT = dataclasses.replace(EVALUATION, nmi=None, index=None, intervals=None)


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def test_evaluation_results_go_to_json_and_back() -> None:
    assert json.dumps(EVALUATION.to_json()) == json.dumps(EVALUATION_JSON)
    assert EvaluationResults.from_json(json.loads(json.dumps(EVALUATION.to_json()))) == EVALUATION
    exact = without(EVALUATION_JSON, "nmi", "index", "intervals")
    assert EXACT.to_json() == exact
    # `results.json` of an evaluation has more keys than these, and another release may have others.
    assert EvaluationResults.from_json(exact | {"checkpoint": "/checkpoint", "step": 3, "unknown": {}}) == EXACT


def test_training_results_go_to_json_and_back() -> None:
    of_training: dict[str, Any] = {
        "run_name": "a-run",
        "mlflow_run_id": "0123",
        "steps": 14,
        "seconds": {"setup": 1.0, "train": 20.0, "evaluate": 6.0},
        "train_images_per_second": 33.5,
        "data": {"digest": "abc", "source": "here", "train": {"num_images": 140}, "test": {"num_images": 41}},
        "left_out_shards": ["train-00001.parquet"],
        "growth": {"source": "runs/old/checkpoint_000000009", "known": 3, "new": 2, "vanished": 1},
        "config": {"model": {"dim": 16}},
    }
    content = (
        {"untrained": without(EVALUATION_JSON, "nmi", "index", "intervals")}
        | EVALUATION_JSON
        | {"evaluation_seconds": EVALUATION_JSON["seconds"]}
        | of_training
    )
    results = TrainingResults(evaluation=EVALUATION, untrained=EXACT, **of_training)
    assert results.to_json() == content
    assert TrainingResults.from_json(json.loads(json.dumps(content))) == results
    alone = TrainingResults(evaluation=EVALUATION, **of_training)
    assert alone.to_json() == without(content, "untrained")
    assert TrainingResults.from_json(without(content, "untrained") | {"unknown": 1}) == alone
    assert TrainingResults.from_json(without(content, "growth")).growth is None  # of earlier versions


def test_metrics_have_the_names_that_mlflow_knows() -> None:
    assert EVALUATION.metrics_by_name() == {
        "recall_at_5_float": 0.5, "recall_at_10_float": 0.75, "recall_at_5_binary": 0.25, "recall_at_10_binary": 0.625,
        "r_precision_float": 0.4, "r_precision_binary": 0.3, "map_at_r_float": 0.2, "map_at_r_binary": 0.1,
        "nmi_float": 0.9, "nmi_binary": 0.85,
    }  # fmt: skip
    assert "nmi_float" not in EXACT.metrics_by_name()
    assert EVALUATION.curves() == ["loss", "recall_at_5_float", "recall_at_5_binary"]


def test_the_table_shows_what_was_measured() -> None:
    assert EVALUATION.recall_line() == "float recall@5/10 50.0 / 75.0; binary recall@5/10 25.0 / 62.5"
    lines = table({"": EVALUATION}).splitlines()
    assert lines[:2] == [
        "1,100 queries of 5 unseen classes, 1,200 images to find; metrics in %",
        "1 queries have no match to find and count as misses",
    ]
    assert lines[2].split() == ["R@5", "R@10", "R-prec", "MAP@R", "NMI", "bytes", "search", "s"]
    assert lines[3].split() == ["float", "50.00", "75.00", "40.00", "20.00", "90.00", "2,048", "2.0"]
    assert lines[4].strip() == (
        "index HNSW8: of the exact K nearest it finds, in %, K = 5: 100.0, 10: 95.0 (11 queries)"
    )
    assert lines[5].strip() == "recall at 5: 40.00 to 60.00 (95%)"
    assert lines[7].split() == ["binary", "25.00", "62.50", "30.00", "10.00", "85.00", "64", "1.0"]
    lines = table({"trained": EXACT, "untrained": EXACT}).splitlines()
    assert [line.split()[:2] for line in lines[3:]] == [
        ["trained", "float"], ["trained", "binary"], ["untrained", "float"], ["untrained", "binary"]
    ]  # fmt: skip
    assert lines[3].split()[6] == "-"

"""The evaluation of a model: embed, search, measure, float and binary."""

import dataclasses
import json
import time
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from nsl_dist import cluster, storage
from nsl_dist.config import EvaluateConfig, Layout, TrainConfig, TrainEvalConfig
from nsl_dist.data.shards import Manifest, open_data
from nsl_dist.progress import duration, show_results
from nsl_dist.retrieval.batch_inference import embed, embeddings_key
from nsl_dist.retrieval.clustering import cluster_nmi
from nsl_dist.retrieval.metrics import Ranks, bootstrap_intervals, join, recall_at_k
from nsl_dist.retrieval.report import REPORT_FILE, write_report
from nsl_dist.retrieval.sharded_search import Gallery, Kind, check_index, judge_of, open_gallery, sample_blocks, search
from nsl_dist.run import MODEL_FILE, RESULTS_FILE, CheckpointRecord, find_checkpoint

# What each data set is reported with (paper, section 4.1).
RECALL_AT: dict[Layout, tuple[int, ...]] = {
    "sop": (1, 10, 100, 1000),
    "inshop": (1, 10, 20, 30, 40, 50),
    "cub200": (1, 2, 4, 8),
    "cars196": (1, 2, 4, 8),
    "folders": (1, 10, 100),
}
KINDS: tuple[Kind, ...] = ("float", "binary")


def evaluate(weights: str | None, config: TrainConfig, manifest: Manifest, *, num_gpus: int) -> dict[str, Any]:
    """Evaluate on the test split, every image querying the rest, or on the query split against the gallery.

    Args:
        weights: file or URI of the model's state; None evaluates the weights that training starts from.
        config: of the run; embeddings go to `embeddings` below its storage, and are kept for the next evaluation.
        manifest: of the shards.
        num_gpus: GPUs to embed and search with; 0 does so on CPUs.

    Returns:
        `recall` by kind and K, `r_precision`, `map_at_r` and `nmi` by kind (all shares), `bytes_per_vector` by kind,
        counts, where the `embeddings` are, `seconds` by phase; `intervals` and `index` where the configuration asks for
        them.

    Raises:
        ValueError: the model's embeddings have no direction, or the approximate index cannot be built.

    """
    check_index(config.eval, config.model.dim)
    content = storage.read_bytes(weights) if weights is not None else None
    key = embeddings_key(content, config, manifest, num_gpus=num_gpus)
    started = time.monotonic()
    location = storage.join(config.storage, "embeddings", key)
    sets = embed(content, config, manifest, out=location, num_gpus=num_gpus)
    seconds = {"embed": time.monotonic() - started}

    queries, gallery = (sets[name] for name in manifest.evaluation_splits)
    judge = judge_of(queries, gallery)
    recall_at = config.eval.recall_at or RECALL_AT[manifest.layout]
    most = gallery.num_vectors - (1 if queries == gallery else 0)
    k = min(max(*recall_at, int(judge.num_relevant.max())), most)
    if max(recall_at) > most:
        print(f"recall@{max(recall_at)} asks for all of the {most:,} images that there are", flush=True)

    results: dict[str, Any] = {}
    ranks: dict[Kind, Ranks] = {}

    def judged(opened: Gallery, kind: Kind) -> None:
        started = time.monotonic()
        ranks[kind] = join(list(search(queries, opened, kind, judge, k=k, classes=judge.classes)))
        seconds[f"search_{kind}"] = time.monotonic() - started

    def sampled(opened: Gallery) -> NDArray[np.int64]:
        return np.concatenate(list(search(queries, opened, "float", _neighbours, k=k, blocks=blocks)))

    blocks = sample_blocks(queries.num_vectors)  # compare an approximate index with exact search
    if config.eval.index is not None:  # first, since it may turn out that it cannot be built
        started = time.monotonic()
        with open_gallery(gallery, ("float",), config.eval, k=k, num_gpus=0, exact=False) as opened:
            seconds["index"] = time.monotonic() - started
            found = sampled(opened)
            judged(opened, "float")
    with open_gallery(gallery, KINDS, config.eval, k=k, num_gpus=num_gpus) as opened:
        for kind in KINDS:
            if kind == "float" and config.eval.index is not None:
                exact = sampled(opened)
            else:
                judged(opened, kind)
            if config.eval.nmi:
                started = time.monotonic()
                results.setdefault("nmi", {})[kind] = cluster_nmi(opened, kind, judge.classes.gallery)
                seconds[f"nmi_{kind}"] = time.monotonic() - started
    if config.eval.index is not None:
        results["index"] = {
            "factory": config.eval.index,
            "parameters": config.eval.index_parameters,
            "sampled_queries": len(exact),
            "recall_of_exact": _overlap(found, exact, recall_at, k),
        }
    # K beyond the gallery asks for all of it.
    results["recall"] = {
        kind: {str(at): recall_at_k(ranks[kind].first_match, min(at, k)) for at in recall_at} for kind in KINDS
    }
    results["r_precision"] = {kind: float(ranks[kind].r_precision.mean()) for kind in KINDS}
    results["map_at_r"] = {kind: float(ranks[kind].average_precision_at_r.mean()) for kind in KINDS}
    if config.eval.intervals:
        results["intervals"] = {kind: _intervals(ranks[kind], judge.classes.queries, recall_at, k) for kind in KINDS}
    return results | {
        "bytes_per_vector": {"float": 4 * gallery.dim, "binary": gallery.code_bytes},
        "num_queries": queries.num_vectors,
        "num_gallery": gallery.num_vectors,
        "num_classes": len(np.unique(judge.classes.queries)),
        "num_queries_without_match": int((judge.num_relevant == 0).sum()),
        "embeddings": location,
        "seconds": seconds,
    }


def _neighbours(_: range, neighbour_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return neighbour_ids


def _overlap(
    found: NDArray[np.int64], exact: NDArray[np.int64], recall_at: tuple[int, ...], k: int
) -> dict[str, float]:
    """Return which share of the exact `at` nearest are among the `at` that an approximate index found."""
    shares = {}
    for at in recall_at:
        depth = min(at, k)
        both = [np.isin(a[:depth], b[:depth]).sum() for a, b in zip(exact, found, strict=True)]
        shares[str(at)] = float(np.sum(both) / (depth * len(exact)))
    return shares


def _intervals(
    ranks: Ranks, query_labels: NDArray[np.int64], recall_at: tuple[int, ...], k: int
) -> dict[str, list[float]]:
    values = {f"recall_at_{at}": (ranks.first_match < min(at, k)).astype(float) for at in recall_at}
    values |= {"r_precision": ranks.r_precision, "map_at_r": ranks.average_precision_at_r}
    bounds = bootstrap_intervals(np.stack(list(values.values()), axis=1), query_labels)
    return dict(zip(values, bounds.tolist(), strict=True))


def metrics_by_name(results: dict[str, Any]) -> dict[str, float]:
    """Return `evaluate`'s metrics by the names that MLflow knows them by: `recall_at_1_float`."""
    named = {f"recall_at_{k}_{kind}": share for kind, by_k in results["recall"].items() for k, share in by_k.items()}
    for metric in ("r_precision", "map_at_r", "nmi"):
        named |= {f"{metric}_{kind}": share for kind, share in results.get(metric, {}).items()}
    return named


def curves(results: dict[str, Any]) -> list[str]:
    """Return the metrics that a report shows the course of, by MLflow's names: the loss, and recall at the lowest K."""
    return ["loss", *(f"recall_at_{min(by_k, key=int)}_{kind}" for kind, by_k in results["recall"].items())]


def recall_line(results: dict[str, Any]) -> str:
    """Return `evaluate`'s recalls in one line."""
    return "; ".join(
        f"{kind} recall@{'/'.join(by_k)} " + " / ".join(f"{100 * share:.1f}" for share in by_k.values())
        for kind, by_k in results["recall"].items()
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return evaluations as a table for a person, metrics in %.

    Args:
        results: of `evaluate`, by what to call them.

    """
    first = next(iter(results.values()))
    ks = list(first["recall"]["float"])
    lines = [
        f"{first['num_queries']:,} queries of {first['num_classes']:,} unseen classes, {first['num_gallery']:,} images "
        "to find; metrics in %"
    ]
    if first["num_queries_without_match"]:
        lines.append(f"{first['num_queries_without_match']:,} queries have no match to find and count as misses")
    heads = [f"R@{k}" for k in ks] + ["R-prec", "MAP@R", "NMI", "bytes", "search s"]
    lines.append(f"{'':20}" + "".join(f"{head:>9}" for head in heads))
    for name, result in results.items():
        for kind in KINDS:
            shares = [result["recall"][kind][k] for k in ks] + [result["r_precision"][kind], result["map_at_r"][kind]]
            nmi = f"{100 * result['nmi'][kind]:9.2f}" if "nmi" in result else f"{'-':>9}"
            seconds = result["seconds"][f"search_{kind}"]
            lines.append(
                f"{f'{name} {kind}'.strip():20}" + "".join(f"{100 * share:9.2f}" for share in shares) + nmi
                + f"{result['bytes_per_vector'][kind]:9,}{seconds:9.1f}"
            )  # fmt: skip
            if kind == "float" and "index" in result:
                index = result["index"]
                described = " ".join(filter(None, (index["factory"], index["parameters"])))
                shares = [f"{k}: {100 * share:.1f}" for k, share in index["recall_of_exact"].items()]
                lines.append(
                    f"{'':20} index {described}: of the exact K nearest it finds, "
                    f"in %, K = {', '.join(shares)} ({index['sampled_queries']:,} queries)"
                )
            for metric, (low, high) in result.get("intervals", {}).get(kind, {}).items():
                lines.append(f"{'':20} {metric.replace('_', ' ')}: {100 * low:.2f} to {100 * high:.2f} (95%)")
    return "\n".join(lines)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a checkpoint by itself; show progress and results; return what is written to `results.json`.

    Raises:
        FileNotFoundError: the checkpoint or the data is not there.
        ValueError: checkpoint, data, cluster or MLflow cannot give this evaluation.

    """
    config = dataclasses.replace(config, storage=storage.absolute(config.storage))
    checkpoint = find_checkpoint(config.checkpoint)
    trained = CheckpointRecord.read(checkpoint)
    settings = trained.model_settings()
    storage.check_writable(config.storage)
    tracker = None
    if config.run_id is not None:
        from nsl_dist.tracking.tracker import Tracker  # MLflow takes seconds to import

        tracker = Tracker(config.tracking_uri, storage_root=config.storage)
        tracker.find(config.run_id)  # or refuse it now

    cluster.connect(num_cpus=2)
    on_gpus = cluster.settle_device(config.device) == "cuda"
    cluster.wait_for(
        {"reading": (1, {"CPU": 1}), "embedding": (1, {"GPU": 1} if on_gpus else {"CPU": 1})},
        minutes=config.wait_for_nodes,
        fix="choose another --device, or add nodes",
    )
    num_gpus = cluster.totals()[1] if on_gpus else 0
    manifest = _open_test_data(config, settings, trained.digest)
    ours = {field.name: getattr(config.eval, field.name) for field in dataclasses.fields(config.eval)}
    settings = dataclasses.replace(settings, storage=config.storage, eval=TrainEvalConfig(**ours))
    weights = storage.join(checkpoint, MODEL_FILE)
    _check_weights(weights, settings)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-step-{trained.step}"
    if tracker is not None:
        tracker.start_evaluation(config, manifest, parent=str(config.run_id), name=name)
    query, gallery = manifest.evaluation_splits
    images = f"{manifest.splits[query]['num_images']:,} images of {manifest.splits[query]['num_classes']:,} classes"
    searched = "the rest" if query == gallery else f"{manifest.splits[gallery]['num_images']:,} images of the gallery"
    lines = {
        "checkpoint": f"{checkpoint}, after {trained.step:,} iterations",
        "model": f"{settings.model.backbone}, {settings.model.dim} dimensions, {settings.data.image_size} pixels",
        "data": f"{manifest.root} (digest {manifest.digest[:16]}, layout {manifest.layout})",
        "search": f"{images} query {searched}; {config.eval.index or 'exact'}, "
        f"{config.eval.num_shards or 'a shard for each ' + ('GPU' if num_gpus else 'node')}"
        f"{' shards' if config.eval.num_shards else ''}, {config.eval.memory_budget:g} GiB",
        "MLflow": f"{tracker.uri}, run {tracker.run_id}, a child of {config.run_id}"
        if tracker
        else "left alone; --run-id makes the evaluation a child of that run",
    }
    print("\n".join(f"{name:>10}  {text}" for name, text in lines.items()), flush=True)

    started = time.monotonic()
    try:
        results = evaluate(weights, settings, manifest, num_gpus=num_gpus)
    except BaseException:
        if tracker is not None:
            tracker.finish(status="FAILED")
        raise
    results |= {
        "checkpoint": checkpoint,
        "step": trained.step,
        "data": {"digest": manifest.digest, "source": manifest.source, **manifest.splits},
        "config": dataclasses.asdict(config),
    }
    content = json.dumps(results, indent=1)
    folder = storage.join(config.storage, "evaluations", name)
    storage.write_bytes(storage.join(folder, RESULTS_FILE), content.encode())
    files = write_report(
        folder,
        results,
        name=f"{settings.run_name}, after {trained.step:,} iterations",
        config=settings,
        manifest=manifest,
        history=tracker.history(curves(results), run_id=str(config.run_id)) if tracker is not None else {},
    )
    if tracker is not None:
        tracker.log(metrics_by_name(results), step=trained.step)
        for path, text in {RESULTS_FILE: content, **files}.items():
            tracker.log_file(path, text)
        tracker.finish(status="FINISHED")
    shown = [
        f"\n{table({'': results})}",
        f"{duration(time.monotonic() - started)} in all",
        *([f"report:  {folder}/{REPORT_FILE}"] if files else []),
        f"results: {folder}/{RESULTS_FILE}",
    ]
    show_results("\n".join(shown), results)
    return results


def _open_test_data(config: EvaluateConfig, settings: TrainConfig, digest: str) -> Manifest:
    """Open the data to evaluate on; refuse other data than that of the training unless it was asked for."""
    root = config.data.root or settings.data.root

    def check(found: str) -> None:
        if found != digest and not config.data.unrelated:
            raise ValueError(
                f"the checkpoint was trained on data of digest {digest[:16]}, {root or 'the synthetic products'} has "
                f"{found[:16]}: its test classes may have been trained on; give the data of the training as "
                "--data.root, or --data.unrelated to evaluate on another data set"
            )

    return open_data(
        root,
        layout=config.data.layout,
        storage_root=config.storage,
        max_undecodable=config.data.max_undecodable,
        check_digest=check,
    )


def _check_weights(weights: str, config: TrainConfig) -> None:
    """Refuse weights that are not of the model that the checkpoint's configuration describes."""

    def check() -> None:
        from nsl_dist.embedder import load_weights
        from nsl_dist.model import build_model

        model = build_model(config.model, seed=config.seed, pretrained=False)
        load_weights(model, storage.read_bytes(weights), location=weights)

    cluster.get(ray.remote(check).remote())  # in a task, since torchvision takes long to import

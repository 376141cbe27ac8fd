"""Evaluation of a model: embed the test images, search, and measure, with float and binary embeddings."""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from nsl_dist import cluster, storage
from nsl_dist.background import in_background
from nsl_dist.config import (
    BY_CLASSES,
    EvalConfig,
    EvaluateConfig,
    Kind,
    Layout,
    TrainConfig,
    TrainEvalConfig,
)
from nsl_dist.data.shards import Manifest, find_data, open_data, synthetic_data
from nsl_dist.progress import announce, doing, duration, show_results
from nsl_dist.retrieval.batch_inference import embed, embeddings_key
from nsl_dist.retrieval.clustering import cluster_nmi
from nsl_dist.retrieval.faiss_index import check_index
from nsl_dist.retrieval.metrics import Judge, Ranks, bootstrap_intervals, join, recall_at_k
from nsl_dist.retrieval.report import REPORT_FILE, write_report
from nsl_dist.retrieval.results import KINDS, EvaluationResults, IndexResults, table
from nsl_dist.retrieval.sharded_search import Gallery, judge_of, open_gallery, sample_blocks, search
from nsl_dist.retrieval.vector_files import EmbeddingSet
from nsl_dist.run import FAILURES_FILE, MODEL_FILE, RESULTS_FILE, CheckpointRecord, RunFolder, find_checkpoint
from nsl_dist.stopping import before_a_stop

if TYPE_CHECKING:
    from nsl_dist.tracking.tracker import Tracker

# The K that each data set is reported with (paper, section 4.1).
RECALL_AT: dict[Layout, tuple[int, ...]] = {
    "sop": (1, 10, 100, 1000),
    "inshop": (1, 10, 20, 30, 40, 50),
    "cub200": (1, 2, 4, 8),
    "cars196": (1, 2, 4, 8),
    "folders": (1, 10, 100),
}


def evaluate(
    weights: str | None,
    config: TrainConfig,
    manifest: Manifest,
    *,
    num_gpus: int,
    most_cpus: int | None = None,
    failures: str | None = None,
) -> EvaluationResults:
    """Evaluate on the test split, every image querying the rest, or on the query split against the gallery.

    Args:
        weights: file or URI of the model's weights; None: those that training starts from.
        config: its model, data, evaluation, precision, seed and storage count. Embeddings go to `embeddings` below the
            storage, and are kept for the next evaluation.
        manifest: of the data set.
        num_gpus: GPUs to embed and search with; 0 uses CPUs.
        most_cpus: see `embed`.
        failures: file or URI for a table of all queries whose nearest neighbour by float embeddings is of another
            class (see `_write_failures`); None: it is not written.

    Raises:
        ValueError: the model's embeddings have no direction, or the approximate index cannot be built.

    """
    check_index(config.eval, config.model.dim)
    seconds: dict[str, float] = {}
    with _timed(seconds, "embed"):
        location, sets = _embed(weights, config, manifest, num_gpus=num_gpus, most_cpus=most_cpus)
    task = _retrieval_task(sets, manifest, config.eval)
    ranks: dict[Kind, Ranks] = {}
    nmi: dict[Kind, float] = {}
    index = None
    if config.eval.index is not None:  # before the rest, since it may turn out that it cannot be built
        ranks["float"], sampled = _search_index(task, config.eval, seconds)
    with open_gallery(task.gallery, KINDS, config.eval, k=task.k, num_gpus=num_gpus) as opened:
        for kind in KINDS:
            if kind in ranks:
                index = _compare_index(sampled, _search_sample(task, opened), task, config.eval)
            else:
                ranks[kind] = _judge_all(task, opened, kind, seconds)
            if config.eval.nmi:
                with _timed(seconds, f"nmi_{kind}"):
                    nmi[kind] = cluster_nmi(opened, kind, task.judge.classes.gallery)
    if failures is not None:
        _write_failures(failures, task, ranks["float"], manifest)
    query_labels = task.judge.classes.queries
    return EvaluationResults(
        nmi=nmi or None,
        index=index,
        recall={kind: task.recall(ranks[kind]) for kind in KINDS},
        r_precision={kind: float(ranks[kind].r_precision.mean()) for kind in KINDS},
        map_at_r={kind: float(ranks[kind].average_precision_at_r.mean()) for kind in KINDS},
        intervals={kind: _intervals(ranks[kind], query_labels, task) for kind in KINDS}
        if config.eval.intervals
        else None,
        bytes_per_vector={"float": 4 * task.gallery.dim, "binary": task.gallery.code_bytes},
        num_queries=task.queries.num_vectors,
        num_gallery=task.gallery.num_vectors,
        num_classes=len(np.unique(query_labels)),
        num_queries_without_match=int((task.judge.num_relevant == 0).sum()),
        embeddings=location,
        seconds=seconds,
        unseen=manifest.split_by == "classes",
    )


@dataclass(frozen=True)
class _RetrievalTask:
    """What is searched for in what, and how deep.

    Attributes:
        queries: their embeddings.
        gallery: its embeddings; equal to `queries` if every image queries the rest.
        judge: turns neighbours into ranks.
        recall_at: K of recall@K.
        k: neighbours of each query that the metrics need.

    """

    queries: EmbeddingSet
    gallery: EmbeddingSet
    judge: Judge
    recall_at: tuple[int, ...]
    k: int

    def depth(self, at: int) -> int:
        """Return K, or all neighbours that there are if K is more than the gallery has."""
        return min(at, self.k)

    def recall(self, ranks: Ranks) -> dict[int, float]:
        return {at: recall_at_k(ranks.first_match, self.depth(at)) for at in self.recall_at}


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started


def _embed(
    weights: str | None, config: TrainConfig, manifest: Manifest, *, num_gpus: int, most_cpus: int | None
) -> tuple[str, dict[str, EmbeddingSet]]:
    """Return where the embeddings are, and those of each split of the evaluation."""
    content = storage.read_bytes(weights) if weights is not None else None
    key = embeddings_key(content, config, manifest, num_gpus=num_gpus)
    location = storage.join(config.storage, "embeddings", key)
    return location, embed(content, config, manifest, out=location, num_gpus=num_gpus, most_cpus=most_cpus)


def _retrieval_task(sets: dict[str, EmbeddingSet], manifest: Manifest, config: EvalConfig) -> _RetrievalTask:
    queries, gallery = (sets[name] for name in manifest.evaluation_splits)
    judge = judge_of(queries, gallery)
    recall_at = config.recall_at or RECALL_AT[manifest.layout]
    most = gallery.num_vectors - (1 if queries == gallery else 0)
    if max(recall_at) > most:
        print(f"recall@{max(recall_at)} asks for all of the {most:,} images that there are", flush=True)
    k = min(max(*recall_at, int(judge.num_relevant.max())), most)
    return _RetrievalTask(queries, gallery, judge, recall_at, k)


def _search_index(
    task: _RetrievalTask, config: EvalConfig, seconds: dict[str, float]
) -> tuple[Ranks, NDArray[np.int64]]:
    """Search floats with the approximate index; return the ranks of all queries and the neighbours of a sample."""
    with ExitStack() as stack:
        with _timed(seconds, "index"):
            opened = stack.enter_context(
                open_gallery(task.gallery, ("float",), config, k=task.k, num_gpus=0, exact=False)
            )
        sampled = _search_sample(task, opened)
        return _judge_all(task, opened, "float", seconds), sampled


def _judge_all(task: _RetrievalTask, opened: Gallery, kind: Kind, seconds: dict[str, float]) -> Ranks:
    with _timed(seconds, f"search_{kind}"):
        return join(list(search(task.queries, opened, kind, task.judge, k=task.k, classes=task.judge.classes)))


def _search_sample(task: _RetrievalTask, opened: Gallery) -> NDArray[np.int64]:
    """Return the neighbours of some queries, to compare an approximate index with exact search."""
    blocks = sample_blocks(task.queries.num_vectors)
    return np.concatenate(list(search(task.queries, opened, "float", _neighbours, k=task.k, blocks=blocks)))


def _neighbours(_: range, neighbour_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return neighbour_ids


def _compare_index(
    found: NDArray[np.int64], exact: NDArray[np.int64], task: _RetrievalTask, config: EvalConfig
) -> IndexResults:
    """Return which share of the exact K nearest neighbours are among the K nearest that the index found."""
    shares = {}
    for at in task.recall_at:
        depth = task.depth(at)
        both = [np.isin(a[:depth], b[:depth]).sum() for a, b in zip(exact, found, strict=True)]
        shares[at] = float(np.sum(both) / (depth * len(exact)))
    return IndexResults(str(config.index), config.index_parameters, len(exact), shares)


def _write_failures(location: str, task: _RetrievalTask, ranks: Ranks, manifest: Manifest) -> None:
    """Write a CSV file of the queries that could have a match but whose nearest neighbour is none, the worst first.

    `place_of_match` is that of the first match among the neighbours, from 1; empty if it is not among the first `k`.
    """
    failed = np.flatnonzero((ranks.first_match > 0) & (task.judge.num_relevant > 0))
    failed = failed[np.argsort(-ranks.first_match[failed], kind="stable")]
    query, gallery = manifest.evaluation_splits
    places = ranks.first_match[failed] + 1
    table = pa.table(
        {
            "path": task.queries.paths().take(failed),
            "class": _class_names(manifest, query, failed),
            "place_of_match": pa.array(places, mask=places > task.k),
            "nearest_path": task.gallery.paths().take(ranks.nearest[failed]),
            "nearest_class": _class_names(manifest, gallery, ranks.nearest[failed]),
        }
    )
    with storage.open_output(location) as stream:
        csv.write_csv(table, stream)


def _class_names(manifest: Manifest, split: str, ids: NDArray[np.int64]) -> pa.ChunkedArray:
    labels = np.searchsorted(manifest.split(split).offsets, ids, side="right") - 1
    return manifest.class_ids(split).take(labels)


def _intervals(ranks: Ranks, query_labels: NDArray[np.int64], task: _RetrievalTask) -> dict[str, tuple[float, float]]:
    values = {f"recall_at_{at}": (ranks.first_match < task.depth(at)).astype(float) for at in task.recall_at}
    values |= {"r_precision": ranks.r_precision, "map_at_r": ranks.average_precision_at_r}
    bounds = bootstrap_intervals(np.stack(list(values.values()), axis=1), query_labels)
    return {metric: (low, high) for metric, (low, high) in zip(values, bounds.tolist(), strict=True)}


def run(config: EvaluateConfig) -> EvaluationResults:
    """Evaluate a checkpoint by itself, show progress and results, write `results.json` and a report.

    Raises:
        FileNotFoundError: the checkpoint or the data does not exist.
        ValueError: checkpoint, data, cluster or MLflow cannot be used for this evaluation.

    """
    config = _completed(config)
    storage_root = str(config.storage)
    checkpoint = find_checkpoint(config.checkpoint)
    trained = CheckpointRecord.read(checkpoint)
    settings, weights = _settings(trained, config), storage.join(checkpoint, MODEL_FILE)
    storage.check_writable(storage_root)
    check = in_background(functools.partial(_check_weights, weights, settings))
    tracker = _connect_to_mlflow(config)
    num_gpus = _wait_for_cluster(config)
    manifest = _open_test_data(config, settings, trained.digest)
    check.result()
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-step-{trained.step}"
    with _tracked(tracker, config, manifest, name=name):
        iterations = f"after {trained.step:,} iterations"
        _announce(config, settings, manifest, tracker, checkpoint=f"{checkpoint}, {iterations}", num_gpus=num_gpus)
        started = time.monotonic()
        folder = storage.join(storage_root, "evaluations", name)
        doing("embedding the test images and searching")
        results = evaluate(weights, settings, manifest, num_gpus=num_gpus, failures=storage.join(folder, FAILURES_FILE))
        content = results.to_json() | {
            "checkpoint": checkpoint,
            "step": trained.step,
            "data": {"digest": manifest.digest, "source": manifest.source, **manifest.splits},
            "config": dataclasses.asdict(config),
        }
        text = json.dumps(content, indent=1)
        storage.write_bytes(storage.join(folder, RESULTS_FILE), text.encode())
        report = write_report(
            folder,
            results,
            name=f"{settings.run_name}, {iterations}",
            config=settings,
            manifest=manifest,
            history=tracker.history(results.curves(), run_id=str(config.run_id)) if tracker is not None else {},
        )
        if tracker is not None:
            tracker.log(results.metrics_by_name(), step=trained.step)
            for path, written in {RESULTS_FILE: text, **report}.items():
                tracker.log_file(path, written)
    shown = [
        f"\n{table({'': results})}",
        f"{duration(time.monotonic() - started)} in all",
        *([f"report:  {folder}/{REPORT_FILE}"] if report else []),
        f"misses:  {folder}/{FAILURES_FILE}",
        f"results: {folder}/{RESULTS_FILE}",
    ]
    show_results("\n".join(shown), content)
    return results


def _completed(config: EvaluateConfig) -> EvaluateConfig:
    """Fill in what is known from the run of the checkpoint: its storage, MLflow run and tracking URI."""
    folder = RunFolder.holding(config.checkpoint)
    root = storage.absolute(config.storage or RunFolder.storage_of(config.checkpoint))
    if not config.track:
        return dataclasses.replace(config, storage=root, run_id=None)
    run_id, uri = (folder.mlflow_run_id(), folder.tracking_uri()) if folder is not None else (None, None)
    return dataclasses.replace(
        config, storage=root, run_id=config.run_id or run_id, tracking_uri=config.tracking_uri or uri
    )


def _settings(trained: CheckpointRecord, config: EvaluateConfig) -> TrainConfig:
    """Return the model and data of the training with the storage and search of an evaluation."""
    ours = {field.name: getattr(config.eval, field.name) for field in dataclasses.fields(config.eval)}
    return dataclasses.replace(trained.model_settings(), storage=str(config.storage), eval=TrainEvalConfig(**ours))


def _connect_to_mlflow(config: EvaluateConfig) -> "Tracker | None":
    """Return a connection that knows `config.run_id`; None if MLflow is left alone.

    Raises:
        ValueError: MLflow does not know the run, or cannot be used.

    """
    if config.run_id is None:
        return None
    from nsl_dist.tracking.tracker import Tracker  # MLflow takes seconds to import

    folder = RunFolder.holding(config.checkpoint)
    is_own = folder is not None and folder.mlflow_run_id() == config.run_id
    tracker = Tracker(
        config.tracking_uri, storage_root=folder.storage_root if folder and is_own else str(config.storage)
    )
    tracker.find(config.run_id)  # or refuse it now
    return tracker


@contextmanager
def _tracked(tracker: "Tracker | None", config: EvaluateConfig, manifest: Manifest, *, name: str) -> Iterator[None]:
    """Keep a run in MLflow for the evaluation: FINISHED at the end, FAILED whatever goes wrong."""
    if tracker is None:
        yield
        return

    def stop() -> None:
        tracker.finish(status="KILLED")

    try:
        tracker.start_evaluation(config, manifest, parent=str(config.run_id), name=name)
        with before_a_stop(stop, said="the next evaluation uses the embeddings that are there"):
            yield
        tracker.finish(status="FINISHED")
    except BaseException:
        if tracker.run_id:  # it was created
            tracker.finish(status="FAILED")
        raise


def _wait_for_cluster(config: EvaluateConfig) -> int:
    """Connect to Ray and wait for room for the evaluation; return the GPUs to use.

    Raises:
        ValueError: the cluster has no room and cannot make any.

    """
    cluster.connect(num_cpus=1)
    on_gpus = cluster.settle_device(config.device) == "cuda"
    cluster.wait_for(
        {"reading": (1 if on_gpus else 0, {"CPU": 1}), "embedding": (1, {"GPU": 1} if on_gpus else {"CPU": 1})},
        minutes=config.wait_for_nodes,
        fix="choose another --device, or add nodes",
    )
    return cluster.totals()[1] if on_gpus else 0


def _announce(
    config: EvaluateConfig,
    settings: TrainConfig,
    manifest: Manifest,
    tracker: "Tracker | None",
    *,
    checkpoint: str,
    num_gpus: int,
) -> None:
    """Say what the evaluation will do before it does it."""
    query, gallery = manifest.evaluation_splits
    images = f"{manifest.splits[query]['num_images']:,} images of {manifest.splits[query]['num_classes']:,} classes"
    searched = "the rest" if query == gallery else f"{manifest.splits[gallery]['num_images']:,} images of the gallery"
    lines = {
        "checkpoint": checkpoint,
        "model": f"{settings.model.backbone}, {settings.model.dim} dimensions, {settings.data.image_size} pixels",
        "data": f"{manifest.root} (digest {manifest.digest[:16]}, layout {manifest.layout})",
        "search": f"{images} query {searched}; {config.eval.index or 'exact'}, "
        f"{config.eval.num_shards or 'a shard for each ' + ('GPU' if num_gpus else 'node')}"
        f"{' shards' if config.eval.num_shards else ''}, {config.eval.memory_budget:g} GiB",
        "MLflow": f"{tracker.uri}, run {tracker.run_id}, a child of {config.run_id}"
        if tracker
        else "not tracked"
        if not config.track
        else "not tracked: the checkpoint is of no run; --run-id makes the evaluation a child of a run",
    }
    announce(lines)


def _open_test_data(config: EvaluateConfig, settings: TrainConfig, trained_digest: str) -> Manifest:
    """Open the data to evaluate on.

    Raises:
        ValueError: it is not the data of the training, and `config` does not ask for other data.

    """
    root = config.data.root or settings.data.root
    split = settings.data.folder_split if not config.data.unrelated else BY_CLASSES
    source = find_data(root, layout=config.data.layout, split=split) if root else synthetic_data(settings.storage)
    if source.digest != trained_digest and not config.data.unrelated:
        raise ValueError(
            f"the checkpoint was trained on data of digest {trained_digest[:16]}, {source.root} has "
            f"{source.digest[:16]}: its test classes may have been trained on; give the data of the training as "
            "--data.root, or --data.unrelated to evaluate on another data set"
        )
    return open_data(source, storage_root=settings.storage, max_undecodable=config.data.max_undecodable)


def _check_weights(weights: str, config: TrainConfig) -> None:
    """Check that weights are of the model in `config`.

    Raises:
        ValueError: they are not.

    """
    from nsl_dist.embedder import load_weights  # imports torchvision, which takes seconds
    from nsl_dist.model import build_model

    model = build_model(config.model, seed=config.seed, pretrained=False)
    load_weights(model, storage.read_bytes(weights), location=weights)

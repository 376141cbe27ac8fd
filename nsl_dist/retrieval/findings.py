"""What a report of an evaluation shows: the neighbours of some queries, and samples of pairs and of embeddings.

Letters of array names: Q sampled queries, K neighbours, S pairs of a sampled query and an image, N images of the map,
D dimensions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Manifest, Split
from nsl_dist.retrieval.results import EvaluationResults
from nsl_dist.retrieval.sharded_search import Gallery, judge_of, open_gallery, sample_blocks, search
from nsl_dist.retrieval.vector_files import load_index

History = dict[str, list[tuple[int, float]]]  # steps and values of metrics, by their names in MLflow

NEIGHBOURS = 8  # shown for each query
DEPTH = 1000  # neighbours that are searched for the first match
FAILURES, SUCCESSES = 12, 6  # queries shown
PAIRS = 8  # of the same class for each sampled query, and as many of other classes
MAPPED = 10_000  # images on the map
LEGEND = 20  # classes that fit a legend
SEED = 0
THUMBNAIL_EDGE, THUMBNAIL_QUALITY = 96, 80


@dataclass(frozen=True)
class Picture:
    """An image on the sheet of neighbours: a JPEG, its class, and its path in the raw data set."""

    jpeg: bytes
    class_id: str
    path: str


@dataclass(frozen=True)
class Neighbour:
    """A neighbour on the sheet: whether it has the query's class, and its cosine similarity."""

    picture: Picture
    matches: bool
    similarity: float


@dataclass(frozen=True)
class Row:
    """A query on the sheet, its nearest neighbours, and the rank of its first match, from 0; None: not found."""

    query: Picture
    neighbours: list[Neighbour]
    first_match: int | None


@dataclass(frozen=True)
class Findings:
    """All that a report shows.

    Attributes:
        name: of the run or checkpoint.
        facts: data and model, by heading.
        results: of the model.
        untrained: results before the training; None: not measured.
        history: of the training; may be empty.
        num_sampled: queries in the sample.
        depth: neighbours that were searched for the first match.
        failures: queries whose first match ranks last, the worst first.
        successes: some of the queries whose nearest neighbour is a match.
        same_S: cosine similarities of queries and images of the same class.
        other_S: those of queries and images of other classes.
        sizes: images of each class, by split.
        map_N2: first two principal components of some embeddings; empty if there are too few.
        labels_N: their classes.
        explained: share of the variance that each component explains.
        class_ids: names of the classes on the map; empty if there are too many for a legend.

    """

    name: str
    facts: dict[str, str]
    results: EvaluationResults
    untrained: EvaluationResults | None
    history: History
    num_sampled: int
    depth: int
    failures: list[Row]
    successes: list[Row]
    same_S: NDArray[np.float32]
    other_S: NDArray[np.float32]
    sizes: dict[str, NDArray[np.int64]]
    map_N2: NDArray[np.float32]
    labels_N: NDArray[np.int64]
    explained: list[float]
    class_ids: list[str]


def gather(
    results: EvaluationResults,
    *,
    name: str,
    config: TrainConfig,
    manifest: Manifest,
    history: History,
    untrained: EvaluationResults | None = None,
) -> Findings:
    """Sample what a report shows (see `write_report`)."""
    rng = np.random.default_rng(SEED)
    sets = load_index(results.embeddings)
    queries, gallery = (sets[split] for split in manifest.evaluation_splits)
    splits = {split: manifest.split(split) for split in dict.fromkeys(["train", *manifest.evaluation_splits])}
    query_split, gallery_split = (splits[split] for split in manifest.evaluation_splits)
    judge = judge_of(queries, gallery)
    gallery_labels = judge.classes.gallery
    own = queries == gallery
    depth = min(DEPTH, gallery.num_vectors - (1 if own else 0))

    blocks = sample_blocks(queries.num_vectors)
    ids_Q = np.concatenate([np.array(block) for block in blocks])
    labels_Q, num_relevant_Q = judge.classes.queries[ids_Q], judge.num_relevant[ids_Q]
    vectors_QD = np.concatenate([queries.read_all("vector", block) for block in blocks])
    mapped_N = np.sort(rng.choice(gallery.num_vectors, min(MAPPED, gallery.num_vectors), replace=False))
    with open_gallery(gallery, ("float",), config.eval, k=depth, num_gpus=0) as opened:

        def similarities(places_S: NDArray[np.int64], ids_S: NDArray[np.int64]) -> NDArray[np.float32]:
            return np.einsum("sd,sd->s", vectors_QD[places_S], _vectors(opened, ids_S))

        found = search(queries, opened, "float", lambda _, ids: ids, k=depth, classes=judge.classes, blocks=blocks)
        neighbours_QK = np.concatenate(list(found))
        matches_QK = gallery_labels[neighbours_QK] == labels_Q[:, None]
        first_match_Q = np.where(matches_QK.any(axis=1), matches_QK.argmax(axis=1), depth)
        failures, successes = choose(first_match_Q, num_relevant_Q, rng)
        shown = np.concatenate([failures, successes])
        shown_ids = neighbours_QK[shown, :NEIGHBOURS]
        shown_similarities = similarities(np.repeat(shown, shown_ids.shape[1]), shown_ids.ravel())
        same, other = draw_pairs(labels_Q, ids_Q if own else None, num_relevant_Q, gallery_labels, rng)
        same_S, other_S = similarities(*same), similarities(*other)
        map_N2, explained = project(_vectors(opened, mapped_N))

    query_pictures = _pictures(query_split, ids_Q[shown])
    pictures = _pictures(gallery_split, shown_ids.ravel())
    rows = [
        Row(
            query_pictures[int(ids_Q[place])],
            [
                Neighbour(pictures[id_], bool(matches), float(similarity))
                for id_, matches, similarity in zip(ids.tolist(), matches_QK[place], near, strict=False)
            ],
            int(first_match_Q[place]) if first_match_Q[place] < depth else None,
        )
        for place, ids, near in zip(shown, shown_ids, shown_similarities.reshape(shown_ids.shape), strict=True)
    ]
    return Findings(
        name=name,
        facts=_facts(results, config, manifest),
        results=results,
        untrained=untrained,
        history=history,
        num_sampled=len(ids_Q),
        depth=depth,
        failures=rows[: len(failures)],
        successes=rows[len(failures) :],
        same_S=same_S,
        other_S=other_S,
        sizes={split: each.sizes for split, each in splits.items()},
        map_N2=map_N2,
        labels_N=gallery_labels[mapped_N],
        explained=explained,
        class_ids=manifest.class_ids(manifest.evaluation_splits[1]).to_pylist()
        if gallery_split.num_classes <= LEGEND
        else [],
    )


def choose(
    first_match_Q: NDArray[np.int64], num_relevant_Q: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the queries to show: those whose first match ranks last, the worst first, and some successes.

    Args:
        first_match_Q: ranks of the first matches, from 0.
        num_relevant_Q: images that each query could find; queries without any are no failures.
        rng: draws the successes.

    Returns:
        Positions of failures and of successes among the queries.

    """
    failed = np.flatnonzero((first_match_Q > 0) & (num_relevant_Q > 0))
    failures = failed[np.argsort(-first_match_Q[failed], kind="stable")][:FAILURES]
    succeeded = np.flatnonzero(first_match_Q == 0)
    return failures, np.sort(rng.choice(succeeded, min(SUCCESSES, len(succeeded)), replace=False))


def draw_pairs(
    labels_Q: NDArray[np.int64],
    own_ids_Q: NDArray[np.int64] | None,
    num_relevant_Q: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Draw pairs of a query and an image of the gallery, never of an image and itself.

    Args:
        labels_Q: classes of the queries.
        own_ids_Q: ids of the queries in the gallery; None: they are not in it.
        num_relevant_Q: images of each query's class in the gallery, without the query itself.
        gallery_labels: classes of the gallery, by id, ascending.
        rng: draws the pairs.

    Returns:
        Pairs of the same class, then pairs of different classes, each as positions among the queries and gallery ids.

    """
    places = np.repeat(np.flatnonzero(num_relevant_Q > 0), PAIRS)
    ids = np.searchsorted(gallery_labels, labels_Q[places]) + rng.integers(num_relevant_Q[places])
    if own_ids_Q is not None:
        ids += ids >= own_ids_Q[places]
    other_places = np.repeat(np.arange(len(labels_Q)), PAIRS)
    other_ids = rng.integers(len(gallery_labels), size=len(other_places))
    differ = gallery_labels[other_ids] != labels_Q[other_places]
    return (places, ids), (other_places[differ], other_ids[differ])


def project(vectors_ND: NDArray[np.float32]) -> tuple[NDArray[np.float32], list[float]]:
    """Return the first two principal components, `[N, 2]`, and the share of the variance that each explains."""
    if min(vectors_ND.shape) < 2:
        return np.empty((0, 2), dtype=np.float32), []
    from sklearn.decomposition import PCA

    pca = PCA(2, random_state=SEED)
    return pca.fit_transform(vectors_ND), pca.explained_variance_ratio_.tolist()


def _vectors(opened: Gallery, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    found = np.empty((len(ids), opened.embeddings.dim), dtype=np.float32)
    opened.gather(ids, lambda shard, part: shard.rows.remote(ids[part], "float"), found)
    return found


def _pictures(split: Split, ids: NDArray[np.int64]) -> dict[int, Picture]:
    """Return some images by id; each class is read once."""
    from nsl_dist.data.images import thumbnail  # torch takes seconds to import

    ids = np.unique(ids)
    offsets = split.offsets
    labels = np.searchsorted(offsets, ids, side="right") - 1
    pictures = {}
    for label in np.unique(labels).tolist():
        bag = split.read_bag(label, ["class_id", "path", "image"])
        for id_ in ids[labels == label].tolist():
            (row,) = bag.slice(id_ - int(offsets[label]), 1).to_pylist()
            small = thumbnail(row["image"], THUMBNAIL_EDGE, quality=THUMBNAIL_QUALITY)
            pictures[id_] = Picture(small, row["class_id"], row["path"])
    return pictures


def _facts(results: EvaluationResults, config: TrainConfig, manifest: Manifest) -> dict[str, str]:
    train = manifest.splits["train"]
    query, gallery = manifest.evaluation_splits
    without = results.num_queries_without_match
    facts = {
        "Data": f"{manifest.source} (layout {manifest.layout}, digest {manifest.digest[:16]})",
        "Model": f"{config.model.backbone}, {config.model.dim} dimensions, {config.data.image_size} pixels",
        "Training split": f"{train['num_images']:,} images of {train['num_classes']:,} classes",
        "Queries": f"{results.num_queries:,} images of {results.num_classes:,} {results.classes}"
        + (f", {without:,} of them without a match to find, sure misses" if without else ""),
        "Searched": "the same images, the query left out" if query == gallery else f"{results.num_gallery:,} images",
    }
    return facts | ({"Index": results.index.factory} if results.index is not None else {})

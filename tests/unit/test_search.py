from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nsl_dist.retrieval.gallery_shard import read_shard
from nsl_dist.retrieval.metrics import bootstrap_intervals, rank, recall_at_k
from nsl_dist.retrieval.neighbours import Nearest, distances_of, ids_of, merge, to_keys, without
from nsl_dist.retrieval.ties import inner_products, nearer, settle_ties, tolerance
from nsl_dist.retrieval.vector_files import EmbeddingSet, load_index, pack_codes, write_file, write_index
from tests.support.vectors import paths_of


@pytest.mark.parametrize("dim", [8, 13])
def test_embeddings_are_read_as_written(tmp_path: Path, dim: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, dim)).astype(np.float32)
    labels = np.arange(50) // 3
    for name, ids in (("a.parquet", np.arange(20)), ("b.parquet", np.arange(20, 50))):
        file = str(tmp_path / name)
        write_file(file, split="test", ids=ids, paths=paths_of(ids), labels=labels[ids], vectors=vectors[ids])
    written = EmbeddingSet(str(tmp_path), "test", dim, ("a.parquet", "b.parquet"), (20, 30))
    with pytest.raises(FileNotFoundError):
        load_index(str(tmp_path))
    write_index(str(tmp_path), [written])
    read = load_index(str(tmp_path))["test"]
    assert read == written
    assert read.paths().to_pylist() == paths_of(np.arange(50))
    for part in (range(50), range(5, 7), range(15, 40), range(20, 21)):
        assert np.array_equal(read.read_all("id", part), np.array(part))
        assert np.array_equal(read.read_all("label", part), labels[part.start : part.stop])
        assert np.array_equal(read.read_all("vector", part), vectors[part.start : part.stop])
        assert np.array_equal(read.read_all("code", part), pack_codes(vectors)[part.start : part.stop])
    rows = pq.read_table(tmp_path / "b.parquet").to_pylist()
    assert list(rows[0]) == ["id", "path", "label", "split", "vector", "code"]
    assert (rows[0]["id"], rows[0]["label"], rows[0]["split"]) == (20, 6, "test")
    assert np.array_equal(np.unpackbits(np.frombuffer(rows[0]["code"], np.uint8))[:dim], vectors[20] > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_keys_sort_by_distance_then_by_id_and_give_both_back(dtype: type) -> None:
    rng = np.random.default_rng(0)
    distances: np.ndarray = rng.integers(-3, 4, size=(20, 30)).astype(dtype)
    distances[0, :4] = [0, 1, 2**30, 2**24 + 1]
    ids = rng.permutation(2**31 - 1 - np.arange(600)).reshape(20, 30)
    ids[:, 5] = -1
    keys = np.sort(to_keys(distances, ids), axis=1)
    order = np.lexsort((ids, distances, ids < 0))
    assert np.array_equal(ids_of(keys), np.take_along_axis(ids, order, axis=1))
    found, expected = distances_of(keys, dtype)[:, :-1], np.take_along_axis(distances, order, axis=1)[:, :-1]
    assert found.dtype == dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("pieces", [[4000], [3, 30, 3967], [2000, 2000]])
@pytest.mark.parametrize("values", [6, 10**6])
def test_the_nearest_are_kept_and_merged_ties_by_id(pieces: list[int], values: int) -> None:
    distances = np.random.default_rng(0).integers(0, values, size=(50, 4000)).astype(np.int32)
    distances[10:20, ::8] -= values  # a regular sample takes them for more than they are
    nearest = Nearest(50, 100)
    parts = []
    for size, first in zip(pieces, np.cumsum([0, *pieces]), strict=False):
        part = np.ascontiguousarray(distances[:, first : first + size])
        nearest.add(part, int(first))
        parts.append(np.sort(to_keys(part, np.broadcast_to(np.arange(first, first + size), part.shape)), axis=1))
    expected = np.argsort(distances, axis=1, kind="stable")[:, :100]
    assert np.array_equal(ids_of(nearest.sorted()), expected)
    assert np.array_equal(ids_of(merge(parts, 100)), expected)


def test_a_disk_without_room_is_refused() -> None:
    gallery = EmbeddingSet("nowhere", "test", dim=8, files=("a.parquet",), counts=(2**57,))
    with pytest.raises(ValueError, match=r"cannot keep .* GiB of embeddings in .*; raise --eval.memory-budget"):
        read_shard(gallery, range(gallery.num_vectors), ("float",), resident_bytes=2**30)


def test_the_query_is_left_out_wherever_it_ranks() -> None:
    ids = np.array([[7, 5, 3], [5, 7, 3], [1, 2, 3]])
    assert without(np.array([7, 7, 7]), ids).tolist() == [[5, 3], [5, 3], [1, 2]]
    assert without(np.array([-1, -1, -1]), ids) is ids


class InMemory:
    """The float64 similarities of queries and a gallery in memory, and the number of pairs that were compared."""

    def __init__(self, queries: np.ndarray, gallery: np.ndarray) -> None:
        self.queries, self.gallery, self.num_pairs = queries, gallery, 0

    def of_pairs(self, rows_P: np.ndarray, ids_P: np.ndarray) -> np.ndarray:
        assert (np.diff(rows_P) >= 0).all()
        self.num_pairs += len(rows_P)
        return np.concatenate(
            [inner_products(self.gallery[[id_]], self.queries[row]) for row, id_ in zip(rows_P, ids_P, strict=True)]
        )

    def nearest(self, rows: np.ndarray, k: int) -> np.ndarray:
        self.num_pairs += len(rows) * len(self.gallery)
        found = []
        for row in rows:
            best = (np.empty(0), np.empty(0, dtype=np.int64))
            for ids in np.array_split(np.arange(len(self.gallery)), 3):
                best = nearer(best, self.queries[row], gallery_GD=self.gallery[ids], gallery_ids=ids, k=k)
            found.append(best[1])
        return np.stack(found)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("depth", [40, 300])
def test_ties_are_settled_as_in_float64(spread: float, depth: int) -> None:
    """The similarities are given with errors up to the tolerance; duplicates are tied in float64 too."""
    k, dim, rng = 20, 24, np.random.default_rng(5)
    gallery = rng.normal(size=dim) + spread * rng.normal(size=(300, dim))
    gallery = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32)
    gallery[100:103] = gallery[7]
    gallery[200:290] = gallery[9]  # more than the neighbours that were found
    queries = gallery[np.r_[7, 9, 20:70]]
    exact = np.stack([inner_products(gallery, query) for query in queries])
    expected = np.argsort(-exact, axis=1, kind="stable")
    noisy = (exact + rng.uniform(-0.9, 0.9, exact.shape) * tolerance(dim)).astype(np.float32)
    ids_QK = np.argsort(-noisy, axis=1, kind="stable")[:, :depth]
    similarities_QK = np.take_along_axis(noisy, ids_QK, axis=1)
    in_memory, complete = InMemory(queries, gallery), depth == len(gallery)

    found = settle_ties(similarities_QK, ids_QK.copy(), in_memory, k, dim=dim, complete=complete)
    np.testing.assert_array_equal(found[:, :k], expected[:, :k])
    if spread == 1.0:  # most float32 similarities tell their neighbours apart
        assert in_memory.num_pairs < exact.size / 2

    matches_QK = ids_QK % 5 == 0  # only these must come to their places
    found = settle_ties(similarities_QK, ids_QK.copy(), in_memory, k, dim=dim, complete=complete, matches_QK=matches_QK)
    np.testing.assert_array_equal(found[:, :k] % 5 == 0, expected[:, :k] % 5 == 0)


def test_a_tolerance_that_is_too_small_is_noticed() -> None:
    vectors = np.eye(4, dtype=np.float32)
    queries = np.full((1, 4), 0.5, dtype=np.float32)  # equally near to all vectors
    similarities_QK = np.array([[0.5 + 1e-5, 0.5 + 1e-5, 0.5, 0.5 - 1e-5]], dtype=np.float32)
    found = settle_ties(similarities_QK, np.array([[3, 1, 0, 2]]), InMemory(queries, vectors), 4, dim=4, complete=True)
    assert found.tolist() == [[0, 1, 2, 3]]


def naive(neighbours: np.ndarray, label: int, gallery: np.ndarray, relevant: int) -> tuple[float, float]:
    hits = [gallery[i] == label and i >= 0 for i in neighbours[:relevant]]
    precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits)) if hits[i]]
    return (sum(hits) / relevant, sum(precisions) / relevant) if relevant else (0.0, 0.0)


def test_ranks_against_the_definitions() -> None:
    rng = np.random.default_rng(0)
    gallery = np.sort(rng.integers(0, 6, 40))
    queries = np.array([0, 1, 2, 3, 4, 5, 9])  # 9 is not in the gallery
    neighbours = np.stack([rng.permutation(40)[:20] for _ in queries])
    neighbours[3, 15:] = -1
    relevant = np.array([(gallery == label).sum() for label in queries])
    assert relevant[-1] == 0
    ranks = rank(neighbours, queries, gallery, relevant)
    for row, label in enumerate(queries):
        hits = [i for i, each in enumerate(neighbours[row]) if each >= 0 and gallery[each] == label]
        assert ranks.first_match[row] == (hits[0] if hits else 20)
        expected = naive(neighbours[row], label, gallery, relevant[row])
        np.testing.assert_allclose((ranks.r_precision[row], ranks.average_precision_at_r[row]), expected)
    assert recall_at_k(np.array([0, 3, 1, 20]), 1) == 0.25
    assert recall_at_k(np.array([0, 3, 1, 20]), 4) == 0.75


def test_intervals_hold_the_mean_and_know_that_classes_hang_together() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 20)
    alone = (rng.random(2000) < 0.5).astype(float)
    together = np.repeat(rng.random(100) < 0.5, 20).astype(float)
    (low, high), (lowest, highest) = bootstrap_intervals(np.stack([alone, together], axis=1), labels)
    assert low < alone.mean() < high
    assert lowest < together.mean() < highest
    assert abs((high - low) - 2 * 1.96 * 0.5 / np.sqrt(2000)) < 0.015
    assert abs((highest - lowest) - 2 * 1.96 * 0.5 / np.sqrt(100)) < 0.04
    with pytest.raises(ValueError, match="two test classes or more"):
        bootstrap_intervals(np.ones((3, 1)), np.zeros(3, dtype=int))

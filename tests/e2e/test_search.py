"""Sharded search on a real Ray against the brute-force answer in numpy."""

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest

from nsl_dist.config import EvalConfig, Kind
from nsl_dist.retrieval.clustering import cluster_nmi
from nsl_dist.retrieval.metrics import join
from nsl_dist.retrieval.sharded_search import judge_of, open_gallery, search
from tests.support.vectors import DIM, NUM, brute_force, close, tied, write

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize("num_shards", [1, 3, 5])
def test_any_number_of_shards_and_blocks_gives_the_brute_force_answer(tmp_path: Path, num_shards: int) -> None:
    vectors = np.concatenate([tied(NUM // 2, DIM, rng := np.random.default_rng(0)), close(NUM // 2, DIM, rng)])
    embeddings = write(tmp_path, vectors)
    config = EvalConfig(num_shards=num_shards, memory_budget=1e-4 if num_shards == 3 else 4)  # memory-mapped
    with open_gallery(embeddings, ("float", "binary"), config, k=NUM - 1, num_gpus=0) as gallery:
        assert len(gallery.shards) == num_shards
        cases = ((1, 137), (400, 137), (30, NUM), (NUM - 1, NUM))
        kinds: tuple[Kind, ...] = ("float", "binary")
        for kind, (k, block_size) in itertools.product(kinds, cases):
            expected = brute_force(vectors, vectors, NUM - 1, kind=kind, own=True)
            blocks = [range(start, min(start + block_size, NUM)) for start in range(0, NUM, block_size)]
            found = np.concatenate(list(search(embeddings, gallery, kind, lambda _, ids: ids, k=k, blocks=blocks)))
            np.testing.assert_array_equal(found, expected[:, :k], err_msg=f"{kind}, blocks of {block_size}, k {k}")


def test_where_only_classes_count_metrics_are_those_of_the_brute_force_answer(tmp_path: Path) -> None:
    vectors = close(NUM, DIM, np.random.default_rng(1))
    embeddings = write(tmp_path, vectors)
    judge = judge_of(embeddings, embeddings)
    expected = judge(range(NUM), brute_force(vectors, vectors, 30, kind="float", own=True))
    with open_gallery(embeddings, ("float",), EvalConfig(num_shards=2), k=30, num_gpus=0) as gallery:
        blocks = [range(650), range(650, NUM)]
        ranks = join(list(search(embeddings, gallery, "float", judge, k=30, classes=judge.classes, blocks=blocks)))
    for name in ("first_match", "r_precision", "average_precision_at_r"):
        np.testing.assert_array_equal(getattr(ranks, name), getattr(expected, name))


@pytest.mark.parametrize("kind", ["float", "binary"])
def test_queries_beside_a_gallery_and_more_neighbours_than_it_has(tmp_path: Path, kind: Kind) -> None:
    vectors = tied(200, DIM, np.random.default_rng(2))
    queries = write(tmp_path, vectors[:60], num_files=1, split="query")
    gallery_set = write(tmp_path, vectors[60:], num_files=2, split="gallery")
    expected = brute_force(vectors[:60], vectors[60:], 140, kind=kind, own=False)
    with open_gallery(gallery_set, (kind,), EvalConfig(num_shards=2), k=150, num_gpus=0) as gallery:
        (found,) = search(queries, gallery, kind, lambda _, ids: ids, k=150)
    np.testing.assert_array_equal(found[:, :140], expected)
    assert (found[:, 140:] == -1).all()


def test_sums_that_cancel_are_told_apart(tmp_path: Path) -> None:
    """Their rounding errors are many times larger than the sums themselves."""
    rng = np.random.default_rng(4)
    query = np.ones(512) / np.sqrt(512)
    vectors = np.repeat([1.0, -1.0], 256) / np.sqrt(512) + 1e-3 * rng.normal(size=(2000, 512))
    vectors -= (vectors @ query - rng.uniform(0, 1e-5, size=2000))[:, None] * query
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = (query + 1e-6 * rng.normal(size=(16, 512))).astype(np.float32)
    query_set = write(tmp_path, queries, num_files=1, split="query")
    gallery_set = write(tmp_path, vectors, split="gallery")
    expected = brute_force(queries, vectors, 10, kind="float", own=False)
    with open_gallery(gallery_set, ("float",), EvalConfig(num_shards=1), k=10, num_gpus=0) as gallery:
        for k in (1, 10):
            (found,) = search(query_set, gallery, "float", lambda _, ids: ids, k=k)
            np.testing.assert_array_equal(found, expected[:, :k])


def test_kmeans_over_shards_finds_planted_clusters(tmp_path: Path) -> None:
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(3)
    vectors = np.repeat(rng.normal(size=(NUM // 5, DIM)), 5, axis=0) + 0.05 * rng.normal(size=(NUM, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    embeddings = write(tmp_path, vectors)
    labels = np.arange(NUM) // 5
    found = {}
    for num_shards in (1, 3):
        with open_gallery(embeddings, ("float",), EvalConfig(num_shards=num_shards), k=1, num_gpus=0) as gallery:
            found[num_shards] = cluster_nmi(gallery, "float", labels)
    centroids = faiss.Kmeans(DIM, NUM // 5, seed=1234, min_points_per_centroid=1)
    centroids.train(vectors)
    clusters = centroids.index.search(vectors, 1)[1].ravel()
    dense = normalized_mutual_info_score(labels, clusters, average_method="geometric")
    assert found[1] == found[3]
    assert abs(found[1] - dense) < 0.02  # another start
    assert found[1] > 0.9

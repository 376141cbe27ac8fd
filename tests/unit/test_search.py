from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nsl_dist.retrieval.metrics import first_match, recall_at_k
from nsl_dist.retrieval.search import GalleryShard, merge, read_embeddings

NUM, DIM = 157, 24


@pytest.fixture
def embeddings(tmp_path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Unit vectors around 20 centres, duplicates among them, in shuffled files."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 20, NUM))
    vectors = rng.normal(size=(20, DIM))[labels] + 0.7 * rng.normal(size=(NUM, DIM))
    vectors[50:53] = vectors[10]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    for number, ids in enumerate(np.array_split(rng.permutation(NUM), 4)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[ids].ravel()), DIM)
        pq.write_table(pa.table({"id": ids, "label": labels[ids], "embedding": column}), tmp_path / f"{number}.parquet")
    return str(tmp_path), vectors, labels


def dense_distances(vectors: np.ndarray, kind: str) -> np.ndarray:
    signs = vectors > 0
    return (signs[:, None] != signs[None]).sum(-1) if kind == "binary" else -(vectors @ vectors.T)


@pytest.mark.parametrize("kind", ["float", "binary"])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_sharded_search_equals_the_dense_answer(embeddings, kind: str, num_shards: int) -> None:
    location, vectors, labels = embeddings
    k = 30
    cuts = np.linspace(0, NUM, num_shards + 1).astype(int)
    shards = [GalleryShard(location, (a, b)) for a, b in pairwise(cuts)]
    queries = read_embeddings(location, ids=(0, NUM))
    np.testing.assert_array_equal(queries.labels, labels)
    np.testing.assert_array_equal(queries.vectors, vectors)
    found = merge([shard.search(vectors, k + 1, kind) for shard in shards], query_ids=queries.ids, k=k)

    distances = dense_distances(vectors, kind).astype(float)
    np.fill_diagonal(distances, np.inf)
    assert (found != np.arange(NUM)[:, None]).all()
    assert all(len(set(row)) == k for row in found)
    # Among equal distances any choice is a nearest neighbour.
    nearest = np.sort(distances, axis=1)[:, :k]
    np.testing.assert_allclose(np.take_along_axis(distances, found, axis=1), nearest, atol=1e-5)
    matches = first_match(found, labels, labels)
    # The first match ranks after all closer images, and with or before those as close.
    mates = np.where(labels[:, None] == labels[None], distances, np.inf).min(axis=1)
    closer = (distances < mates[:, None] - 1e-5).sum(axis=1)
    as_close = (distances <= mates[:, None] + 1e-5).sum(axis=1)
    assert ((matches >= np.minimum(closer, k)) & (matches <= np.minimum(as_close, k))).all()


def test_merge_leaves_the_query_out_wherever_it_ranks_and_breaks_ties_by_id() -> None:
    parts = [
        (np.array([[0.0, 1.0]], dtype=np.float32), np.array([[7, 3]])),
        (np.array([[0.0, 0.0, 1.0]], dtype=np.float32), np.array([[9, 5, 1]])),
    ]
    assert merge(parts, query_ids=np.array([7]), k=4).tolist() == [[5, 9, 1, 3]]
    assert merge(parts, query_ids=np.array([1]), k=6).tolist() == [[5, 7, 9, 3, -1, -1]]


def test_recall() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    neighbours = np.array([[2, 1, 3], [0, 2, 3], [0, 1, 4], [2, 0, 1], [0, -1, -1]])
    matches = first_match(neighbours, labels, labels)
    assert matches.tolist() == [1, 0, 3, 0, 3]
    assert [recall_at_k(matches, k) for k in (1, 2, 3)] == [0.4, 0.6, 0.6]

"""Sharded search on a real Ray against the brute-force answer in numpy."""

from pathlib import Path

import numpy as np
import pytest

from nsl_dist.config import EvalConfig
from nsl_dist.retrieval.embeddings import EmbeddingSet, load_index, pack_codes, write_file, write_index
from nsl_dist.retrieval.search import open_gallery, search

pytestmark = pytest.mark.usefixtures("cluster")
NUM, DIM = 700, 24


def write(location: Path, vectors: np.ndarray, *, num_files: int = 3, split: str = "test") -> EmbeddingSet:
    files = [f"{split}-{number:05d}.parquet" for number in range(num_files)]
    parts = np.array_split(np.arange(len(vectors)), num_files)
    for name, ids in zip(files, parts, strict=True):
        write_file(str(location / name), split=split, ids=ids, labels=ids // 5, vectors=vectors[ids])
    counts = tuple(map(len, parts))
    return EmbeddingSet(location=str(location), split=split, dim=vectors.shape[1], files=tuple(files), counts=counts)


def tied(num: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors of few values, so that sums are exact and ties abound, with many duplicates."""
    vectors = np.zeros((num, dim), dtype=np.float32)
    for row in vectors:
        row[rng.choice(dim, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    vectors[num // 3 : num // 2] = vectors[7]
    return vectors


def close(num: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors so close to each other that float32 hardly tells their similarities apart, with duplicates."""
    vectors = rng.normal(size=dim) + 1e-3 * rng.normal(size=(num, dim))
    vectors[num // 3 : num // 2] = vectors[7]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(queries: np.ndarray, gallery: np.ndarray, k: int, *, kind: str, own: bool) -> np.ndarray:
    if kind == "binary":
        distances = (pack_codes(queries)[:, None] ^ pack_codes(gallery)[None]).astype(np.uint8)
        distances = np.unpackbits(distances, axis=2).sum(axis=2).astype(float)
    else:
        # One product after the other in float64: the last bits, too, depend on nothing but the two vectors.
        distances = -np.stack([(gallery.astype(float) * query.astype(float)).sum(axis=1) for query in queries])
        distances = -np.stack([np.einsum("gd,d->g", gallery.astype(float), query.astype(float)) for query in queries])
    if own:
        np.fill_diagonal(distances, np.inf)
    found = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.where(np.isinf(np.take_along_axis(distances, found, axis=1)), -1, found)


def neighbours(ids: range, found: np.ndarray) -> np.ndarray:
    assert len(found) == len(ids)
    return found


@pytest.mark.parametrize("make", [tied, close])
@pytest.mark.parametrize("kind", ["float", "binary"])
def test_any_number_of_shards_and_blocks_gives_the_brute_force_answer(tmp_path: Path, make, kind: str) -> None:
    vectors = make(NUM, DIM, np.random.default_rng(0))
    embeddings = write(tmp_path, vectors)
    for num_shards, block_size, k in ((1, 4096, 30), (2, 100, 30), (3, 700, 1), (5, 37, 400), (4, 4096, NUM - 1)):
        expected = brute_force(vectors, vectors, k, kind=kind, own=True)
        memory = EvalConfig(num_shards=num_shards)
        with open_gallery(embeddings, kind, memory, k=k, num_gpus=0) as gallery:
            assert len(gallery.shards) == num_shards
            starts = range(0, NUM, block_size)
            blocks = [range(start, min(start + block_size, NUM)) for start in starts]
            found = np.concatenate(list(search(embeddings, gallery, neighbours, k=k, blocks=blocks)))
        np.testing.assert_array_equal(found, expected, err_msg=f"{num_shards} shards, blocks of {block_size}, k {k}")

"""Embeddings on disk, and the brute-force answer to searches among them."""

from pathlib import Path

import numpy as np

from nsl_dist.retrieval.vector_files import EmbeddingSet, pack_codes, write_file

NUM, DIM = 700, 24


def paths_of(ids: np.ndarray) -> list[str]:
    return [f"class/{number}.jpg" for number in ids.tolist()]


def write(location: Path, vectors: np.ndarray, *, num_files: int = 3, split: str = "test") -> EmbeddingSet:
    files = [f"{split}-{number:05d}.parquet" for number in range(num_files)]
    parts = np.array_split(np.arange(len(vectors)), num_files)
    for name, ids in zip(files, parts, strict=True):
        write_file(
            str(location / name), split=split, ids=ids, paths=paths_of(ids), labels=ids // 5, vectors=vectors[ids]
        )
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
        # Sum after sum in float64: the last bits, too, depend on nothing but the two vectors.
        distances = -np.stack([np.einsum("gd,d->g", gallery.astype(float), query.astype(float)) for query in queries])
    if own:
        np.fill_diagonal(distances, np.inf)
    found = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.where(np.isinf(np.take_along_axis(distances, found, axis=1)), -1, found)

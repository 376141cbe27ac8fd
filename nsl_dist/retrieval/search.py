"""Sharded nearest-neighbour search with faiss, float and binary, the shards' results merged exactly.

Letters of array names: Q queries of a block, G vectors of a gallery shard, D dimensions, K neighbours.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from nsl_dist import storage

QUERIES_AT_ONCE = 4096


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of some images, in order of id."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    vectors: NDArray[np.float32]


def read_embeddings(location: str, *, ids: tuple[int, int]) -> Embeddings:
    """Read the embeddings with `ids[0] <= id < ids[1]` of a folder written by `embed_split`."""
    filesystem, path = storage.resolve(location)
    table = pq.read_table(path, filesystem=filesystem, filters=[("id", ">=", ids[0]), ("id", "<", ids[1])])
    table = table.sort_by("id")
    vectors = table["embedding"].combine_chunks()
    return Embeddings(
        ids=table["id"].to_numpy(),
        labels=table["label"].to_numpy(),
        vectors=vectors.values.to_numpy().reshape(len(table), vectors.type.list_size),
    )


def pack_codes(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return binary embeddings, the sign of each coordinate (paper, section 3.4), 8 to a byte."""
    return np.packbits(vectors > 0, axis=1)


class GalleryShard:
    """One shard of the gallery: a flat faiss index of its embeddings and one of their codes."""

    def __init__(self, location: str, ids: tuple[int, int]) -> None:
        import faiss

        faiss.omp_set_num_threads(os.cpu_count() or 1)
        gallery = read_embeddings(location, ids=ids)
        codes = pack_codes(gallery.vectors)
        self._ids = gallery.ids
        self._float_index = faiss.IndexFlatIP(gallery.vectors.shape[1])
        self._float_index.add(gallery.vectors)
        self._binary_index = faiss.IndexBinaryFlat(codes.shape[1] * 8)
        self._binary_index.add(codes)

    def search(self, queries: NDArray[np.float32], k: int, kind: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return `(distances, ids)` of the `k` nearest, or of all where there are fewer; smaller is nearer.

        The distance is minus the cosine for `float` and the Hamming distance for `binary`.
        """
        k = min(k, len(self._ids))
        distances: NDArray[Any]
        if kind == "binary":
            distances, places = self._binary_index.search(pack_codes(queries), k)
        else:
            similarities, places = self._float_index.search(queries, k)
            distances = -similarities
        return distances.astype(np.float32), self._ids[places]


def merge(
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64]]], *, query_ids: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """Merge the shards' neighbours of a block of queries.

    The query itself is left out by its id, wherever it ranks; ties go to the smaller id.

    Returns:
        ids `[Q, k]`, nearest first, -1 where there are fewer.

    """
    distances_QK = np.concatenate([distances for distances, _ in parts], axis=1)
    ids_QK = np.concatenate([ids for _, ids in parts], axis=1)
    distances_QK = np.where(ids_QK == query_ids[:, None], np.inf, distances_QK)
    order_QK = np.lexsort((ids_QK, distances_QK))[:, :k]
    merged_QK = np.take_along_axis(ids_QK, order_QK, axis=1)
    merged_QK[np.isinf(np.take_along_axis(distances_QK, order_QK, axis=1))] = -1
    return np.pad(merged_QK, ((0, 0), (0, k - merged_QK.shape[1])), constant_values=-1)


def start_shards(location: str, *, num_images: int, num_shards: int) -> list[Any]:
    """Index a gallery in equal shards, each in an actor of its own, and wait until all are ready.

    Args:
        location: folder written by `embed_split`, ids 0 to `num_images` - 1.
        num_images: size of the gallery.
        num_shards: parts wanted; no more than images are made.

    """
    cuts = np.linspace(0, num_images, min(num_shards, num_images) + 1).astype(int).tolist()
    actor = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(GalleryShard)
    shards = [actor.remote(location, (start, stop)) for start, stop in pairwise(cuts)]
    ray.get([shard.__ray_ready__.remote() for shard in shards])
    return shards


def self_retrieval(
    location: str, shards: list[Any], *, num_images: int, k: int, kind: str
) -> Iterator[tuple[Embeddings, NDArray[np.int64]]]:
    """Search every embedding of a folder among all others, block by block.

    Args:
        location: folder that `shards` index.
        shards: from `start_shards`.
        num_images: size of the gallery.
        k: neighbours wanted.
        kind: "float" or "binary".

    Yields:
        A block of queries and the ids `[Q, k]` of their neighbours (see `merge`).

    """
    for start in range(0, num_images, QUERIES_AT_ONCE):
        queries = read_embeddings(location, ids=(start, start + QUERIES_AT_ONCE))
        block = ray.put(queries.vectors)
        # One more than asked for: the query itself is among them.
        parts = ray.get([shard.search.remote(block, k + 1, kind) for shard in shards])
        yield queries, merge(parts, query_ids=queries.ids, k=k)

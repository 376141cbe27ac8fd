"""One shard of a gallery in an actor, which searches it: exactly, or with an approximate index.

Letters of array names: Q queries of a block, K neighbours, D dimensions, G gallery vectors, P pairs of a query and a
neighbour.
"""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from nsl_dist.config import Kind
from nsl_dist.memory_map import map_file
from nsl_dist.retrieval.faiss_index import build_index
from nsl_dist.retrieval.neighbours import Nearest, to_keys
from nsl_dist.retrieval.ties import inner_products, nearer
from nsl_dist.retrieval.vector_files import EmbeddingSet

MOST_GPU_NEIGHBOURS = 2048  # faiss's limit; for more neighbours a shard searches on its CPUs
GPU_BYTES_AT_ONCE = 2**30  # of a shard, which need not fit the GPU
GALLERY_AT_ONCE = 65536
QUERIES_AT_ONCE = 512  # of a thread: matrix products of fewer rows are slower
BINARY_QUERIES_AT_ONCE = 64
CODE_BYTES_AT_ONCE = 2**20  # of the gallery: they stay in the cache while all queries of a thread pass over them
WIDE_AT_ONCE = 16384  # vectors as float64, or with their distances to all centroids
# Two blocks are searched at once, so that no core idles at the end of a block; settling ties waits for neither.
CONCURRENCY_GROUPS = {"search": 2, "ties": 1}


class GalleryShard:
    """An actor that searches one shard of the gallery.

    Args:
        gallery: all embeddings.
        ids: the range of this shard.
        kinds: which embeddings to search.
        use_gpu: search floats on a GPU, if there is one and faiss was built for it.
        shards_on_a_node: shards that share the cores of this machine.
        memory_bytes: half of it for embeddings, which are memory-mapped if they take more; a quarter for the distances
            that the threads look at.

    """

    def __init__(
        self,
        gallery: EmbeddingSet,
        ids: range,
        kinds: tuple[Kind, ...],
        *,
        use_gpu: bool,
        shards_on_a_node: int,
        memory_bytes: float,
    ) -> None:
        import faiss

        self._faiss: Any = faiss
        self._num_threads = max(1, (os.cpu_count() or 1) // shards_on_a_node)
        piece_bytes = 4 * GALLERY_AT_ONCE
        self._queries_at_once = int(min(QUERIES_AT_ONCE, max(1, memory_bytes / 4 / self._num_threads // piece_bytes)))
        # Each thread works on its own queries, so none waits for another as the threads of one matrix product do. Ray
        # gives an actor that reserves no CPU one thread of BLAS, unless OMP_NUM_THREADS says otherwise.
        self._pool = ThreadPoolExecutor(self._num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._first = ids.start
        self._load = partial(read_shard, gallery, ids, kinds, resident_bytes=memory_bytes / 2)
        self._held: dict[Kind, NDArray[Any]] = {}
        self._gpu = faiss.StandardGpuResources() if use_gpu and faiss.get_num_gpus() else None
        self._gpu_lock = threading.Lock()
        self._index: Any = None

    def load(self) -> int:
        """Read the shard; return how many queries in a block keep all threads busy.

        Raises:
            ValueError: no room for a memory-mapped file.

        """
        self._held = self._load()
        return self._num_threads * self._queries_at_once

    def approximate(self, factory: str, parameters: str | None) -> None:
        """Replace the float vectors by an approximate index of them (see `build_index`).

        Raises:
            ValueError: faiss cannot build it.

        """
        self._faiss.omp_set_num_threads(self._num_threads)  # only affects the calling thread
        self._index = build_index(self._held.pop("float"), factory, parameters)

    @ray.method(concurrency_group="search")
    def search(self, queries: NDArray[Any], k: int, kind: Kind) -> NDArray[np.int64]:
        """Return the nearest neighbours in this shard.

        Args:
            queries: float32 `[Q, D]` or codes uint8 `[Q, D / 8]`.
            k: neighbours wanted; a smaller shard returns all it has.
            kind: "float" or "binary", as the queries are.

        Returns:
            Sorted keys `[Q, K]` (see `neighbours`); if an approximate index finds fewer, the rest are `NO_NEIGHBOUR`.

        """
        if kind == "float" and self._index is not None:
            return self._search_index(queries, k)
        k = min(k, len(self._held[kind]))
        if kind == "float" and self._gpu is not None and k <= MOST_GPU_NEIGHBOURS:
            return self._search_on_gpu(queries, k)
        return self._search_on_cpus(queries, k, kind)

    def _search_index(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        self._faiss.omp_set_num_threads(self._num_threads)
        scores, places = self._index.search(queries, min(k, self._index.ntotal))
        # Some indexes only know L2, which orders unit vectors in the same way.
        return self._keys(-scores if self._faiss.is_similarity_metric(self._index.metric_type) else scores, places)

    def _search_on_gpu(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        with self._gpu_lock:
            similarities, places = self._faiss.knn_gpu(
                self._gpu,
                queries,
                self._held["float"],
                k,
                metric=self._faiss.METRIC_INNER_PRODUCT,
                vectorsMemoryLimit=GPU_BYTES_AT_ONCE,
                queriesMemoryLimit=GPU_BYTES_AT_ONCE,
            )
        return self._keys(-similarities, places)

    def _search_on_cpus(self, queries: NDArray[Any], k: int, kind: Kind) -> NDArray[np.int64]:
        gallery = self._held[kind]
        queries_at_once = min(self._queries_at_once, -(-len(queries) // self._num_threads))
        if kind == "binary":
            queries_at_once = min(queries_at_once, BINARY_QUERIES_AT_ONCE)
        distances = self._hamming_distances if kind == "binary" else _negative_similarities

        def nearest(start: int) -> NDArray[np.int64]:
            some = np.ascontiguousarray(queries[start : start + queries_at_once])
            found = Nearest(len(some), k)
            for first in range(0, len(gallery), GALLERY_AT_ONCE):
                found.add(distances(some, gallery[first : first + GALLERY_AT_ONCE]), self._first + first)
            return found.sorted()

        return np.concatenate(list(self._pool.map(nearest, range(0, len(queries), queries_at_once))))

    def _keys(self, distances: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.sort(to_keys(distances, np.where(places < 0, -1, places + self._first)), axis=1)

    def _hamming_distances(self, queries: NDArray[np.uint8], gallery: NDArray[np.uint8]) -> NDArray[np.int32]:
        pointer = self._faiss.swig_ptr
        distances = np.empty((len(queries), len(gallery)), dtype=np.int32)
        codes_at_once = max(1, CODE_BYTES_AT_ONCE // gallery.shape[1])
        for start in range(0, len(gallery), codes_at_once):
            some = gallery[start : start + codes_at_once]
            found = np.empty((len(queries), len(some)), dtype=np.int32)
            self._faiss.hammings(pointer(queries), pointer(some), *found.shape, some.shape[1], pointer(found))
            distances[:, start : start + len(some)] = found
        return distances

    @ray.method(concurrency_group="ties")
    def similarities(
        self, queries: NDArray[np.float32], rows_P: NDArray[np.int64], ids_P: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the inner products of pairs of a query and a neighbour in float64 (see `ties.inner_products`).

        Args:
            queries: `[Q, D]`.
            rows_P: rows of `queries`, ascending.
            ids_P: neighbours, of this shard.

        """
        found_P = np.empty(len(rows_P))
        rows, firsts = np.unique(rows_P, return_index=True)
        # One query at a time: its vectors stay in the cache, and more threads would only wait for each other.
        for row, (start, stop) in zip(rows.tolist(), itertools.pairwise([*firsts.tolist(), len(rows_P)]), strict=True):
            found_P[start:stop] = inner_products(self._held["float"][ids_P[start:stop] - self._first], queries[row])
        return found_P

    @ray.method(concurrency_group="ties")
    def search_in_float64(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return similarities and ids of the nearest in this shard by `similarities`, ties in order of id.

        It takes many times as long as `search`, and is for the few queries with more ties than `search` can tell apart.
        """
        best = [(np.empty(0), np.empty(0, dtype=np.int64)) for _ in queries]
        wide_queries = queries.astype(np.float64)
        vectors = self._held["float"]
        for start in range(0, len(vectors), WIDE_AT_ONCE):
            gallery_GD = vectors[start : start + WIDE_AT_ONCE].astype(np.float64)
            gallery_ids = self._first + start + np.arange(len(gallery_GD))
            more = partial(nearer, gallery_GD=gallery_GD, gallery_ids=gallery_ids, k=k)
            best = list(self._pool.map(more, best, wide_queries))
        return np.stack([similarities for similarities, _ in best]), np.stack([ids for _, ids in best])

    def rows(self, ids: NDArray[np.int64], kind: Kind) -> NDArray[np.float32]:
        """Return vectors of this shard as floats; codes as -1 and 1."""
        return _as_floats(self._held[kind][ids - self._first])

    def assign(
        self, centroids: NDArray[np.float32], kind: Kind
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.float64]]:
        """Assign each vector to its nearest centroid.

        Returns:
            Indices of the centroids `[G]`, squared distances `[G]`, and the sum of the vectors of each centroid.

        """
        starts = range(0, len(self._held[kind]), WIDE_AT_ONCE)

        def nearest(start: int) -> tuple[NDArray[Any], ...]:
            vectors = _as_floats(self._held[kind][start : start + WIDE_AT_ONCE])
            distances, places = self._faiss.knn(vectors, centroids, 1)
            return vectors, places.ravel(), distances.ravel()

        all_places, all_distances = [], []
        sums = np.zeros(centroids.shape)
        for turn in range(0, len(starts), self._num_threads):  # to hold the vectors of one turn only
            for vectors, places, distances in self._pool.map(nearest, starts[turn : turn + self._num_threads]):
                order = np.argsort(places, kind="stable")
                filled, firsts = np.unique(places[order], return_index=True)
                sums[filled] += np.add.reduceat(vectors[order], firsts, axis=0, dtype=np.float64)
                all_places.append(places)
                all_distances.append(distances)
        return np.concatenate(all_places), np.concatenate(all_distances), sums


def read_shard(
    gallery: EmbeddingSet, ids: range, kinds: tuple[Kind, ...], *, resident_bytes: float
) -> dict[Kind, NDArray[Any]]:
    """Read a shard's vectors and codes into memory, or into memory-mapped files if they exceed `resident_bytes`.

    Raises:
        ValueError: the disk has no room for the files.

    """
    held: dict[Kind, NDArray[Any]] = {}
    for kind in sorted(kinds):  # the small codes first
        column, width, dtype = ("code", gallery.code_bytes, np.uint8) if kind == "binary" else (
            "vector", gallery.dim, np.float32
        )  # fmt: skip
        num_bytes = len(ids) * width * np.dtype(dtype).itemsize
        if num_bytes > resident_bytes:
            memory: Any = map_file(
                num_bytes,
                directory=None,
                what="embeddings",
                remedy="raise --eval.memory-budget, or set TMPDIR to a folder on a disk with room for them",
            )
        else:
            memory = bytearray(num_bytes)
            resident_bytes -= num_bytes
        held[kind] = np.frombuffer(memory, dtype=dtype).reshape(len(ids), width)
        for first, rows in gallery.read(column, ids):
            held[kind][first - ids.start : first - ids.start + len(rows)] = rows
    return held


def _negative_similarities(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> NDArray[np.float32]:
    return -queries @ gallery.T


def _as_floats(vectors: NDArray[Any]) -> NDArray[np.float32]:
    if vectors.dtype == np.uint8:
        return np.unpackbits(vectors, axis=1).astype(np.float32) * 2 - 1
    return vectors

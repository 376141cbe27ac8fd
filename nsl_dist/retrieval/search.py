"""Sharded nearest-neighbour search, float and binary: exact, ties included, in bounded memory.

The gallery is cut into shards, each in an actor; queries travel in blocks; one of the actors, each in turn, asks all
for a block's neighbours, merges and summarises them, so that no process holds more than its shard and a few blocks.

Neighbours are ordered by similarity, ties by ascending id. Distances of codes are whole numbers and leave no doubt.
Float similarities come out of matrix products whose last bits depend on the shape of the blocks: neighbours whose
float32 similarities are too close to be told apart are compared by their inner products in float64, summed in one fixed
order. So the result does not depend on the number of shards, blocks or threads.

Letters of array names: Q queries of a block, K neighbours, D dimensions, P pairs of a query and a neighbour.
"""

import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from nsl_dist import cluster
from nsl_dist.config import EvalConfig
from nsl_dist.progress import Progress
from nsl_dist.retrieval.embeddings import EmbeddingSet
from nsl_dist.retrieval.metrics import Classes
from nsl_dist.retrieval.neighbours import MOST_IDS, Nearest, distances_of, ids_of, merge, to_keys, without

Kind = Literal["float", "binary"]
T = TypeVar("T")

MARGIN = 32  # neighbours retrieved beyond those asked for, to see whether the last of them is tied with others
MOST_GPU_NEIGHBOURS = 2048  # faiss's limit; beyond it a shard searches on its CPUs
BLOCKS_IN_FLIGHT = 3  # two are searched, so that no thread waits for the others, while one is merged
GALLERY_AT_ONCE = 65536
QUERIES_AT_ONCE = 512  # of a thread: matrix products of fewer rows are slower
BINARY_QUERIES_AT_ONCE = 64
CODE_BYTES_AT_ONCE = 2**20  # of the gallery: they stay in the cache while all of these queries pass
WIDE_AT_ONCE = 16384  # vectors as float64, or with their distances to all centroids


class GalleryShard:
    """An actor that searches one shard of the gallery, and leads the search of some blocks in all shards.

    Searching, settling ties and leading have threads of their own, so that none waits for another.

    Args:
        gallery: all of it.
        ids: this shard's.
        kinds: which embeddings to search.
        num_threads: of this machine's cores.
        queries_at_once: of each thread, whose similarities with a piece of the gallery fit the memory.
        resident_bytes: memory for the shard's embeddings; beyond it they lie in a memory-mapped file.

    """

    def __init__(
        self,
        gallery: EmbeddingSet,
        ids: range,
        kinds: tuple[Kind, ...],
        *,
        num_threads: int,
        queries_at_once: int,
        resident_bytes: float,
    ) -> None:
        import faiss

        self._faiss: Any = faiss
        self._num_threads = num_threads
        self._queries_at_once = queries_at_once
        # Threads that each do their own part need not wait for each other as those of one matrix product do. Ray gives
        # an actor that reserves no CPU one thread of BLAS.
        self._pool = ThreadPoolExecutor(num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._first = ids.start
        self._held = {kind: _load(gallery, ids, kind, resident_bytes=resident_bytes) for kind in kinds}
        self._gpu = faiss.StandardGpuResources() if ray.get_gpu_ids() and faiss.get_num_gpus() else None
        self._gpu_lock = threading.Lock()
        self._index: Any = None

    def approximate(self, factory: str, parameters: str | None) -> None:
        """Put an approximate index in the place of the vectors.

        Args:
            factory: faiss's description of the index.
            parameters: of its search, as faiss names them; None: its own.

        Raises:
            ValueError: faiss cannot build it.

        """
        self._index = _build_index(self._held.pop("float"), factory, parameters)

    @ray.method(concurrency_group="blocks")
    def lead(self, shared: Any, ids: range, k: int) -> Any:
        """Search one block of queries in all shards (see `search`)."""
        return _search_block(*shared, ids=ids, k=k)

    @ray.method(concurrency_group="search")
    def search(self, queries: NDArray[Any], k: int, kind: Kind) -> NDArray[np.int64]:
        """Return the nearest of this shard.

        Args:
            queries: float32 `[Q, D]` or codes uint8 `[Q, D / 8]`.
            k: neighbours wanted; where the shard has fewer, all are returned.
            kind: what to search.

        Returns:
            Sorted keys `[Q, K]` (see `neighbours`); an approximate index fills up with none.

        """
        if kind == "float" and self._index is not None:
            self._faiss.omp_set_num_threads(self._num_threads)  # holds for the calling thread alone
            return self._keys(*self._index.search(queries, min(k, self._index.ntotal)))
        gallery = self._held[kind]
        k = min(k, len(gallery))
        if kind == "float" and self._gpu is not None and k <= MOST_GPU_NEIGHBOURS:
            with self._gpu_lock:
                metric = self._faiss.METRIC_INNER_PRODUCT
                return self._keys(*self._faiss.knn_gpu(self._gpu, queries, gallery, k, metric=metric))
        queries_at_once = min(
            BINARY_QUERIES_AT_ONCE if kind == "binary" else self._queries_at_once, -(-len(queries) // self._num_threads)
        )
        distances = self._hamming_distances if kind == "binary" else _negative_similarities

        def nearest(start: int) -> NDArray[np.int64]:
            some = np.ascontiguousarray(queries[start : start + queries_at_once])
            found = Nearest(len(some), k)
            for first in range(0, len(gallery), GALLERY_AT_ONCE):
                piece = np.ascontiguousarray(gallery[first : first + GALLERY_AT_ONCE])
                found.add(distances(some, piece), self._first + first)
            return found.sorted()

        return np.concatenate(list(self._pool.map(nearest, range(0, len(queries), queries_at_once))))

    def _keys(self, similarities: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.int64]:
        ids = np.where(places < 0, -1, places + self._first)
        return np.sort(to_keys(-similarities, ids), axis=1)

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
        """Return the inner products of pairs of a query and a neighbour in float64, each summed in the same order.

        Args:
            queries: `[Q, D]`.
            rows_P: which query, ascending.
            ids_P: which neighbour, of this shard.

        """
        found_P = np.empty(len(rows_P))
        rows, firsts = np.unique(rows_P, return_index=True)
        # Query by query: what belongs to one stays in the cache, and threads would wait for each other.
        for row, (start, stop) in zip(rows.tolist(), itertools.pairwise([*firsts.tolist(), len(rows_P)]), strict=True):
            neighbours = self._held["float"][ids_P[start:stop] - self._first].astype(np.float64)
            np.einsum("gd,d->g", neighbours, queries[row].astype(np.float64), out=found_P[start:stop])
        return found_P

    @ray.method(concurrency_group="ties")
    def search_in_float64(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the nearest as `search` does, by the similarities of `similarities`, ties in order of id.

        For the few queries with more ties than `search` can tell apart: it takes many times as long.
        """
        best = [(np.empty(0), np.empty(0, dtype=np.int64)) for _ in queries]
        wide_queries = queries.astype(np.float64)
        vectors = self._held["float"]
        for start in range(0, len(vectors), WIDE_AT_ONCE):
            gallery = vectors[start : start + WIDE_AT_ONCE].astype(np.float64)
            ids = self._first + start + np.arange(len(gallery))
            nearer = partial(_nearer, gallery=gallery, gallery_ids=ids, k=k)
            best = list(self._pool.map(nearer, best, wide_queries))
        return np.stack([scores for scores, _ in best]), np.stack([ids for _, ids in best])

    def rows(self, ids: NDArray[np.int64], kind: Kind) -> NDArray[np.float32]:
        """Return vectors of this shard as floats; codes as -1 and 1."""
        return _as_floats(self._held[kind][ids - self._first])

    def assign(
        self, centroids: NDArray[np.float32], kind: Kind
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.float64]]:
        """Assign each vector to its nearest centroid.

        Returns:
            Places of the centroids `[n]`, squared distances `[n]`, and the sum of the vectors of each centroid.

        """
        starts = range(0, len(self._held[kind]), WIDE_AT_ONCE)

        def nearest(start: int) -> tuple[NDArray[Any], ...]:
            vectors = _as_floats(self._held[kind][start : start + WIDE_AT_ONCE])
            distances, places = self._faiss.knn(vectors, centroids, 1)
            return vectors, places.ravel(), distances.ravel()

        all_places, all_distances = [], []
        sums = np.zeros(centroids.shape)
        for vectors, places, distances in self._pool.map(nearest, starts):
            order = np.argsort(places, kind="stable")
            filled, firsts = np.unique(places[order], return_index=True)
            sums[filled] += np.add.reduceat(vectors[order], firsts, axis=0, dtype=np.float64)
            all_places.append(places)
            all_distances.append(distances)
        return np.concatenate(all_places), np.concatenate(all_distances), sums


def _negative_similarities(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> NDArray[np.float32]:
    return -queries @ gallery.T


def _nearer(
    best: tuple[NDArray[np.float64], NDArray[np.int64]],
    query: NDArray[np.float64],
    *,
    gallery: NDArray[np.float64],
    gallery_ids: NDArray[np.int64],
    k: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the `k` nearest of those found before and of some more, whose ids are all higher."""
    scores = np.concatenate([best[0], np.einsum("gd,d->g", gallery, query)])
    ids = np.concatenate([best[1], gallery_ids])
    if len(scores) > k:
        kept = scores >= -np.partition(-scores, k - 1)[k - 1]
        scores, ids = scores[kept], ids[kept]
    order = np.argsort(-scores, kind="stable")[:k]  # the ids of equal scores ascend already
    return scores[order], ids[order]


def _load(gallery: EmbeddingSet, ids: range, kind: Kind, *, resident_bytes: float) -> NDArray[Any]:
    """Read a shard's vectors or codes, into memory or, where that is too small, into a memory-mapped file."""
    column = "vector" if kind == "float" else "code"
    width, dtype = (gallery.dim, np.float32) if kind == "float" else (gallery.code_bytes, np.uint8)
    shape = (len(ids), width)
    loaded: NDArray[Any]
    if len(ids) * width * np.dtype(dtype).itemsize <= resident_bytes:
        loaded = np.empty(shape, dtype=dtype)
    else:
        with tempfile.NamedTemporaryFile(prefix="nsl_dist_gallery_") as file:  # its space is freed with the mapping
            loaded = np.memmap(Path(file.name), dtype=dtype, mode="w+", shape=shape)
    for first, rows in gallery.read(column, ids):
        loaded[first - ids.start : first - ids.start + len(rows)] = rows
    return loaded


def _as_floats(vectors: NDArray[Any]) -> NDArray[np.float32]:
    if vectors.dtype == np.uint8:
        return np.unpackbits(vectors, axis=1).astype(np.float32) * 2 - 1
    return np.ascontiguousarray(vectors)


def _build_index(vectors: NDArray[np.float32], factory: str, parameters: str | None) -> Any:
    import faiss

    index: Any
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(np.ascontiguousarray(vectors))
        for start in range(0, len(vectors), GALLERY_AT_ONCE):
            index.add(np.ascontiguousarray(vectors[start : start + GALLERY_AT_ONCE]))
        if parameters is not None:
            space: Any = faiss.ParameterSpace()
            space.set_index_parameters(index, parameters)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"faiss cannot build --eval.index {factory} ({parameters or 'its own search parameters'}) over a shard of "
            f"{len(vectors):,} vectors of {vectors.shape[1]} dimensions: {reason}; choose another, or fewer "
            "--eval.num-shards"
        ) from error
    return index


@dataclass(frozen=True)
class Gallery:
    """A gallery in shards, each in an actor; from `open_gallery`.

    Attributes:
        embeddings: what is searched.
        shards: the actors.
        cuts: first id of each shard, and the number of vectors.
        exact: False with an approximate index.
        block_size: queries of a block, so that their neighbours fit the memory.

    """

    embeddings: EmbeddingSet
    shards: list[Any]
    cuts: list[int]
    exact: bool
    block_size: int

    def blocks(self, num_queries: int) -> list[range]:
        """Cut the first `num_queries` queries into blocks."""
        starts = range(0, num_queries, self.block_size)
        return [range(start, min(start + self.block_size, num_queries)) for start in starts]

    def gather(self, ids: NDArray[np.int64], ask: Callable[[Any, NDArray[np.int64]], Any], out: NDArray[Any]) -> None:
        """Fill `out` with what the owners of `ids` answer.

        Args:
            ids: of the gallery.
            ask: given a shard and the places in `ids` of its own, calls it.
            out: one row for each id.

        """
        owners = np.searchsorted(self.cuts, ids, side="right") - 1
        parts = [np.flatnonzero(owners == place) for place in range(len(self.shards))]
        asked = [ask(shard, part) for shard, part in zip(self.shards, parts, strict=True)]
        for part, rows in zip(parts, ray.get(asked), strict=True):
            out[part] = rows


@contextmanager
def open_gallery(
    embeddings: EmbeddingSet, kinds: tuple[Kind, ...], config: EvalConfig, *, k: int, num_gpus: int, exact: bool = True
) -> Iterator[Gallery]:
    """Start the actors of a gallery, wait until all have read their shards, and stop them at the end.

    Args:
        embeddings: the gallery.
        kinds: "float", "binary" or both.
        config: number of shards, memory, approximate index.
        k: neighbours that will be asked for.
        num_gpus: GPUs that the search may take, one for each shard; codes are always searched on CPUs.
        exact: False searches floats with the approximate index of `config`.

    Raises:
        ValueError: the approximate index cannot be built, or the gallery is too large.

    """
    if embeddings.num_vectors > MOST_IDS:
        raise ValueError(f"{embeddings.num_vectors:,} vectors in one gallery: {MOST_IDS:,} is the most")
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    gpus = num_gpus if "float" in kinds and exact else 0
    num_shards = min(config.num_shards or gpus or num_nodes, embeddings.num_vectors)
    gpus = min(gpus, num_shards)
    cuts = np.linspace(0, embeddings.num_vectors, num_shards + 1).astype(int).tolist()
    shards_on_a_node = -(-num_shards // num_nodes)
    num_threads = max(1, (os.cpu_count() or 1) // shards_on_a_node)
    # Half of the memory for embeddings, a quarter for the distances that the threads look at, a quarter for the
    # neighbours of the blocks in flight: keys from each shard, again in the object store, merged, and as ids,
    # similarities, masks and copies while ties are settled.
    memory = config.memory_budget * 2**30
    thread_bytes = memory / 4 / shards_on_a_node / num_threads
    queries_at_once = int(min(QUERIES_AT_ONCE, max(1, thread_bytes // (4 * GALLERY_AT_ONCE))))
    row_bytes = (k + MARGIN) * (16 * num_shards + 48) + embeddings.dim * 8
    block_size = int(min(queries_at_once * num_threads, max(1, memory / 4 / BLOCKS_IN_FLIGHT // row_bytes)))
    threads = {"blocks": BLOCKS_IN_FLIGHT, "search": BLOCKS_IN_FLIGHT - 1, "ties": 1}
    actor = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", concurrency_groups=threads)(GalleryShard)
    shards = [
        actor.options(num_gpus=1 if place < gpus else 0).remote(
            embeddings,
            range(start, stop),
            kinds,
            num_threads=num_threads,
            queries_at_once=queries_at_once,
            resident_bytes=memory / 2 / shards_on_a_node,
        )
        for place, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]
    try:
        if exact:
            ray.get([shard.__ray_ready__.remote() for shard in shards])
        else:
            cluster.get([shard.approximate.remote(config.index, config.index_parameters) for shard in shards])
        yield Gallery(embeddings, shards, cuts, exact, block_size)
    finally:
        for shard in shards:
            ray.kill(shard)


def search(
    queries: EmbeddingSet,
    gallery: Gallery,
    kind: Kind,
    summarise: Callable[[range, NDArray[np.int64]], T],
    *,
    k: int,
    classes: Classes | None = None,
    blocks: list[range] | None = None,
) -> Iterator[T]:
    """Search queries block by block, with progress; where they are the gallery itself, each leaves itself out.

    Args:
        queries: what to search for.
        gallery: from `open_gallery`.
        kind: what to search.
        summarise: called in an actor with the ids of a block's queries and those of their neighbours, `[Q, k]`, nearest
            first, -1 where there are fewer; its results are what comes back.
        k: neighbours wanted.
        classes: with them, neighbours of other classes than the query's are taken for interchangeable: where float32
            cannot tell them apart, their order is left as it was found, which spares most of the work of settling it.
        blocks: which of the queries, `gallery.block_size` at most together; None: all.

    Yields:
        Summaries, in the order of the queries.

    """
    if blocks is None:
        blocks = gallery.blocks(queries.num_vectors)
    name = f"search {kind}" if gallery.exact or kind == "binary" else "search approximately"
    progress = Progress(name, "queries", sum(map(len, blocks)))
    shared = ray.put((queries, gallery, kind, summarise, classes))
    waiting = []
    for block, leader in zip(blocks, itertools.cycle(gallery.shards), strict=False):
        waiting.append((block, leader.lead.remote(shared, block, k)))
        if len(waiting) == BLOCKS_IN_FLIGHT:
            done, summary = waiting.pop(0)
            yield ray.get(summary)
            progress.advance(len(done))
    for done, summary in waiting:
        yield ray.get(summary)
        progress.advance(len(done))


def _search_block(
    queries: EmbeddingSet,
    gallery: Gallery,
    kind: Kind,
    summarise: Callable[[range, NDArray[np.int64]], T],
    classes: Classes | None,
    *,
    ids: range,
    k: int,
) -> T:
    vectors = queries.read_all("vector" if kind == "float" else "code", ids)
    own_ids = np.array(ids) if queries == gallery.embeddings else np.full(len(ids), -1)
    block = ray.put(vectors)
    settles = kind == "float" and gallery.exact
    # One more than asked for: the query itself may be among them.
    depth = min(k + 1 + (MARGIN if settles else 0), gallery.embeddings.num_vectors)
    parts = ray.get([shard.search.remote(block, depth, kind) for shard in gallery.shards])
    keys = without(own_ids, merge(parts, depth))
    neighbours = ids_of(keys)
    if settles:
        matches = None
        if classes is not None:
            matches = classes.gallery[neighbours] == classes.queries[ids.start : ids.stop, None]
        neighbours = settle_ties(
            -distances_of(keys, np.float32),
            neighbours,
            _Exact(gallery, block, vectors, own_ids),
            k,
            complete=depth == gallery.embeddings.num_vectors,
            matches_QK=matches,
        )
    neighbours = neighbours[:, :k]
    if neighbours.shape[1] < k:
        neighbours = np.pad(neighbours, ((0, 0), (0, k - neighbours.shape[1])), constant_values=-1)
    return summarise(ids, neighbours)


@dataclass
class _Exact:
    """The float64 similarities of a block's queries, asked of the shards."""

    gallery: Gallery
    block: Any
    queries: NDArray[np.float32]
    own_ids: NDArray[np.int64]

    def similarities(self, rows_P: NDArray[np.int64], ids_P: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return those of pairs (see `GalleryShard.similarities`)."""
        found_P = np.empty(len(ids_P))
        self.gallery.gather(
            ids_P, lambda shard, part: shard.similarities.remote(self.block, rows_P[part], ids_P[part]), found_P
        )
        return found_P

    def nearest(self, rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Return the ids of the `k` nearest of some queries, the queries themselves left out."""
        depth = min(k + 1, self.gallery.embeddings.num_vectors)
        found = []
        queries_at_once = max(16, self.gallery.block_size // 8)  # more of everything for each of them
        for start in range(0, len(rows), queries_at_once):
            some = rows[start : start + queries_at_once]
            queries = ray.put(self.queries[some])
            parts = ray.get([shard.search_in_float64.remote(queries, depth) for shard in self.gallery.shards])
            scores = np.concatenate([scores for scores, _ in parts], axis=1)
            ids = np.concatenate([ids for _, ids in parts], axis=1)
            order = np.lexsort((ids, -scores))[:, :depth]
            ids = np.take_along_axis(ids, order, axis=1)
            found.append(without(self.own_ids[some], ids))
        return np.concatenate(found)


def tolerance(similarities: NDArray[np.float32], dim: int, factor: float = 1.0) -> NDArray[np.float32]:
    """Return a bound of the error of float32 inner products of unit vectors, as matrix products compute them.

    A sum of `dim` terms errs by about sqrt(dim) roundings of its partial sums (Higham & Mary 2019), which grow towards
    the similarity. The bound is 1.5 times what was seen at most over 10^7 pairs each of 16, 128, 512 and 2,048
    dimensions; `settle_ties` checks it on every pair that it looks at.
    """
    rounding = factor * 2.0**-24
    bound = np.abs(similarities)
    bound *= np.float32(rounding * np.sqrt(dim))
    bound += np.float32(2 * rounding)
    return bound


def settle_ties(
    similarities_QK: NDArray[np.float32],
    ids_QK: NDArray[np.int64],
    exact: _Exact,
    k: int,
    *,
    complete: bool,
    matches_QK: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Order neighbours by their float64 similarities, ties by id, looking only at those that float32 cannot tell apart.

    Args:
        similarities_QK: of the neighbours, falling.
        ids_QK: of the neighbours.
        exact: where to ask for the float64 similarities.
        k: neighbours wanted, the first of K.
        complete: whether the neighbours are all that the gallery has, so that none beyond them can be tied.
        matches_QK: which neighbours must come to their exact places; the others are taken for interchangeable. None:
            all must.

    Returns:
        The ids, `[Q, K]`, in place, of which the first `k` are the nearest.

    """
    dim = exact.queries.shape[1]
    if not complete:
        # The first one left out may be as near as the last one wanted.
        last_Q = similarities_QK[:, k - 1]
        open_Q = similarities_QK[:, -1] >= last_Q - 2 * tolerance(last_Q, dim)
    else:
        open_Q = np.zeros(len(ids_QK), dtype=bool)
    rows = np.arange(len(ids_QK)) if matches_QK is None else _rows_with_close_matches(similarities_QK, matches_QK, dim)
    rows = rows[~open_Q[rows]]
    ids_QK[rows] = _settle_rows(similarities_QK[rows], ids_QK[rows], rows, exact, k)
    rows = np.flatnonzero(open_Q)
    if len(rows):
        ids_QK[rows, :k] = exact.nearest(rows, k)[:, :k]
    return ids_QK


def _rows_with_close_matches(
    similarities_QK: NDArray[np.float32], matches_QK: NDArray[np.bool_], dim: int
) -> NDArray[np.int64]:
    rows_P, columns_P = np.nonzero(matches_QK)
    similarities_P = similarities_QK[rows_P, columns_P]
    before_P = similarities_QK[rows_P, np.maximum(columns_P - 1, 0)]
    after_P = similarities_QK[rows_P, np.minimum(columns_P + 1, similarities_QK.shape[1] - 1)]
    close_P = (columns_P > 0) & (before_P - similarities_P <= 2 * tolerance(before_P, dim))
    close_P |= (columns_P + 1 < similarities_QK.shape[1]) & (
        similarities_P - after_P <= 2 * tolerance(similarities_P, dim)
    )
    return np.unique(rows_P[close_P])


def _settle_rows(
    similarities_QK: NDArray[np.float32],
    ids_QK: NDArray[np.int64],
    rows_Q: NDArray[np.int64],
    exact: _Exact,
    k: int,
) -> NDArray[np.int64]:
    """Settle the ties of the queries `rows_Q` of a block, none of whose ties reach beyond the neighbours."""
    factor = 1.0
    while True:
        error_QK = tolerance(similarities_QK, exact.queries.shape[1], factor)
        # Whether a neighbour can change places with the next one.
        close_QK = similarities_QK[:, :-1] - similarities_QK[:, 1:] <= 2 * error_QK[:, :-1]
        involved_QK = np.zeros(ids_QK.shape, dtype=bool)
        involved_QK[:, :-1] |= close_QK
        involved_QK[:, 1:] |= close_QK
        # Beyond the last one wanted only those matter that hang together with it.
        np.logical_and.accumulate(close_QK[:, k - 1 :], axis=1, out=close_QK[:, k - 1 :])
        involved_QK[:, k:] &= close_QK[:, k - 1 :]
        rows_P, columns_P = np.nonzero(involved_QK)
        ids_P, similarities_P = ids_QK[rows_P, columns_P], similarities_QK[rows_P, columns_P]
        exact_P = exact.similarities(rows_Q[rows_P], ids_P)
        if not (np.abs(exact_P - similarities_P) > error_QK[rows_P, columns_P]).any():
            break
        factor *= 2
    starts_P = np.ones(len(rows_P), dtype=bool)
    starts_P[1:] = (rows_P[1:] != rows_P[:-1]) | ~close_QK[rows_P[1:], columns_P[1:] - 1]
    ids_QK[rows_P, columns_P] = ids_P[np.lexsort((ids_P, -exact_P, np.cumsum(starts_P)))]
    return ids_QK

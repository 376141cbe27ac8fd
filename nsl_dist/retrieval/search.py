"""Sharded nearest-neighbour search with faiss, float and binary: exact, ties included, in bounded memory.

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

Kind = Literal["float", "binary"]
T = TypeVar("T")

MARGIN = 32  # neighbours retrieved beyond those asked for, to see whether the last of them is tied with others
MOST_QUERIES = 1024  # of a block: its neighbours stay in the cache until they are summarised
MOST_GPU_NEIGHBOURS = 2048  # faiss's limit; beyond it a shard searches on its CPUs
BLOCKS_IN_FLIGHT = 2  # one is searched while ties of another are settled
GALLERY_AT_ONCE = 16384
CODES_AT_ONCE = 64  # queries
PLACE_BITS = 16  # of a code's place among those compared at once; the distance takes the other 15 of a positive int32
ID_BITS = 40  # of an id; the distance takes the rest of an int64


class GalleryShard:
    """An actor that searches one shard of the gallery, and leads the search of some blocks in all shards.

    Searching, settling ties and leading have threads of their own, so that none waits for another.

    Args:
        gallery: all of it.
        ids: this shard's.
        kinds: which embeddings to search.
        num_threads: of this machine's cores.
        resident_bytes: memory for the shard's embeddings; beyond it they lie in a memory-mapped file.

    """

    def __init__(
        self, gallery: EmbeddingSet, ids: range, kinds: tuple[Kind, ...], *, num_threads: int, resident_bytes: float
    ) -> None:
        import faiss

        self._faiss = faiss
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads)
        self._first = ids.start
        self._held = {kind: _load(gallery, ids, kind, resident_bytes=resident_bytes) for kind in kinds}
        self._gpu = faiss.StandardGpuResources() if ray.get_gpu_ids() and faiss.get_num_gpus() else None
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

    def search(self, queries: NDArray[Any], k: int, kind: Kind) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the nearest of this shard, nearest first.

        Args:
            queries: float32 `[Q, D]` or codes uint8 `[Q, D / 8]`.
            k: neighbours wanted; where the shard has fewer, all are returned.
            kind: what to search.

        Returns:
            Scores `[Q, K]`, float32 inner products or int64 Hamming distances, and ids `[Q, K]`; an approximate index
            fills up with -1. Ties of codes are in order of id, those of floats in any.

        """
        faiss = self._faiss
        faiss.omp_set_num_threads(self._num_threads)  # holds for the calling thread alone
        if kind == "binary":
            return self._search_codes(queries, k)
        if self._index is not None:
            scores, places = self._index.search(queries, min(k, self._index.ntotal))
        else:
            vectors = self._held["float"]
            k = min(k, len(vectors))
            if self._gpu is not None and k <= MOST_GPU_NEIGHBOURS:
                metric = faiss.METRIC_INNER_PRODUCT
                scores, places = faiss.knn_gpu(self._gpu, queries, vectors, k, metric=metric)
            else:
                scores, places = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        if self._first:
            np.add(places, self._first, out=places, where=places >= 0)
        return scores, places

    def _search_codes(self, queries: NDArray[np.uint8], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return Hamming distances and ids, in order.

        faiss counts the bits; numpy selects the nearest by one number that holds distance and id, in half the time
        that an IndexBinaryFlat takes with its heaps.
        """
        gallery = self._held["binary"]

        def nearest(start: int) -> NDArray[np.int64]:
            some = np.ascontiguousarray(queries[start : start + CODES_AT_ONCE])
            best_QK = np.empty((len(some), 0), dtype=np.int64)
            for first in range(0, len(gallery), 1 << PLACE_BITS):
                codes = np.ascontiguousarray(gallery[first : first + (1 << PLACE_BITS)])
                keys_QG = np.empty((len(some), len(codes)), dtype=np.int32)
                self._faiss.hammings(*map(self._faiss.swig_ptr, (some, codes)), *keys_QG.shape, some.shape[1],
                                     self._faiss.swig_ptr(keys_QG))  # fmt: skip
                keys_QG <<= PLACE_BITS
                keys_QG |= np.arange(len(codes), dtype=np.int32)
                found_QK = _smallest(keys_QG, k).astype(np.int64)
                places_QK = found_QK & ((1 << PLACE_BITS) - 1)
                found_QK = (found_QK >> PLACE_BITS << ID_BITS) | (places_QK + first + self._first)
                best_QK = _smallest(np.concatenate([best_QK, found_QK], axis=1), k)
            return np.sort(best_QK, axis=1)

        keys_QK = np.concatenate(list(self._pool.map(nearest, range(0, len(queries), CODES_AT_ONCE))))
        return keys_QK >> ID_BITS, keys_QK & ((1 << ID_BITS) - 1)

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
        for start in range(0, len(vectors), GALLERY_AT_ONCE):
            gallery = vectors[start : start + GALLERY_AT_ONCE].astype(np.float64)
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
        self._faiss.omp_set_num_threads(self._num_threads)
        places, distances = [], []
        sums = np.zeros(centroids.shape)
        for start in range(0, len(self._held[kind]), GALLERY_AT_ONCE):
            vectors = _as_floats(self._held[kind][start : start + GALLERY_AT_ONCE])
            distance, place = (each.ravel() for each in self._faiss.knn(vectors, centroids, 1))
            order = np.argsort(place, kind="stable")
            filled, firsts = np.unique(place[order], return_index=True)
            sums[filled] += np.add.reduceat(vectors[order], firsts, axis=0, dtype=np.float64)
            places.append(place)
            distances.append(distance)
        return np.concatenate(places), np.concatenate(distances), sums


def _smallest(keys_QK: NDArray[Any], k: int) -> NDArray[Any]:
    """Return the `k` smallest of each row, in any order."""
    if keys_QK.shape[1] > k:
        keys_QK.partition(k - 1, axis=1)
    return keys_QK[:, :k]


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
        ValueError: the approximate index cannot be built.

    """
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    gpus = num_gpus if "float" in kinds and exact else 0
    num_shards = min(config.num_shards or gpus or num_nodes, embeddings.num_vectors)
    gpus = min(gpus, num_shards)
    cuts = np.linspace(0, embeddings.num_vectors, num_shards + 1).astype(int).tolist()
    shards_on_a_node = -(-num_shards // num_nodes)
    # Half of the memory for embeddings, half for the neighbours of the blocks in flight: from each shard a score and an
    # id, again in the object store, merged, and as masks and copies while ties are settled.
    memory = config.memory_budget * 2**30
    row_bytes = (k + MARGIN) * 12 * (2 * num_shards + 4) + embeddings.dim * 8
    block_size = int(min(MOST_QUERIES, max(1, memory / 2 / BLOCKS_IN_FLIGHT // row_bytes)))
    threads = {"blocks": BLOCKS_IN_FLIGHT, "ties": 1}
    actor = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", concurrency_groups=threads)(GalleryShard)
    shards = [
        actor.options(num_gpus=1 if place < gpus else 0).remote(
            embeddings,
            range(start, stop),
            kinds,
            num_threads=max(1, (os.cpu_count() or 1) // shards_on_a_node),
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
    merge = merge_codes if kind == "binary" else merge_floats
    scores, neighbours = without(own_ids, *merge(parts, depth))
    if settles:
        matches = None
        if classes is not None:
            matches = classes.gallery[neighbours] == classes.queries[ids.start : ids.stop, None]
        neighbours = settle_ties(
            scores,
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


def merge_floats(
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Merge the shards' neighbours, each sorted by falling similarity, into the first `k` of all."""
    import faiss

    if len(parts) == 1:
        return parts[0]

    def padded(rows: NDArray[Any], value: float) -> NDArray[Any]:
        return np.pad(rows, ((0, 0), (0, k - rows.shape[1])), constant_values=value)

    merged: tuple[NDArray[np.float32], NDArray[np.int64]] = faiss.merge_knn_results(
        np.stack([padded(similarities, -np.inf) for similarities, _ in parts]),
        np.stack([padded(ids, -1) for _, ids in parts]),
        keep_max=True,
    )
    return merged


def merge_codes(
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Merge the shards' neighbours into the first `k` of all, by rising distance, ties by id."""
    if len(parts) == 1:
        return parts[0]
    keys_QK = np.concatenate([(distances << ID_BITS) | ids for distances, ids in parts], axis=1)
    keys_QK = np.sort(_smallest(keys_QK, k), axis=1)
    return keys_QK >> ID_BITS, keys_QK & ((1 << ID_BITS) - 1)


def without(
    own_ids_Q: NDArray[np.int64], scores_QK: NDArray[Any], ids_QK: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Leave each query out of its neighbours wherever it ranks, the last neighbour where it is not among them."""
    if (own_ids_Q < 0).all():
        return scores_QK, ids_QK
    own_QK = ids_QK == own_ids_Q[:, None]
    passed_QK = np.logical_or.accumulate(own_QK, axis=1)[:, :-1]
    return (
        np.where(passed_QK, scores_QK[:, 1:], scores_QK[:, :-1]),
        np.where(passed_QK, ids_QK[:, 1:], ids_QK[:, :-1]),
    )


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
            found.append(without(self.own_ids[some], ids, ids)[1])
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
        The ids, `[Q, K]`, of which the first `k` are the nearest; in place where they can be written.

    """
    dim = exact.queries.shape[1]
    ids_QK = np.require(ids_QK, requirements="W")  # a copy of what lies in the object store
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

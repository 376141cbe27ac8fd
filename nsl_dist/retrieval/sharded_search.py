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
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorUnschedulableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nsl_dist import cluster
from nsl_dist.config import EvalConfig
from nsl_dist.memory_map import map_file
from nsl_dist.progress import Progress
from nsl_dist.retrieval.metrics import Classes, Judge
from nsl_dist.retrieval.neighbours import MOST_IDS, Nearest, distances_of, ids_of, merge, to_keys, without
from nsl_dist.retrieval.vector_files import EmbeddingSet

Kind = Literal["float", "binary"]
T = TypeVar("T")

MARGIN = 32  # neighbours retrieved beyond those asked for, to see whether the last of them is tied with others
MOST_GPU_NEIGHBOURS = 2048  # faiss's limit; beyond it a shard searches on its CPUs
GPU_BYTES_AT_ONCE = 2**30  # of a shard, which need not fit the GPU
BLOCKS_IN_FLIGHT = 3  # two are searched, so that no thread waits for the others, while one is merged
GALLERY_AT_ONCE = 65536
QUERIES_AT_ONCE = 512  # of a thread: matrix products of fewer rows are slower
BINARY_QUERIES_AT_ONCE = 64
CODE_BYTES_AT_ONCE = 2**20  # of the gallery: they stay in the cache while all of these queries pass
WIDE_AT_ONCE = 16384  # vectors as float64, or with their distances to all centroids
SAMPLED_BLOCKS, SAMPLED_AT_ONCE = 16, 64  # of queries, where some stand for all


class GalleryShard:
    """An actor that searches one shard of the gallery, and leads the search of some blocks in all shards.

    Searching, settling ties and leading have threads of their own, so that no actor waits for itself.

    Args:
        gallery: all of it.
        ids: this shard's.
        kinds: which embeddings to search.
        use_gpu: search floats on a GPU, where there is one and faiss was built for it.
        shards_on_a_node: among which this machine's cores are divided.
        memory_bytes: half of it for embeddings, which beyond it lie in a memory-mapped file; a quarter for the
            distances that the threads look at.

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
        # Threads that each do their own part need not wait for each other as those of one matrix product do. Ray gives
        # an actor that reserves no CPU one thread of BLAS, unless OMP_NUM_THREADS says otherwise.
        self._pool = ThreadPoolExecutor(self._num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._first = ids.start
        self._load = partial(_load, gallery, ids, kinds, resident_bytes=memory_bytes / 2)
        self._held: dict[Kind, NDArray[Any]] = {}
        self._gpu = faiss.StandardGpuResources() if use_gpu and faiss.get_num_gpus() else None
        self._gpu_lock = threading.Lock()
        self._index: Any = None

    def load(self) -> int:
        """Read the shard; return how many queries at a time keep all threads at work.

        Raises:
            ValueError: no room for a memory-mapped file.

        """
        self._held = self._load()
        return self._num_threads * self._queries_at_once

    def approximate(self, factory: str, parameters: str | None) -> None:
        """Put an approximate index in the place of the vectors.

        Args:
            factory: faiss's description of the index.
            parameters: of its search, as faiss names them; None: its own.

        Raises:
            ValueError: faiss cannot build it.

        """
        self._faiss.omp_set_num_threads(self._num_threads)  # holds for the calling thread alone
        self._index = build_index(self._held.pop("float"), factory, parameters)

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
            self._faiss.omp_set_num_threads(self._num_threads)
            scores, places = self._index.search(queries, min(k, self._index.ntotal))
            # Some indexes know L2 alone; unit vectors have the same order in it.
            return self._keys(-scores if self._faiss.is_similarity_metric(self._index.metric_type) else scores, places)
        gallery = self._held[kind]
        k = min(k, len(gallery))
        if kind == "float" and self._gpu is not None and k <= MOST_GPU_NEIGHBOURS:
            with self._gpu_lock:
                similarities, places = self._faiss.knn_gpu(
                    self._gpu,
                    queries,
                    gallery,
                    k,
                    metric=self._faiss.METRIC_INNER_PRODUCT,
                    vectorsMemoryLimit=GPU_BYTES_AT_ONCE,
                    queriesMemoryLimit=GPU_BYTES_AT_ONCE,
                )
            return self._keys(-similarities, places)
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
        """Return the inner products of pairs of a query and a neighbour in float64.

        Each is summed in the same order, at least up to the 8,192 numbers that numpy looks at together.

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
        for turn in range(0, len(starts), self._num_threads):  # the vectors of no more than one turn are kept
            for vectors, places, distances in self._pool.map(nearest, starts[turn : turn + self._num_threads]):
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


def _load(
    gallery: EmbeddingSet, ids: range, kinds: tuple[Kind, ...], *, resident_bytes: float
) -> dict[Kind, NDArray[Any]]:
    """Read a shard's codes and vectors, into memory or, where that is too small, into memory-mapped files."""
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


def _as_floats(vectors: NDArray[Any]) -> NDArray[np.float32]:
    if vectors.dtype == np.uint8:
        return np.unpackbits(vectors, axis=1).astype(np.float32) * 2 - 1
    return vectors


def check_index(config: EvalConfig, dim: int) -> None:
    """Refuse an approximate index that faiss does not know, before anything is done for it.

    Raises:
        ValueError: with faiss's reason.

    """
    if config.index is not None:
        build_index(np.empty((0, dim), dtype=np.float32), config.index, config.index_parameters)


def build_index(
    vectors: NDArray[np.float32], factory: str, parameters: str | None, *, flag: str = "--eval.index"
) -> Any:
    """Build a faiss index by inner product.

    Args:
        vectors: `[n, D]`; none only check that faiss knows the index.
        factory: faiss's description of it.
        parameters: of its search, as faiss names them; None: its own.
        flag: that gave `factory`.

    Raises:
        ValueError: with faiss's reason.

    """
    import faiss

    index: Any
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if len(vectors):
            index.train(vectors)
            index.add(vectors)
        if parameters is not None:
            space: Any = faiss.ParameterSpace()
            space.set_index_parameters(index, parameters)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1]
        where = f" over {len(vectors):,}" if len(vectors) else ", for"
        raise ValueError(
            f"faiss cannot build {flag} {factory} ({parameters or 'its own search parameters'}){where} vectors "
            f"of {vectors.shape[1]} dimensions: {reason}; choose another"
            + (", or fewer --eval.num-shards" if len(vectors) and flag == "--eval.index" else "")
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
        parts = {place: np.flatnonzero(owners == place) for place in np.unique(owners).tolist()}
        asked = [ask(self.shards[place], part) for place, part in parts.items()]
        for part, rows in zip(parts.values(), ray.get(asked), strict=True):
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
        ValueError: the approximate index cannot be built, or the gallery is too large for the ids or the disk.

    """
    if embeddings.num_vectors > MOST_IDS:
        raise ValueError(f"{embeddings.num_vectors:,} vectors in one gallery: {MOST_IDS:,} is the most")

    def stop() -> None:
        for shard in shards:
            ray.kill(shard)

    gpus = num_gpus if "float" in kinds and exact else 0
    shards: list[Any] = []
    try:
        while True:
            shards, cuts, hosts = _start_shards(embeddings, kinds, config, num_gpus=gpus)
            try:
                block_sizes = cluster.get([shard.load.remote() for shard in shards])
                break
            except (RayActorError, ActorUnschedulableError):
                # An idle node that an autoscaler takes away just then is a node less, no reason to fail.
                if hosts <= {node["NodeID"] for node in cluster.live_nodes()}:
                    raise
                stop()
        if not exact:
            cluster.get([shard.approximate.remote(config.index, config.index_parameters) for shard in shards])
        # A quarter of the memory for the neighbours of the blocks in flight: keys from each shard, again in the object
        # store, merged, and as ids, similarities, masks and copies while ties are settled.
        row_bytes = (k + MARGIN) * (16 * len(shards) + 48) + embeddings.dim * 8
        memory = config.memory_budget * 2**30
        block_size = int(min(*block_sizes, max(1, memory / 4 / BLOCKS_IN_FLIGHT // row_bytes)))
        yield Gallery(embeddings, shards, cuts, exact, block_size)
    finally:
        stop()


def _start_shards(
    embeddings: EmbeddingSet, kinds: tuple[Kind, ...], config: EvalConfig, *, num_gpus: int
) -> tuple[list[Any], list[int], set[str]]:
    """Return actors on the nodes that are there now, where their shards begin and end, and the ids of the nodes."""
    nodes = cluster.live_nodes()
    nodes = [node for node in nodes if node["Resources"].get("CPU")] or nodes  # a cluster's head has none
    num_shards = min(config.num_shards or num_gpus or len(nodes), embeddings.num_vectors)
    num_gpus = min(num_gpus, num_shards)
    cuts = np.linspace(0, embeddings.num_vectors, num_shards + 1).astype(int).tolist()
    hosts = [node["NodeID"] for node in nodes if node["Resources"].get("GPU") or not num_gpus]
    shards_on_a_node = -(-num_shards // max(1, len(hosts)))
    threads = {"blocks": BLOCKS_IN_FLIGHT, "search": BLOCKS_IN_FLIGHT - 1, "ties": 1}
    actor = ray.remote(num_cpus=0, concurrency_groups=threads)(GalleryShard)
    # Hard affinity: by any other Ray places actors that reserve nothing at random, on the head as well.
    shards = [
        actor.options(
            num_gpus=1 if place < num_gpus else 0,
            scheduling_strategy="SPREAD"
            if place < num_gpus
            else NodeAffinitySchedulingStrategy(hosts[place % len(hosts)], soft=False),
        ).remote(
            embeddings,
            range(start, stop),
            kinds,
            use_gpu=place < num_gpus,
            shards_on_a_node=shards_on_a_node,
            memory_bytes=config.memory_budget * 2**30 / shards_on_a_node,
        )
        for place, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]
    return shards, cuts, set(hosts)


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
        blocks: of the queries; None: all, in blocks that fit the memory.

    Yields:
        Summaries, in the order of the queries.

    """
    name = f"search {kind}" if gallery.exact or kind == "binary" else "search approximately"
    if blocks is None:
        blocks = gallery.blocks(queries.num_vectors)
    else:
        name += ", a sample"
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


def judge_of(queries: EmbeddingSet, gallery: EmbeddingSet) -> Judge:
    """Read the labels of what is searched; where queries and gallery are the same, every one queries the rest."""
    own = queries == gallery
    gallery_labels = gallery.read_all("label", range(gallery.num_vectors))
    query_labels = gallery_labels if own else queries.read_all("label", range(queries.num_vectors))
    num_of_class = np.bincount(gallery_labels, minlength=int(query_labels.max()) + 1)
    return Judge(Classes(query_labels, gallery_labels), num_of_class[query_labels] - (1 if own else 0))


def sample_blocks(num_queries: int) -> list[range]:
    """Return some blocks of queries, evenly spread."""
    starts = range(0, num_queries, max(SAMPLED_AT_ONCE, -(-num_queries // SAMPLED_BLOCKS)))
    return [range(start, min(start + SAMPLED_AT_ONCE, num_queries)) for start in starts]


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


def tolerance(dim: int) -> float:
    """Return a bound of the error of float32 inner products of unit vectors, as matrix products compute them.

    A sum of `dim` terms errs by about sqrt(dim) roundings of its partial sums (Higham & Mary 2019), which do not exceed
    1, however small the sum. `settle_ties` checks the bound on every pair that it looks at.
    """
    return float(2.0**-24 * (np.sqrt(dim) + 2))


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
    error = tolerance(exact.queries.shape[1])
    while True:
        # Where the first one left out may be as near as the last one wanted, ties reach beyond what was found.
        open_Q = np.zeros(len(ids_QK), dtype=bool)
        if not complete:
            open_Q = similarities_QK[:, -1] >= similarities_QK[:, k - 1] - 2 * error
        close_Q = ~open_Q if matches_QK is None else ~open_Q & _have_close_matches(similarities_QK, matches_QK, error)
        rows = np.flatnonzero(close_Q)
        settled, seen_error = _settle_rows(similarities_QK[rows], ids_QK[rows], rows, exact, k, error)
        if seen_error <= error:
            break
        error = 2 * seen_error
    ids_QK[rows] = settled
    rows = np.flatnonzero(open_Q)
    if len(rows):
        ids_QK[rows, :k] = exact.nearest(rows, k)[:, :k]
    return ids_QK


def _have_close_matches(
    similarities_QK: NDArray[np.float32], matches_QK: NDArray[np.bool_], error: float
) -> NDArray[np.bool_]:
    rows_P, columns_P = np.nonzero(matches_QK)
    similarities_P = similarities_QK[rows_P, columns_P]
    before_P = similarities_QK[rows_P, np.maximum(columns_P - 1, 0)]
    after_P = similarities_QK[rows_P, np.minimum(columns_P + 1, similarities_QK.shape[1] - 1)]
    close_P = (columns_P > 0) & (before_P - similarities_P <= 2 * error)
    close_P |= (columns_P + 1 < similarities_QK.shape[1]) & (similarities_P - after_P <= 2 * error)
    found_Q = np.zeros(len(similarities_QK), dtype=bool)
    found_Q[rows_P[close_P]] = True
    return found_Q


def _settle_rows(
    similarities_QK: NDArray[np.float32],
    ids_QK: NDArray[np.int64],
    rows_Q: NDArray[np.int64],
    exact: _Exact,
    k: int,
    error: float,
) -> tuple[NDArray[np.int64], float]:
    """Settle the ties of the queries `rows_Q` of a block, none of whose ties reach beyond the neighbours.

    Returns:
        The ids in their settled order, and the greatest error of a similarity that was looked at.

    """
    close_QK = similarities_QK[:, :-1] - similarities_QK[:, 1:] <= 2 * error  # may change places with the next one
    involved_QK = np.zeros(ids_QK.shape, dtype=bool)
    involved_QK[:, :-1] |= close_QK
    involved_QK[:, 1:] |= close_QK
    # Beyond the last one wanted only those matter that hang together with it.
    np.logical_and.accumulate(close_QK[:, k - 1 :], axis=1, out=close_QK[:, k - 1 :])
    involved_QK[:, k:] &= close_QK[:, k - 1 :]
    rows_P, columns_P = np.nonzero(involved_QK)
    if not len(rows_P):
        return ids_QK, 0.0
    ids_P = ids_QK[rows_P, columns_P]
    exact_P = exact.similarities(rows_Q[rows_P], ids_P)
    starts_P = np.ones(len(rows_P), dtype=bool)
    starts_P[1:] = (rows_P[1:] != rows_P[:-1]) | ~close_QK[rows_P[1:], columns_P[1:] - 1]
    ids_QK[rows_P, columns_P] = ids_P[np.lexsort((ids_P, -exact_P, np.cumsum(starts_P)))]
    return ids_QK, float(np.abs(exact_P - similarities_QK[rows_P, columns_P]).max())

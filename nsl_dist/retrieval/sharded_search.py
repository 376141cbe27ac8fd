"""Sharded nearest-neighbour search, float and binary: exact, ties included, in bounded memory.

The gallery is split into shards, each in an actor (`gallery_shard`). Queries come in blocks. An actor on each node of
the shards leads the search of some blocks: it asks all shards for a block's neighbours, merges them, settles ties
(`ties`) and summarises the result. So no process holds more than its shard or a few blocks.

Neighbours are ordered by similarity, ties by ascending id. Hamming distances are whole numbers, so their ties are
certain; ties of float similarities are settled in float64.

Letters of array names: Q queries of a block, K neighbours, D dimensions, P pairs of a query and a neighbour.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorUnschedulableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nsl_dist import cluster
from nsl_dist.config import EvalConfig, Kind
from nsl_dist.progress import Progress
from nsl_dist.retrieval.gallery_shard import CONCURRENCY_GROUPS, GalleryShard
from nsl_dist.retrieval.metrics import Classes, Judge
from nsl_dist.retrieval.neighbours import MOST_IDS, distances_of, ids_of, merge, without
from nsl_dist.retrieval.ties import settle_ties
from nsl_dist.retrieval.vector_files import EmbeddingSet

T = TypeVar("T")

MARGIN = 32  # neighbours retrieved beyond those asked for, to see whether the last of them is tied with others
BLOCKS_IN_FLIGHT = 3  # the shards search two of them while the third is merged
SAMPLED_BLOCKS, SAMPLED_AT_ONCE = 16, 64  # blocks and queries in each, where a sample stands for all queries


@dataclass(frozen=True)
class Gallery:
    """A gallery in shards, each in an actor; from `open_gallery`.

    Attributes:
        embeddings: all of them.
        shards: actors of `GalleryShard`.
        leaders: actors of `BlockLeader`.
        cuts: first id of each shard, and the number of vectors.
        exact: False with an approximate index.
        block_size: queries in a block, so that their neighbours fit the memory.

    """

    embeddings: EmbeddingSet
    shards: list[Any]
    leaders: list[Any]
    cuts: list[int]
    exact: bool
    block_size: int

    def blocks(self, num_queries: int) -> list[range]:
        """Split the first `num_queries` queries into blocks."""
        starts = range(0, num_queries, self.block_size)
        return [range(start, min(start + self.block_size, num_queries)) for start in starts]

    def gather(self, ids: NDArray[np.int64], ask: Callable[[Any, NDArray[np.int64]], Any], out: NDArray[Any]) -> None:
        """Fill `out` with what the shards of `ids` return.

        Args:
            ids: of the gallery.
            ask: calls a shard's method; given the shard and the positions in `ids` that belong to it.
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
    """Start the shards of a gallery, wait until all have read their vectors, and stop them at the end.

    Args:
        embeddings: the gallery.
        kinds: what will be searched.
        config: number of shards, memory, approximate index.
        k: neighbours that will be asked for.
        num_gpus: GPUs that the search may use, at most one for each shard; codes are always searched on CPUs.
        exact: False searches floats with the approximate index of `config`.

    Raises:
        ValueError: the approximate index cannot be built, or the gallery is too large for the ids or the disk.

    """
    if embeddings.num_vectors > MOST_IDS:
        raise ValueError(f"{embeddings.num_vectors:,} vectors in one gallery: {MOST_IDS:,} is the most")

    def stop() -> None:
        for actor in [*shards, *leaders]:
            ray.kill(actor)

    gpus = num_gpus if "float" in kinds and exact else 0
    shards: list[Any] = []
    leaders: list[Any] = []
    try:
        while True:
            shards, cuts, hosts = _start_shards(embeddings, kinds, config, num_gpus=gpus)
            leaders = _start_leaders(hosts[: len(shards)])
            try:
                block_sizes = cluster.get([shard.load.remote() for shard in shards])
                break
            except (RayActorError, ActorUnschedulableError):
                # The autoscaler may remove an idle node at this moment: the search goes on with the others.
                if set(hosts) <= {node["NodeID"] for node in cluster.live_nodes()}:
                    raise
                stop()
        if not exact:
            cluster.get([shard.approximate.remote(config.index, config.index_parameters) for shard in shards])
        # A quarter of the memory is for the neighbours of the blocks in flight: keys from each shard, again in the
        # object store, merged, and as ids, similarities, masks and copies while ties are settled.
        row_bytes = (k + MARGIN) * (16 * len(shards) + 48) + embeddings.dim * 8
        memory = config.memory_budget * 2**30
        block_size = int(min(*block_sizes, max(1, memory / 4 / BLOCKS_IN_FLIGHT // row_bytes)))
        yield Gallery(embeddings, shards, leaders, cuts, exact, block_size)
    finally:
        stop()


def _start_shards(
    embeddings: EmbeddingSet, kinds: tuple[Kind, ...], config: EvalConfig, *, num_gpus: int
) -> tuple[list[Any], list[int], list[str]]:
    """Return actors on the nodes that are there now, the cuts between their shards, and the ids of these nodes."""
    nodes = cluster.live_nodes()
    nodes = [node for node in nodes if node["Resources"].get("CPU")] or nodes  # a cluster's head has none
    num_shards = min(config.num_shards or num_gpus or len(nodes), embeddings.num_vectors)
    num_gpus = min(num_gpus, num_shards)
    cuts = np.linspace(0, embeddings.num_vectors, num_shards + 1).astype(int).tolist()
    hosts = [node["NodeID"] for node in nodes if node["Resources"].get("GPU") or not num_gpus]
    shards_on_a_node = -(-num_shards // max(1, len(hosts)))
    actor = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(GalleryShard)
    shards = [
        actor.options(
            num_gpus=1 if place < num_gpus else 0,
            scheduling_strategy="SPREAD" if place < num_gpus else _on(hosts[place % len(hosts)]),
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
    return shards, cuts, hosts


def _start_leaders(hosts: list[str]) -> list[Any]:
    actor = ray.remote(num_cpus=0, max_concurrency=BLOCKS_IN_FLIGHT)(BlockLeader)
    return [actor.options(scheduling_strategy=_on(host)).remote() for host in hosts]


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return a hard affinity: with any other, Ray may place what reserves no resources anywhere, on the head too."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


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
    """Search for queries block by block and show progress; if they are the gallery itself, each leaves itself out.

    Args:
        queries: what to search for.
        gallery: from `open_gallery`.
        kind: what to compare.
        summarise: called by the leader of a block, with the ids of its queries and those of their neighbours, `[Q, k]`,
            nearest first, -1 where there are fewer. Only what it returns is sent back.
        k: neighbours wanted.
        classes: if given, only neighbours of the query's class must come to their exact places. The others keep the
            order in which they were found where float32 cannot tell them apart, which avoids most of the settling.
        blocks: of the queries; None: all, in blocks that fit the memory.

    Yields:
        What `summarise` returned, in the order of the blocks.

    """
    name = f"search {kind}" if gallery.exact or kind == "binary" else "search approximately"
    if blocks is None:
        blocks = gallery.blocks(queries.num_vectors)
    else:
        name += ", a sample"
    progress = Progress(name, "queries", sum(map(len, blocks)))
    shared = ray.put((queries, gallery, kind, summarise, classes))
    waiting = []
    for block, leader in zip(blocks, itertools.cycle(gallery.leaders), strict=False):
        waiting.append((block, leader.lead.remote(shared, block, k)))
        if len(waiting) == BLOCKS_IN_FLIGHT:
            done, summary = waiting.pop(0)
            yield ray.get(summary)
            progress.advance(len(done))
    for done, summary in waiting:
        yield ray.get(summary)
        progress.advance(len(done))


class BlockLeader:
    """An actor that leads the search of some blocks in all shards."""

    def lead(self, shared: Any, ids: range, k: int) -> Any:
        """Search for the queries `ids`; `shared` are the arguments of `search` that all blocks have in common."""
        queries, gallery, kind, summarise, classes = shared
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
                _ShardSimilarities(gallery, block, vectors, own_ids),
                k,
                dim=queries.dim,
                complete=depth == gallery.embeddings.num_vectors,
                matches_QK=matches,
            )
        neighbours = neighbours[:, :k]
        if neighbours.shape[1] < k:
            neighbours = np.pad(neighbours, ((0, 0), (0, k - neighbours.shape[1])), constant_values=-1)
        return summarise(ids, neighbours)


@dataclass(frozen=True)
class _ShardSimilarities:
    """The float64 similarities of a block's queries, computed by the shards (see `ties.ExactSimilarities`).

    Attributes:
        gallery: what is searched.
        block: `queries` in Ray's object store.
        queries: `[Q, D]`.
        own_ids: ids of the queries in the gallery, -1 if they are not in it.

    """

    gallery: Gallery
    block: Any
    queries: NDArray[np.float32]
    own_ids: NDArray[np.int64]

    def of_pairs(self, rows_P: NDArray[np.int64], ids_P: NDArray[np.int64]) -> NDArray[np.float64]:
        found_P = np.empty(len(ids_P))
        self.gallery.gather(
            ids_P, lambda shard, part: shard.similarities.remote(self.block, rows_P[part], ids_P[part]), found_P
        )
        return found_P

    def nearest(self, rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        depth = min(k + 1, self.gallery.embeddings.num_vectors)
        found = []
        queries_at_once = max(16, self.gallery.block_size // 8)  # float64 takes more memory for each query
        for start in range(0, len(rows), queries_at_once):
            some = rows[start : start + queries_at_once]
            queries = ray.put(self.queries[some])
            parts = ray.get([shard.search_in_float64.remote(queries, depth) for shard in self.gallery.shards])
            similarities = np.concatenate([similarities for similarities, _ in parts], axis=1)
            ids = np.concatenate([ids for _, ids in parts], axis=1)
            order = np.lexsort((ids, -similarities))[:, :depth]
            ids = np.take_along_axis(ids, order, axis=1)
            found.append(without(self.own_ids[some], ids))
        return np.concatenate(found)


def judge_of(queries: EmbeddingSet, gallery: EmbeddingSet) -> Judge:
    """Read the labels of queries and gallery; if they are the same set, every image queries the rest."""
    own = queries == gallery
    gallery_labels = gallery.read_all("label", range(gallery.num_vectors))
    query_labels = gallery_labels if own else queries.read_all("label", range(queries.num_vectors))
    num_of_class = np.bincount(gallery_labels, minlength=int(query_labels.max()) + 1)
    return Judge(Classes(query_labels, gallery_labels), num_of_class[query_labels] - (1 if own else 0))


def sample_blocks(num_queries: int) -> list[range]:
    """Return some blocks of queries, evenly spread."""
    starts = range(0, num_queries, max(SAMPLED_AT_ONCE, -(-num_queries // SAMPLED_BLOCKS)))
    return [range(start, min(start + SAMPLED_AT_ONCE, num_queries)) for start in starts]

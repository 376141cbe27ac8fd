r"""Benchmark time and memory of exact retrieval, compared with faiss and pytorch-metric-learning.

    python jobs/bench/search.py
    python jobs/bench/search.py --dim 2048 --implementations ours_float ours_binary faiss_flat faiss_binary
    python jobs/bench/search.py --num-vectors 2000000 --dim 128 --num-queries 20000 --implementations ours_float

Random unit vectors in planted classes of five search for their k nearest neighbours among each other; by default there
are as many as in the test split of Stanford Online Products. `ours_float` and `ours_binary` are `nsl_dist.retrieval`,
from embeddings on disk to recall, R-precision and MAP@R; the time includes starting actors but not Ray. `faiss_flat`
and `faiss_binary` do the same in one process with one IndexFlatIP or IndexBinaryFlat and a single search. `pml` is the
AccuracyCalculator of pytorch-metric-learning (extra `bench`) with precision@1, R-precision and MAP@R on vectors in
memory, measured on --pml-queries queries and scaled up to all.

They take turns, each in its own process tree, so that noise of the machine affects all of them equally. Peak memory is
that of the whole tree, including vectors, Ray and its object store.
"""

import json
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from nsl_dist.commandline import run_job
from nsl_dist.config import EvalConfig
from nsl_dist.retrieval.vector_files import EmbeddingSet, write_file

Implementation = Literal["ours_float", "ours_binary", "faiss_flat", "faiss_binary", "pml"]
IMAGES_PER_CLASS = 5
ROWS_AT_ONCE = 20000


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    num_vectors: int = 60502
    """Number of vectors in the gallery."""
    num_queries: int | None = None
    """Number of queries, taken from the start of the vectors. If None, all of them."""
    dim: tuple[int, ...] = (512,)
    """Embedding dimensions and bits of the binary codes."""
    k: int = 1001
    """Number of neighbours per query."""
    implementations: tuple[Implementation, ...] = ("ours_float", "faiss_flat", "ours_binary", "faiss_binary", "pml")
    """Implementations to measure."""
    pml_queries: int = 2000
    """Number of queries for pml, which needs memory for queries x k x dimensions."""
    turns: int = 3
    """Number of measurements per implementation; the median is reported."""
    num_shards: int = 1
    """Shards of ours, one process each."""
    memory_budget: float = 4.0
    """GiB of embeddings and neighbours for ours."""
    json: bool = False
    """Print one JSON object per line instead of a table."""

    def __post_init__(self) -> None:
        if self.num_queries is not None and not 1 <= self.num_queries <= self.num_vectors:
            raise ValueError(f"--num-queries {self.num_queries} must be in 1 to --num-vectors {self.num_vectors}")
        if not IMAGES_PER_CLASS - 1 <= self.k < self.num_vectors:
            raise ValueError(
                f"--k {self.k} must be at least {IMAGES_PER_CLASS - 1}, the matches of a query, and less than "
                f"--num-vectors {self.num_vectors}"
            )


def write_vectors(location: str, num_vectors: int, dim: int) -> EmbeddingSet:
    """Write random unit vectors around planted class centres, in blocks."""
    rng = np.random.default_rng(0)
    files, counts = [], []
    for start in range(0, num_vectors, ROWS_AT_ONCE):
        ids = np.arange(start, min(start + ROWS_AT_ONCE, num_vectors))
        labels = ids // IMAGES_PER_CLASS
        centres = rng.standard_normal((labels[-1] - labels[0] + 1, dim), dtype=np.float32)
        vectors = centres[labels - labels[0]] + rng.standard_normal((len(ids), dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        files.append(f"test-{start:012d}.parquet")
        counts.append(len(ids))
        paths = [f"{id_}.jpg" for id_ in ids]
        write_file(f"{location}/{files[-1]}", split="test", ids=ids, paths=paths, labels=labels, vectors=vectors)
    return EmbeddingSet(location=location, split="test", dim=dim, files=tuple(files), counts=tuple(counts))


def ours(vectors: EmbeddingSet, config: BenchConfig, kind: Any) -> float:
    """Return the seconds of our retrieval."""
    import ray

    from nsl_dist import cluster
    from nsl_dist.retrieval.metrics import join
    from nsl_dist.retrieval.sharded_search import judge_of, open_gallery, search

    cluster.connect(num_cpus=1)
    warm = ray.remote(lambda: os.getpid())
    ray.get([warm.remote() for _ in range(os.cpu_count() or 1)])  # wait for Ray's workers to start
    started = time.perf_counter()
    judge = judge_of(vectors, vectors)
    search_config = EvalConfig(num_shards=config.num_shards, memory_budget=config.memory_budget)
    with open_gallery(vectors, (kind,), search_config, k=config.k, num_gpus=0) as gallery:
        num_queries = config.num_queries or vectors.num_vectors
        blocks = gallery.blocks(num_queries)
        ranks = join(list(search(vectors, gallery, kind, judge, k=config.k, classes=judge.classes, blocks=blocks)))
    seconds = time.perf_counter() - started
    assert len(ranks.first_match) == num_queries
    return seconds


def faiss_alone(vectors: EmbeddingSet, config: BenchConfig, kind: str) -> float:
    """Return the seconds of one faiss index in one process."""
    import faiss

    from nsl_dist.retrieval.neighbours import without
    from nsl_dist.retrieval.sharded_search import judge_of

    started = time.perf_counter()
    judge = judge_of(vectors, vectors)
    column = "vector" if kind == "float" else "code"
    gallery = vectors.read_all(column, range(vectors.num_vectors))
    queries = gallery[: config.num_queries]
    index: Any = faiss.IndexFlatIP(vectors.dim) if kind == "float" else faiss.IndexBinaryFlat(8 * vectors.code_bytes)
    searching = time.perf_counter()
    index.add(gallery)
    _, ids = index.search(queries, config.k + 1)
    print(f"index alone: {time.perf_counter() - searching:.1f} s", file=sys.stderr, flush=True)
    for start in range(0, len(queries), 4096):  # all at once would need several times the memory
        block = range(start, min(start + 4096, len(queries)))
        part = slice(block.start, block.stop)
        ranks = judge(block, without(np.array(block), ids[part]))
        assert len(ranks.first_match) == len(block)
    return time.perf_counter() - started


def pml(vectors: EmbeddingSet, config: BenchConfig) -> float:
    """Return the seconds of pytorch-metric-learning, scaled up to all queries."""
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"), k=config.k, device=torch.device("cpu")
    )
    ids = range(vectors.num_vectors)
    gallery, labels = (torch.from_numpy(vectors.read_all(column, ids).copy()) for column in ("vector", "label"))
    wanted = config.num_queries or vectors.num_vectors
    num_queries = min(config.pml_queries, wanted)
    started = time.perf_counter()
    accuracy = calculator.get_accuracy(
        gallery[:num_queries], labels[:num_queries], gallery, labels, ref_includes_query=True
    )
    seconds = time.perf_counter() - started
    assert 0 <= accuracy["r_precision"] <= 1
    return seconds * wanted / num_queries


def compete(implementation: Implementation, vectors: EmbeddingSet, config: BenchConfig, answer: Connection) -> None:
    """Measure one implementation in a separate process."""
    sys.stdout = sys.stderr  # progress lines; stdout is for the table
    if implementation == "pml":
        answer.send(pml(vectors, config))
    elif implementation.startswith("faiss"):
        answer.send(faiss_alone(vectors, config, "float" if implementation == "faiss_flat" else "binary"))
    else:
        answer.send(ours(vectors, config, implementation.removeprefix("ours_")))


def tree_bytes(root: int) -> int:
    """Return the memory of a process and its descendants, counting shared memory once."""
    parents, sizes, shared = {}, {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue
        pid = int(status.parent.name)
        parents[pid] = int(lines["PPid"])
        sizes[pid] = 1024 * int(lines.get("RssAnon", "0 kB").split()[0])
        shared[pid] = 1024 * int(lines.get("RssShmem", "0 kB").split()[0])

    def below(pid: int) -> bool:
        while pid in parents:
            if pid == root:
                return True
            pid = parents[pid]
        return False

    tree = [pid for pid in parents if below(pid)]
    return sum(sizes[pid] for pid in tree) + max((shared[pid] for pid in tree), default=0)


def measure(implementation: Implementation, vectors: EmbeddingSet, config: BenchConfig) -> tuple[float, int]:
    """Return seconds and peak bytes of one implementation."""
    context = mp.get_context("forkserver")  # imports this module only once
    ours_end, theirs = context.Pipe()
    process = context.Process(target=compete, args=(implementation, vectors, config, theirs))
    process.start()
    theirs.close()
    assert process.pid is not None
    samples = [0]
    done = threading.Event()

    def watch(pid: int) -> None:
        while not done.wait(0.2):
            samples.append(tree_bytes(pid))

    watcher = threading.Thread(target=watch, args=(process.pid,))
    watcher.start()
    try:
        seconds = ours_end.recv()
    except EOFError:
        raise RuntimeError(f"{implementation} failed: see above") from None
    finally:
        done.set()
        watcher.join()
        process.join()
    return seconds, max(samples)


def main() -> None:
    """Measure, print the table."""
    config = tyro.cli(BenchConfig, description=__doc__)
    num_queries = config.num_queries or config.num_vectors
    print(
        f"{num_queries:,} queries, {config.num_vectors:,} vectors, k {config.k:,}, {config.turns} turns",
        file=sys.stderr,
    )
    header = ("implementation", "vectors", "dim", "k", "seconds", "min", "x faiss", "peak MB", "above")
    if not config.json:
        print(f"{header[0]:16}" + "".join(f"{name:>11}" for name in header[1:]))
    for dim in config.dim:
        with tempfile.TemporaryDirectory(prefix="nsl_dist_bench_") as location:
            vectors = write_vectors(location, config.num_vectors, dim)
            times: dict[Implementation, list[float]] = {each: [] for each in config.implementations}
            peaks: dict[Implementation, list[int]] = {each: [] for each in config.implementations}
            for _ in range(config.turns):
                for implementation in config.implementations:
                    seconds, peak = measure(implementation, vectors, config)
                    times[implementation].append(seconds)
                    peaks[implementation].append(peak)
        for implementation in config.implementations:
            seconds, peak = statistics.median(times[implementation]), max(peaks[implementation])
            result = {
                "implementation": implementation,
                "num_vectors": config.num_vectors,
                "num_queries": num_queries,
                "dim": dim,
                "k": config.k,
                "seconds": round(seconds, 3),
                "seconds_min": round(min(times[implementation]), 3),
                "peak_mb": round(peak / 1e6, 1),
            }
            if implementation == "pml":
                result["measured_queries"] = min(config.pml_queries, num_queries)
            if config.json:
                print(json.dumps(result), flush=True)
                continue
            binary = implementation.endswith("binary")
            peer: Implementation = "faiss_binary" if binary else "faiss_flat"
            ratio = f"{seconds / statistics.median(times[peer]):.2f}" if peer in times else "-"
            above = peak / 1e6 - config.num_vectors * dim * (1 / 8 if binary else 4) / 1e6
            print(
                f"{implementation:16}{config.num_vectors:11,}{dim:11,}{config.k:11,}{seconds:11.1f}"
                f"{min(times[implementation]):11.1f}{ratio:>11}{peak / 1e6:11,.0f}{above:11,.0f}",
                flush=True,
            )
        if "pml" in config.implementations and config.pml_queries < num_queries and not config.json:
            print(f"pml was measured on {config.pml_queries:,} queries; its seconds are scaled up to all", flush=True)


if __name__ == "__main__":
    run_job(main)

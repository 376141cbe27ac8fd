r"""Benchmark the search service under load, compared with the model and faiss alone in one process.

    python jobs/bench/service.py
    python jobs/bench/service.py --num-images 100000 --backbone resnet50 --image-size 224 --dim 512

jobs/search.py embeds a gallery of small random images with an untrained model and serves it on this machine. Each
client is a thread with its own connection that sends one query after the other. The floor decodes, embeds and searches
the same images one by one in this process, with all cores; ratios are relative to it.
"""

import http.client
import json
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from nsl_dist.commandline import run_job
from nsl_dist.config import DataConfig, ModelConfig, SearchConfig, TrainConfig

Kind = Literal["float", "binary"]
WARM_UP = 20


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    num_images: int = 20000
    """Number of images in the gallery."""
    num_queries: int = 1000
    """Queries of each kind; their images are not in the gallery."""
    clients: tuple[int, ...] = (1, 8)
    """Numbers of concurrent clients."""
    k: int = 10
    """Neighbours of each query."""
    backbone: str = "resnet18"
    """Name of a torchvision model."""
    dim: int = 128
    """Embedding dimensions and bits of the binary codes."""
    image_size: int = 64
    """Width and height of the model's input, in pixels; images are 1.5 times as large."""
    json: bool = False
    """Print one JSON object per line instead of a table."""


@dataclass(frozen=True)
class Measured:
    """Seconds per query, total seconds, and number of failed queries."""

    seconds: list[float]
    took: float
    failed: int

    @property
    def p50(self) -> float:
        """Median in milliseconds."""
        return float(1000 * np.percentile(self.seconds, 50))

    @property
    def p95(self) -> float:
        """95th percentile in milliseconds."""
        return float(1000 * np.percentile(self.seconds, 95))

    @property
    def rate(self) -> float:
        """Queries per second."""
        return len(self.seconds) / self.took


def write_images(folder: Path, count: int, edge: int, *, seed: int) -> None:
    """Write JPEGs: smoothly interpolated 4 x 4 grids of random colours."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        tiles = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        tiles.resize((edge, edge), Image.Resampling.BILINEAR).save(folder / f"{number:06d}.jpg")


def write_checkpoint(location: Path, config: BenchConfig) -> None:
    """Write an untrained model in the format of a checkpoint."""
    from nsl_dist.embedder import describe, weights_of
    from nsl_dist.model import build_model
    from nsl_dist.run import DESCRIPTION_FILE, MODEL_FILE

    model = ModelConfig(backbone=config.backbone, dim=config.dim)
    settings = TrainConfig(model=model, data=DataConfig(image_size=config.image_size))
    location.mkdir()
    (location / DESCRIPTION_FILE).write_bytes(describe(settings))
    (location / MODEL_FILE).write_bytes(weights_of(build_model(model, seed=0, pretrained=False).state_dict()))


def measure_floor(search: SearchConfig, queries: list[bytes], config: BenchConfig) -> dict[Kind, Measured]:
    """Measure model and index in this process, by kind of embeddings."""
    import ray

    from nsl_dist.retrieval.image_search import Query, Searcher, prepare_gallery

    searcher = Searcher(prepare_gallery(search), search)
    ray.shutdown()
    found = {}
    for kind in search.kinds:
        for query in queries[:WARM_UP]:
            searcher.search([Query(searcher.pixels(query), kind, config.k)])
        seconds = []
        began = time.perf_counter()
        for query in queries:
            started = time.perf_counter()
            (answer,) = searcher.search([Query(searcher.pixels(query), kind, config.k)])
            seconds.append(time.perf_counter() - started)
            assert len(answer.ids) == config.k
        found[kind] = Measured(seconds, time.perf_counter() - began, 0)
    return found


def measure_service(port: int, kind: Kind, clients: int, queries: list[bytes], config: BenchConfig) -> Measured:
    """Measure the service under load."""
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for query in queries:
        waiting.put(query)
    seconds: list[float] = []
    failed = 0

    def client() -> None:
        nonlocal failed
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while True:
            try:
                query = waiting.get_nowait()
            except queue.Empty:
                return
            started = time.perf_counter()
            connection.request("POST", f"/search?kind={kind}&k={config.k}", query)
            response = connection.getresponse()
            answer = json.loads(response.read())
            seconds.append(time.perf_counter() - started)
            failed += response.status != 200 or len(answer["neighbours"]) != config.k

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    return Measured(seconds, took, failed + len(queries) - len(seconds))


def wait_until_serving(process: subprocess.Popen[str]) -> None:
    """Forward the output of the job until it is serving."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        if "serving" in line:
            return
    raise RuntimeError(f"jobs/search.py ended with status {process.wait()}: see above")


def main() -> None:
    """Create a gallery, measure, print the table."""
    config = tyro.cli(BenchConfig, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="nsl_dist_bench_") as location:
        root = Path(location)
        edge = config.image_size * 3 // 2
        write_images(root / "gallery", config.num_images, edge, seed=0)
        write_images(root / "queries", config.num_queries, edge, seed=1)
        write_checkpoint(root / "checkpoint", config)
        queries = [path.read_bytes() for path in sorted((root / "queries").iterdir())]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        search = SearchConfig(
            checkpoint=str(root / "checkpoint"), gallery=str(root / "gallery"), storage=str(root / "storage"), port=port
        )
        command = [sys.executable, str(Path(__file__).parents[1] / "search.py")]
        command += [f"--{name}={getattr(search, name)}" for name in ("checkpoint", "gallery", "storage", "port")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            wait_until_serving(process)
            for kind in search.kinds:
                measure_service(port, kind, max(config.clients), queries[:WARM_UP], config)
            measured = {
                (kind, clients): measure_service(port, kind, clients, queries, config)
                for clients in config.clients
                for kind in search.kinds
            }
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        floor = measure_floor(search, queries, config)
    rows = [(f"floor {kind}", 0, kind, each) for kind, each in floor.items()]
    rows += [(f"service {kind}", clients, kind, each) for (kind, clients), each in measured.items()]
    header = ("clients", "p50 ms", "p95 ms", "queries/s", "x p50", "x p95", "x rate", "failed")
    if not config.json:
        print(
            f"{config.num_queries:,} queries, {config.num_images:,} images, {config.backbone}, {config.dim} dimensions"
        )
        print(f"{'':16}" + "".join(f"{name:>11}" for name in header))
    for name, clients, kind, each in rows:
        base = floor[kind]
        ratios = (each.p50 / base.p50, each.p95 / base.p95, each.rate / base.rate)
        if config.json:
            fields = {"name": name, "clients": clients, "p50_ms": each.p50, "p95_ms": each.p95, "rate": each.rate}
            print(json.dumps(fields | {"ratios": ratios, "failed": each.failed}), flush=True)
            continue
        numbers = (each.p50, each.p95, each.rate)
        print(
            f"{name:16}{clients or '-':>11}" + "".join(f"{number:11.1f}" for number in numbers)
            + "".join(f"{ratio:11.2f}" for ratio in ratios) + f"{each.failed:11}"
        )  # fmt: skip
    if any(each.failed for *_, each in rows):
        raise RuntimeError("queries failed: see the table")


if __name__ == "__main__":
    run_job(main)

"""Part `embedding` of jobs/bench/train.py: our embedding, a plain loop, and the forward pass alone."""

import statistics
import tempfile
import time
from collections.abc import Iterator

import ray
import torch
from gpu_steps import compiles
from plain_training import Work, settle
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nsl_dist import cluster
from nsl_dist.config import TrainConfig
from nsl_dist.data.images import decode
from nsl_dist.data.shards import Split, load_manifest
from nsl_dist.data.transforms import Normalise, eval_transform, least_pixels
from nsl_dist.device import autocast_dtype
from nsl_dist.model import build_model
from nsl_dist.retrieval.batch_inference import embed


def our_seconds(_: int, work: Work, splits: tuple[str, ...]) -> float:
    """Return the seconds that it takes to embed all images of some splits, the start of processes included."""
    manifest = load_manifest(str(work.config.data.root))
    gpus = torch.cuda.device_count() if work.device.type == "cuda" else 0
    cluster.connect(num_cpus=1)
    try:
        with tempfile.TemporaryDirectory() as out:
            started = time.perf_counter()
            embed(None, work.config, manifest, out=out, num_gpus=gpus, splits=splits)
            return time.perf_counter() - started
    finally:
        ray.shutdown()


class Decoded(IterableDataset[Tensor]):
    """Batches of images of a split, each process with its share of the classes."""

    def __init__(self, split: Split, config: TrainConfig) -> None:
        self.split, self.config = split, config

    def __iter__(self) -> Iterator[Tensor]:
        """Yield uint8 batches."""
        worker = get_worker_info()
        assert worker is not None
        least = least_pixels(self.config.data)
        images = []
        for label in range(worker.id, self.split.num_classes, worker.num_workers):
            for encoded in self.split.read_bag(label, ["image"])["image"]:
                images.append(eval_transform(decode(encoded.as_py(), least=least), self.config.data))
                if len(images) == self.config.eval.batch_size:
                    yield torch.stack(images)
                    images = []
        if images:
            yield torch.stack(images)


def network_of(work: Work) -> nn.Module:
    """Return what maps uint8 images to embeddings."""
    model = build_model(work.config.model, seed=work.config.seed)
    network = nn.Sequential(Normalise(), model).eval().to(work.device)
    return network.to(memory_format=torch.channels_last)


def forward_pass(network: nn.Module, images: Tensor, work: Work) -> Tensor:
    """Embed a batch."""
    dtype = autocast_dtype(work.config.precision, work.device)
    images = images.to(work.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(work.device.type, dtype, enabled=dtype is not None):
        embeddings: Tensor = network(images)
        return embeddings


def loop_rate(_: int, work: Work, processes: int) -> float:
    """Return images/s of a plain loop over a DataLoader, from the second batch on."""
    network, pin = network_of(work), work.device.type == "cuda"
    loader = DataLoader(Decoded(work.split, work.config), batch_size=None, num_workers=processes, pin_memory=pin)
    sizes = [(len(forward_pass(network, images, work).cpu()), time.perf_counter()) for images in loader]
    return sum(size for size, _ in sizes[1:]) / (sizes[-1][1] - sizes[0][1])


def forward_rate(rank: int, work: Work, turns: int) -> float:
    """Return images/s of the forward pass with one thread or, compiled, on one GPU."""
    torch.set_num_threads(1)
    if work.device.type == "cuda":
        torch.cuda.set_device(rank)
    network, size = network_of(work), work.config.data.image_size
    if compiles(work):
        network.compile(dynamic=False)
    images = torch.randint(0, 256, (work.config.eval.batch_size, 3, size, size), dtype=torch.uint8).to(work.device)
    seconds = []
    for _turn in range(2 + 3 * turns):
        settle(work.device)
        started = time.perf_counter()
        forward_pass(network, images, work).cpu()
        seconds.append(time.perf_counter() - started)
    return len(images) / statistics.median(seconds[2:])

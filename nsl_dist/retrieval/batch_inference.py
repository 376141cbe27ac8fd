"""Embeds the images of a data set into Parquet files, by a pool of actors of Ray Data.

On CPUs each actor reads, decodes and embeds on a core of its own. GPUs are fed by tasks that read and decode.
"""

import dataclasses
import functools
import hashlib
import json
import math
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from pyarrow import fs

from nsl_dist import cluster, ray_internals, storage
from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Manifest, Split
from nsl_dist.progress import Progress
from nsl_dist.retrieval.vector_files import EmbeddingSet, load_index, write_file, write_index

BATCHES_AT_ONCE = 4  # read by a task; few, so that all cores have work until the end


def embeddings_key(weights: bytes | None, config: TrainConfig, manifest: Manifest, *, num_gpus: int) -> str:
    """Return a name for the embeddings of a model on a data set: equal names, equal embeddings.

    Args:
        weights: content of the model's file; None: the weights that training starts from.
        config: its model, image size and precision count.
        manifest: of the data set.
        num_gpus: whether there are any counts, since GPUs round differently from CPUs.

    """
    fields = {
        "model": dataclasses.asdict(config.model),
        "weights": config.seed if weights is None else hashlib.sha256(weights).hexdigest(),
        "images": [config.data.image_size, config.data.crop_ratio, config.precision, num_gpus > 0],
        "data": manifest.digest,
        "decoding": 2,  # goes up when images are decoded or resized in another way
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def embed(
    weights: bytes | None,
    config: TrainConfig,
    manifest: Manifest,
    *,
    out: str,
    num_gpus: int,
    most_cpus: int | None = None,
    splits: tuple[str, ...] | None = None,
) -> dict[str, EmbeddingSet]:
    """Embed every image of some splits exactly once.

    Each shard of images becomes one file of embeddings. Files that exist are kept, so `out` must belong to this model,
    this data set (see `embeddings_key`) and these splits alone. An embedding's id is the image's position in its split,
    in order of label. Labels of evaluation splits are those of the gallery; classes it lacks get numbers above them.

    Args:
        weights: content of the model's file; None: the weights that training starts from.
        config: its model, image size, precision and evaluation batch size count.
        manifest: of the data set.
        out: folder or URI to write to.
        num_gpus: actors that embed, each on a GPU; 0 embeds on CPUs, in as many actors as the cluster has room for.
        most_cpus: actors on CPUs at most; None: as many as the cluster has CPUs.
        splits: which to embed, each with labels of its own. None: those of the evaluation, with common labels.

    Returns:
        The embeddings by split.

    Raises:
        ValueError: an embedding is not finite or has no direction.

    """
    if storage.exists(storage.join(out, "embeddings.json")):
        print(f"embeddings: all there in {out}", flush=True)
        return load_index(out)
    labels = _common_labels(manifest) if splits is None else {name: _labels(manifest, name) for name in splits}
    opened = {name: manifest.split(name) for name in dict.fromkeys(splits or manifest.evaluation_splits)}
    shards = [shard for name, split in opened.items() for shard in _shards_of(name, split)]
    missing = _without_written(shards, out)
    # Closed whatever happens: Ray Data would go on by itself, and keep the process from ending.
    with closing(_embedded(missing, opened, weights, config, num_gpus=num_gpus, most_cpus=most_cpus)) as batches:
        _write_files(batches, missing, opened, labels, out=out)
    sets = [_embedding_set(name, shards, location=out, dim=config.model.dim) for name in opened]
    write_index(out, sets)
    return {each.split: each for each in sets}


def mean_embeddings(weights: bytes, config: TrainConfig, split: Split, *, num_gpus: int) -> NDArray[np.float32]:
    """Return the mean embedding of the images of each class, `[num_classes, dim]`; see `embed`."""
    offsets, name = split.offsets, "train"
    sums = np.zeros((split.num_classes, config.model.dim))
    shards = _shards_of(name, split)
    with closing(_embedded(shards, {name: split}, weights, config, num_gpus=num_gpus, most_cpus=None)) as batches:
        for batch in batches:
            labels = np.searchsorted(offsets, batch["id"].to_numpy(), side="right") - 1
            vectors = batch["vector"].combine_chunks().flatten().to_numpy().reshape(len(labels), -1)
            np.add.at(sums, labels, vectors)
    return (sums / split.sizes[:, None]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A shard of images, embedded into one file of the same name.

    Attributes:
        split: name of its split.
        name: of the file.
        labels: of its classes, consecutive.
        first_id: of its first image.
        num_images: of all its classes.

    """

    split: str
    name: str
    labels: NDArray[np.int64]
    first_id: int
    num_images: int


def _shards_of(name: str, split: Split) -> list[_Shard]:
    offsets = split.offsets
    shards = []
    for place, shard in enumerate(split.shard_names):
        labels = np.flatnonzero(split.shards == place)
        if len(labels) == 0:  # of some classes of a split
            continue
        shards.append(_Shard(name, shard, labels, int(offsets[labels[0]]), int(split.sizes[labels].sum())))
    return shards


def _without_written(shards: list[_Shard], out: str) -> list[_Shard]:
    """Return the shards that have no file yet."""
    written = {PurePosixPath(path).name for path in _list(out)}
    missing = [shard for shard in shards if shard.name not in written]
    if len(missing) < len(shards):
        print(
            f"embeddings: {len(shards) - len(missing)} of {len(shards)} shards are there already in {out}", flush=True
        )
    return missing


def _embedded(
    shards: list[_Shard],
    splits: dict[str, Split],
    weights: bytes | None,
    config: TrainConfig,
    *,
    num_gpus: int,
    most_cpus: int | None,
) -> Generator[pa.Table]:
    """Yield batches of embeddings in any order, with `shard` (its place in `shards`), `id`, `path` and `vector`."""
    if not shards:
        return
    num_images = sum(shard.num_images for shard in shards)
    pieces = _pieces(shards, splits, BATCHES_AT_ONCE * config.eval.batch_size)
    read = _reader(pieces, shards, splits, config)
    places = pa.table({"id": np.arange(len(pieces))})
    # Not `ray.data.range`, whose tasks would wait for a CPU while the actors have all of them.
    work = ray_internals.dataset_of_rows(places, ray.data.DataContext.get_current())
    # Few images are not worth the start of many processes.
    most_actors = num_gpus or most_cpus or cluster.cores()
    most_actors = min(most_actors, math.ceil(num_images / config.eval.batch_size))
    if num_gpus:
        embedded = work.map_batches(read, batch_size=None, num_cpus=1, **cluster.prefer_cpu_nodes()).map_batches(
            _Embedder,
            fn_constructor_args=(weights and ray.put(weights), config, most_actors),
            batch_size=config.eval.batch_size,
            num_cpus=0,
            num_gpus=1,
            # While the GPU computes a batch, the next one is copied to it.
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=most_actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
        )
    else:
        free = max(1, int(ray.available_resources().get("CPU", 0)))
        embedded = work.map_batches(
            _Embedder,
            fn_constructor_args=(weights and ray.put(weights), config, most_actors, read),
            batch_size=None,
            num_cpus=1,
            runtime_env={"env_vars": cluster.KEEP_FREED_MEMORY},
            compute=ray.data.ActorPoolStrategy(
                min_size=1, initial_size=min(free, most_actors), max_size=most_actors, max_tasks_in_flight_per_actor=2
            ),
        )
    progress = Progress("embed", "images", num_images)
    for batch in embedded.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield batch
        progress.advance(len(batch))


_Piece = tuple[int, NDArray[np.int64]]  # part of a shard: its place, and labels of some of its classes
_Read = Callable[[dict[str, NDArray[np.int64]]], Iterator[dict[str, Any]]]


def _pieces(shards: list[_Shard], splits: dict[str, Split], num_images: int) -> list[_Piece]:
    """Cut shards into pieces of whole classes, of about `num_images` images each."""
    pieces = []
    for place, shard in enumerate(shards):
        ends = np.cumsum(splits[shard.split].sizes[shard.labels])
        cuts = np.flatnonzero(np.diff((ends - 1) // num_images)) + 1
        pieces += [(place, labels) for labels in np.split(shard.labels, cuts)]
    return pieces


def _reader(pieces: list[_Piece], shards: list[_Shard], splits: dict[str, Split], config: TrainConfig) -> _Read:
    """Return what reads and decodes pieces, given by their places in `pieces`, into batches of images."""
    shared = ray.put((pieces, shards, splits))

    def read(rows: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        cluster.import_whole("nsl_dist.data.transforms")
        from nsl_dist.data.images import decode
        from nsl_dist.data.transforms import eval_transform, least_pixels

        least = least_pixels(config.data)
        pieces, shards, splits = ray.get(shared)
        images: list[Any] = []
        ids: list[int] = []
        paths: list[str] = []
        places: list[int] = []

        def batch() -> dict[str, Any]:
            return {"image": np.stack(images), "id": np.array(ids), "path": np.array(paths), "shard": np.array(places)}

        for each in rows["id"].tolist():
            place, labels = pieces[each]
            split = splits[shards[place].split]
            offsets = split.offsets
            for label in labels.tolist():
                bag = split.read_bag(label, ["path", "image"])
                for index, (path, encoded) in enumerate(zip(bag["path"], bag["image"], strict=True)):
                    images.append(eval_transform(decode(encoded.as_py(), least=least), config.data).numpy())
                    ids.append(int(offsets[label]) + index)
                    paths.append(path.as_py())
                    places.append(place)
                    if len(ids) == config.eval.batch_size:
                        yield batch()
                        images, ids, paths, places = [], [], [], []
        if ids:
            yield batch()

    return read


def _write_files(
    batches: Iterator[pa.Table],
    shards: list[_Shard],
    splits: dict[str, Split],
    labels: dict[str, NDArray[np.int64]],
    *,
    out: str,
) -> None:
    """Write the file of each shard once all its embeddings have come.

    Raises:
        ValueError: an embedding is not finite or has no direction.

    """
    parts: dict[int, list[pa.Table]] = {place: [] for place in range(len(shards))}
    with ThreadPoolExecutor(4) as pool:  # object stores take several files at once
        writing: list[Future[None]] = []
        for batch in batches:
            for place in batch["shard"].unique().to_pylist():
                shard = shards[place]
                parts[place].append(batch.filter(pa.compute.equal(batch["shard"], place)))
                if sum(map(len, parts[place])) < shard.num_images:
                    continue
                ids, paths, vectors = _joined(parts.pop(place), shard)
                _reject_degenerate(vectors, ids, splits[shard.split], shard.split)
                write = functools.partial(
                    write_file,
                    split=shard.split,
                    ids=ids,
                    paths=paths,
                    labels=labels[shard.split][ids],
                    vectors=vectors,
                )
                writing.append(pool.submit(write, storage.join(out, shard.name)))
        for future in writing:
            future.result()
    if parts:
        raise RuntimeError(f"shards {[shards[place].name for place in parts]} were not embedded completely")


def _joined(parts: list[pa.Table], shard: _Shard) -> tuple[NDArray[np.int64], list[str], NDArray[np.float32]]:
    """Return the ids of a shard's images, ascending, their paths, and their embeddings, `[num_images, dim]`."""
    table = pa.concat_tables(parts).sort_by("id")
    ids = table["id"].to_numpy()
    if not np.array_equal(ids, np.arange(shard.first_id, shard.first_id + shard.num_images)):
        raise RuntimeError(
            f"shard {shard.name} was not embedded exactly once: ids {ids}, expected from {shard.first_id}"
        )
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
    return ids, table["path"].to_pylist(), vectors


def _embedding_set(split: str, shards: list[_Shard], *, location: str, dim: int) -> EmbeddingSet:
    of_split = [shard for shard in shards if shard.split == split]
    return EmbeddingSet(
        location=location,
        split=split,
        dim=dim,
        files=tuple(shard.name for shard in of_split),
        counts=tuple(shard.num_images for shard in of_split),
    )


def _common_labels(manifest: Manifest) -> dict[str, NDArray[np.int64]]:
    """Return the class of each image of the evaluation splits, by split, numbered alike in both."""
    query, gallery = manifest.evaluation_splits
    gallery_sizes = manifest.split(gallery).sizes
    labels = {gallery: _labels(manifest, gallery)}
    if query != gallery:
        classes = pa.compute.index_in(manifest.class_ids(query), value_set=manifest.class_ids(gallery).combine_chunks())
        places = classes.to_numpy().astype(np.float64)  # NaN where the gallery lacks the class
        absent = np.isnan(places)
        places[absent] = len(gallery_sizes) + np.arange(absent.sum())
        labels[query] = np.repeat(places.astype(np.int64), manifest.split(query).sizes)
    return labels


def _labels(manifest: Manifest, split: str) -> NDArray[np.int64]:
    sizes = manifest.split(split).sizes
    return np.repeat(np.arange(len(sizes)), sizes)


def _reject_degenerate(vectors: NDArray[np.float32], ids: NDArray[np.int64], split: Split, name: str) -> None:
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 0.01))
    if len(bad):
        label = int(np.searchsorted(split.offsets, ids[bad[0]], side="right")) - 1
        row = split.read_bag(label, ["class_id", "image_id"]).slice(int(ids[bad[0]] - split.offsets[label]), 1)
        image_id, class_id = row["image_id"][0].as_py(), row["class_id"][0].as_py()
        raise ValueError(
            f"the model gives {len(bad)} embeddings that are zero or not finite, the first for image {image_id} of "
            f"class {class_id} of the {name} split: {vectors[bad[0]][:4]}...; it has diverged: evaluate an earlier "
            "checkpoint, or train with a lower --optim.lr"
        )


def _list(location: str) -> list[str]:
    filesystem, path = storage.resolve(location)
    selector = fs.FileSelector(path, allow_not_found=True)
    return [info.path for info in filesystem.get_file_info(selector)]


class _Embedder:
    """An actor that holds the model, and embeds batches of images or those that `read` makes of its input."""

    def __init__(self, weights: Any, config: TrainConfig, num_actors: int, read: _Read | None = None) -> None:
        import torch

        from nsl_dist.data.transforms import Normalise
        from nsl_dist.device import autocast_dtype, use_cpu_threads
        from nsl_dist.embedder import load_weights
        from nsl_dist.model import build_model

        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        self.read = read
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        if self.device.type == "cpu":
            use_cpu_threads(num_actors)
        self.dtype = autocast_dtype(config.precision, self.device)
        model = build_model(config.model, seed=config.seed, pretrained=weights is None)
        if weights is not None:
            try:
                content = ray.get(weights)
            except ray.exceptions.ReferenceCountingAssertionError:
                return  # the other actors embedded everything before this one started: it gets no batch
            load_weights(model, content, location="the checkpoint")
        model.to(memory_format=torch.channels_last)
        self.forward = torch.nn.Sequential(Normalise(), model).eval().to(self.device)
        self.streams = threading.local()  # one for each call at a time

    def __call__(self, rows: dict[str, NDArray[Any]]) -> Iterator[pa.Table]:
        for batch in [rows] if self.read is None else self.read(rows):
            yield self._embed(batch)

    def _embed(self, batch: dict[str, NDArray[Any]]) -> pa.Table:
        import torch

        images, stream = torch.from_numpy(batch["image"]), None
        if self.device.type == "cuda":
            stream = self.streams.own = getattr(self.streams, "own", None) or torch.cuda.Stream(self.device)
        with (
            torch.inference_mode(),
            # Threads would share the cache of weights.
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False),
            nullcontext() if stream is None else torch.cuda.stream(stream),
        ):
            if stream is not None:
                images = images.pin_memory().to(self.device, non_blocking=True)
            embeddings_BD = self.forward(images.contiguous(memory_format=torch.channels_last)).cpu().numpy()
        flat = pa.array(embeddings_BD.ravel(), type=pa.float32())
        vectors = pa.FixedSizeListArray.from_arrays(flat, embeddings_BD.shape[1])
        paths = pa.array(batch["path"].tolist(), pa.string())
        return pa.table({"id": batch["id"], "path": paths, "shard": batch["shard"], "vector": vectors})

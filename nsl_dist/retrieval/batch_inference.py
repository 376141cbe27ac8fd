"""Model and shards -> embeddings in Parquet: Ray Data reads and decodes, a pool of actors embeds."""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from pyarrow import fs

from nsl_dist import cluster, storage
from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Manifest, Split
from nsl_dist.progress import Progress
from nsl_dist.retrieval.vector_files import EmbeddingSet, load_index, write_file, write_index


def embeddings_key(weights: bytes | None, config: TrainConfig, manifest: Manifest, *, num_gpus: int) -> str:
    """Return a name for the embeddings of a model on a data set: equal names, equal embeddings.

    Args:
        weights: the model's state, as its file holds it; None: that which training starts from.
        config: of the model; its image size and precision.
        manifest: of the data set.
        num_gpus: GPUs to embed with; they round otherwise than CPUs.

    """
    fields = {
        "model": dataclasses.asdict(config.model),
        "weights": config.seed if weights is None else hashlib.sha256(weights).hexdigest(),
        "images": [config.data.image_size, config.data.crop_ratio, config.precision, num_gpus > 0],
        "data": manifest.digest,
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def embed(
    weights: bytes | None,
    config: TrainConfig,
    manifest: Manifest,
    *,
    out: str,
    num_gpus: int,
    splits: tuple[str, ...] | None = None,
) -> dict[str, EmbeddingSet]:
    """Embed every image of some splits exactly once.

    Each shard of images gives one file of embeddings. Files that are there already are kept: `out` must be of this
    model, this data set (see `embeddings_key`) and these splits alone. An id is an image's place in its split, in order
    of label; labels of the evaluation are those of the searched split, for classes that it lacks numbers beyond.

    Args:
        weights: the model's state, as its file holds it; None embeds with the weights that training starts from.
        config: its model, image size, precision and batch size.
        manifest: of the data set.
        out: folder or URI to write to.
        num_gpus: actors that embed, on a GPU each; 0 embeds on CPUs, in as many actors as the cluster spares.
        splits: which to embed. None: those of the evaluation, the classes of both numbered alike.

    Returns:
        The embeddings by split.

    Raises:
        ValueError: the model gives an embedding that is not finite or has no direction.

    """
    if storage.exists(storage.join(out, "embeddings.json")):
        print(f"embeddings: all there in {out}", flush=True)
        return load_index(out)
    labels = _common_labels(manifest) if splits is None else {name: _labels(manifest, name) for name in splits}
    names = list(dict.fromkeys(splits or manifest.evaluation_splits))
    opened = {name: manifest.split(name) for name in names}
    shards = {
        (name, shard): np.flatnonzero(opened[name].shards == place)
        for name in names
        for place, shard in enumerate(opened[name].shard_names)
    }
    there = {PurePosixPath(path).name for path in _list(out)}
    todo = [key for key in shards if key[1] not in there]
    if len(todo) < len(shards):
        print(f"embeddings: {len(shards) - len(todo)} of {len(shards)} shards are there already in {out}", flush=True)
    sets = _embed_shards(weights, config, opened, shards, todo, labels, out=out, num_gpus=num_gpus)
    write_index(out, sets)
    return {each.split: each for each in sets}


def _embed_shards(
    weights: bytes | None,
    config: TrainConfig,
    splits: dict[str, Split],
    shards: dict[tuple[str, str], NDArray[np.int64]],
    todo: list[tuple[str, str]],
    labels: dict[str, NDArray[np.int64]],
    *,
    out: str,
    num_gpus: int,
) -> list[EmbeddingSet]:
    shared = ray.put((splits, [(name, shards[name, shard]) for name, shard in todo]))

    def read(task: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        cluster.import_whole("nsl_dist.data.transforms")
        from nsl_dist.data.transforms import decode, eval_transform

        splits, tasks = ray.get(shared)
        images: list[Any] = []
        ids: list[int] = []
        places: list[int] = []

        def batch() -> dict[str, Any]:
            return {"image": np.stack(images), "id": np.array(ids), "task": np.array(places)}

        for place in task["id"].tolist():
            name, classes = tasks[place]
            offsets = splits[name].offsets
            for label in classes.tolist():
                bag = splits[name].read_bag(label, ["image"])["image"]
                for index, encoded in enumerate(bag):
                    images.append(eval_transform(decode(encoded.as_py()), config.data).numpy())
                    ids.append(int(offsets[label]) + index)
                    places.append(place)
                    if len(ids) == config.eval.batch_size:
                        yield batch()
                        images, ids, places = [], [], []
        if ids:
            yield batch()

    counts = {key: int(splits[key[0]].sizes[classes].sum()) for key, classes in shards.items()}
    num_images = sum(counts[key] for key in todo)
    # Few images are not worth the start of many processes.
    most_batches = max(1, math.ceil(num_images / config.eval.batch_size))
    most_actors = min(num_gpus or max(1, cluster.totals()[0] // 2), most_batches)
    embedded = (
        ray.data.range(len(todo), override_num_blocks=max(1, min(len(todo), most_batches)))
        .map_batches(read, batch_size=None, num_cpus=1, **cluster.prefer_cpu_nodes())
        .map_batches(
            _Embedder,
            fn_constructor_args=(weights and ray.put(weights), config, most_actors),
            batch_size=config.eval.batch_size,
            num_cpus=0 if num_gpus else 1,
            num_gpus=1 if num_gpus else 0,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most_actors),
        )
    )
    progress = Progress("embed", "images", num_images)
    parts: dict[int, list[pa.Table]] = {place: [] for place in range(len(todo))}
    with ThreadPoolExecutor(4) as pool:  # object stores take several files at once
        writing: list[Future[None]] = []
        batches = embedded.iter_batches(batch_size=None, batch_format="pyarrow") if todo else []
        for batch in batches:
            for place in batch["task"].unique().to_pylist():
                part = batch.filter(pa.compute.equal(batch["task"], place))
                parts[place].append(part)
                key = todo[place]
                if sum(map(len, parts[place])) < counts[key]:
                    continue
                table = pa.concat_tables(parts.pop(place)).sort_by("id")
                ids = table["id"].to_numpy()
                first = int(splits[key[0]].offsets[shards[key][0]])
                if not np.array_equal(ids, np.arange(first, first + counts[key])):
                    raise RuntimeError(
                        f"shard {key[1]} was not embedded exactly once: ids {ids}, expected from {first}"
                    )
                vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(ids), config.model.dim)
                _reject_degenerate(vectors, ids, splits[key[0]], key[0])
                writing.append(
                    pool.submit(
                        write_file,
                        storage.join(out, key[1]),
                        split=key[0],
                        ids=ids,
                        labels=labels[key[0]][ids],
                        vectors=vectors,
                    )
                )
            progress.advance(len(batch))
        for future in writing:
            future.result()
    if parts:
        raise RuntimeError(f"shards {[todo[place][1] for place in parts]} were not embedded completely")
    return [
        EmbeddingSet(
            location=out,
            split=split,
            dim=config.model.dim,
            files=tuple(shard for name, shard in shards if name == split),
            counts=tuple(count for (name, _), count in counts.items() if name == split),
        )
        for split in splits
    ]


def _common_labels(manifest: Manifest) -> dict[str, NDArray[np.int64]]:
    """Return for each image of each split its class, numbered in the same way in both."""
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
    """An actor that holds the model."""

    def __init__(self, weights: Any, config: TrainConfig, num_actors: int) -> None:
        import torch

        from nsl_dist.device import autocast_dtype, use_cpu_threads
        from nsl_dist.embedder import load_weights
        from nsl_dist.model import build_model

        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor written
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        if self.device.type == "cpu":
            use_cpu_threads(num_actors)
        self.dtype = autocast_dtype(config.precision, self.device)
        self.model = build_model(config.model, seed=config.seed, pretrained=weights is None)
        if weights is not None:
            try:
                content = ray.get(weights)
            except ray.exceptions.ReferenceCountingAssertionError:
                return  # others have embedded all before this actor was there, and nothing comes to it any more
            load_weights(self.model, content, location="the checkpoint")
        self.model.eval().to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, batch: dict[str, NDArray[Any]]) -> pa.Table:
        import torch

        from nsl_dist.data.transforms import normalise

        images = normalise(torch.from_numpy(batch["image"]).to(self.device))
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            embeddings_BD = self.model(images.contiguous(memory_format=torch.channels_last)).cpu().numpy()
        flat = pa.array(embeddings_BD.ravel(), type=pa.float32())
        vectors = pa.FixedSizeListArray.from_arrays(flat, embeddings_BD.shape[1])
        return pa.table({"id": batch["id"], "task": batch["task"], "vector": vectors})

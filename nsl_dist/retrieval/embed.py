"""Model and shards -> embeddings in Parquet: Ray Data reads and decodes, a pool of actors embeds."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from nsl_dist import storage
from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Split


def embed_split(weights: str | None, config: TrainConfig, split: Split, *, out: str, num_gpus: int) -> int:
    """Embed every image of a split once.

    Args:
        weights: file or URI of the model's state; None embeds with the weights that training starts from.
        config: its model, image size, precision and batch size.
        split: what to embed; an image's id is its place in the split, in order of label.
        num_gpus: actors that embed, on a GPU each; 0 embeds on CPUs, in as many actors as the cluster spares.
        out: folder or URI; receives Parquet files with `id`, `label` and `embedding` (float32 list of length 1).

    Returns:
        The number of embeddings written.

    """
    offsets = np.concatenate([[0], np.cumsum(split.sizes)[:-1]])
    shared = ray.put((split, offsets))

    def read(task: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        from nsl_dist.data.transforms import decode, eval_transform

        split, offsets = ray.get(shared)
        (shard,) = task["id"].tolist()
        for label in np.flatnonzero(split.shards == shard).tolist():
            bag = split.read_bag(label, ["image"])["image"]
            for start in range(0, len(bag), config.eval.batch_size):
                images = [
                    eval_transform(decode(encoded.as_py()), config.data).numpy()
                    for encoded in bag[start : start + config.eval.batch_size]
                ]
                ids = offsets[label] + start + np.arange(len(images))
                yield {"image": np.stack(images), "id": ids, "label": np.full(len(images), label)}

    most_actors = num_gpus or max(1, int(ray.cluster_resources()["CPU"]) // 2)
    num_shards = len(split.shard_names)
    embedded = (
        ray.data.range(num_shards, override_num_blocks=num_shards)
        .map_batches(read, batch_size=None, num_cpus=1)
        .map_batches(
            _Embedder,
            fn_constructor_args=(weights, config, most_actors),
            batch_size=config.eval.batch_size,
            num_cpus=0 if num_gpus else 1,
            num_gpus=1 if num_gpus else 0,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most_actors),
        )
    )
    filesystem, path = storage.resolve(out)
    embedded.write_parquet(path, filesystem=filesystem, mode="overwrite")
    return int(ray.data.read_parquet(path, filesystem=filesystem, columns=["id"]).count())


class _Embedder:
    """An actor that holds the model."""

    def __init__(self, weights: str | None, config: TrainConfig, num_actors: int) -> None:
        import torch

        from nsl_dist.device import autocast_dtype, use_cpu_threads
        from nsl_dist.model import build_model

        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        if self.device.type == "cpu":
            use_cpu_threads(num_actors)
        self.dtype = autocast_dtype(config.precision, self.device)
        self.model = build_model(config.model, seed=config.seed, pretrained=weights is None)
        if weights is not None:
            content = io.BytesIO(storage.read_bytes(weights))
            self.model.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))
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
        return pa.table({"id": batch["id"], "label": batch["label"], "embedding": vectors})

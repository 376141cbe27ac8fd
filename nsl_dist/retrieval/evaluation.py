"""The evaluation of a model on a split: embed, search, measure."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Manifest
from nsl_dist.retrieval.embed import embed_split
from nsl_dist.retrieval.metrics import first_match, recall_at_k
from nsl_dist.retrieval.search import self_retrieval

if TYPE_CHECKING:
    from torch import Tensor


def evaluate(model_state: dict[str, "Tensor"], config: TrainConfig, manifest: Manifest, *, out: str) -> dict[str, Any]:
    """Evaluate on the test split, every image querying the rest, with float and with binary embeddings.

    Args:
        model_state: state of `build_model(config.model)`.
        config: of the run.
        manifest: of the shards.
        out: folder or URI for the embeddings.

    Returns:
        `recall` by kind and K (shares), counts, `seconds` by phase and `images_per_second` of embedding.
    """
    split = manifest.split("test")
    started = time.monotonic()
    num_images = embed_split(model_state, config, split, out=out)
    if num_images != split.num_images:
        raise RuntimeError(f"{out} holds {num_images} embeddings, the test split {split.num_images} images")
    seconds = {"embed": time.monotonic() - started}

    labels = np.repeat(np.arange(split.num_classes), split.sizes)
    deepest = min(max(config.eval.recall_at), num_images - 1)
    num_shards = config.eval.num_shards or sum(node["Alive"] for node in ray.nodes())
    recall = {}
    for kind in ("float", "binary"):
        started = time.monotonic()
        blocks = self_retrieval(out, num_images=num_images, k=deepest, num_shards=num_shards, kind=kind)
        matches = np.concatenate([first_match(ids, queries.labels, labels) for queries, ids in blocks])
        seconds[f"search_{kind}"] = time.monotonic() - started
        # K beyond the gallery asks for all of it.
        recall[kind] = {str(k): recall_at_k(matches, min(k, deepest)) for k in config.eval.recall_at}
    return {
        "recall": recall,
        "num_queries": num_images,
        "num_gallery": num_images,
        "num_classes": split.num_classes,
        "num_singleton_classes": split.num_singletons,
        "seconds": seconds,
        "images_per_second": num_images / seconds["embed"],
    }

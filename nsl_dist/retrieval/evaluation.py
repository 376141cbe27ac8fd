"""The evaluation of a model on a split: embed, search, measure."""

import time
from typing import Any

import numpy as np
import ray
from ray.util.queue import Queue

from nsl_dist import storage
from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Manifest
from nsl_dist.retrieval.embed import embed_split
from nsl_dist.retrieval.metrics import first_match, recall_at_k
from nsl_dist.retrieval.search import self_retrieval, start_shards


def evaluate(
    weights: str | None, config: TrainConfig, manifest: Manifest, *, run_dir: str, step: int, num_gpus: int
) -> dict[str, Any]:
    """Evaluate on the test split, every image querying the rest, with float and with binary embeddings.

    Args:
        weights: file or URI of the model's state; None evaluates the weights that training starts from.
        config: of the run.
        manifest: of the shards.
        run_dir: folder or URI of the run; the embeddings go to `embeddings/step-STEP` below it.
        step: iterations that the model was trained for.
        num_gpus: GPUs to embed with; 0 embeds on CPUs.

    Returns:
        `recall` by kind and K (shares), counts, `seconds` by phase and `images_per_second` of embedding.

    """
    split = manifest.split("test")
    out = storage.join(run_dir, "embeddings", f"step-{step}")
    started = time.monotonic()
    num_images = embed_split(weights, config, split, out=out, num_gpus=num_gpus)
    if num_images != split.num_images:
        raise RuntimeError(f"{out} holds {num_images} embeddings, the test split {split.num_images} images")
    seconds = {"embed": time.monotonic() - started}

    labels = np.repeat(np.arange(split.num_classes), split.sizes)
    deepest = min(max(config.eval.recall_at), num_images - 1)
    num_shards = config.eval.num_shards or sum(node["Alive"] for node in ray.nodes())
    started = time.monotonic()
    shards = start_shards(out, num_images=num_images, num_shards=num_shards)
    seconds["index"] = time.monotonic() - started
    recall = {}
    for kind in ("float", "binary"):
        started = time.monotonic()
        blocks = self_retrieval(out, shards, num_images=num_images, k=deepest, kind=kind)
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


def evaluate_checkpoint(
    checkpoint: Any,
    *,
    step: int,
    config: TrainConfig,
    manifest: Manifest,
    run_dir: str,
    progress: Queue,
) -> dict[str, float]:
    """Evaluate a checkpoint beside the training: a validation function of Ray Train.

    Args:
        checkpoint: a `ray.train.Checkpoint`.
        step: iterations before it.
        config: of the run.
        manifest: of the shards.
        run_dir: that the checkpoint and the embeddings lie in.
        progress: takes the full result to the driver.

    Returns:
        Metrics for Ray Train to keep with the checkpoint.

    """
    weights = model_location(checkpoint, run_dir)
    results = evaluate(weights, config, manifest, run_dir=run_dir, step=step, num_gpus=0)  # training holds the GPUs
    progress.put({"step": step, "evaluation": results})
    return recall_metrics(results)


def model_location(checkpoint: Any, run_dir: str) -> str:
    """Return the path or URI of the model's state in a `ray.train.Checkpoint` of a run."""
    return storage.join(run_dir, checkpoint.path.rpartition("/")[2], storage.MODEL_FILE)


def recall_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Return `evaluate`'s recall by name of metric."""
    return {f"recall_at_{k}_{kind}": share for kind, by_k in results["recall"].items() for k, share in by_k.items()}

"""Photographs of any size for jobs/bench/train.py --photo-size, so that it needs no data set."""

import io

import numpy as np
import ray
from PIL import Image

from nsl_dist import cluster, storage
from nsl_dist.data.images import decode
from nsl_dist.data.layouts import SOP_SPLITS
from nsl_dist.data.shards import DataSource, find_data, synthetic_data
from nsl_dist.progress import Progress

GRAIN = 5  # standard deviation of a camera's noise, which decides how many bytes a JPEG has
QUALITY = 88
IMAGES_PER_TASK = 50


def photos(storage_root: str, edge: int) -> DataSource:
    """Return the built-in products as JPEGs of `edge` x `edge` pixels; they are made once, below `storage_root`."""
    products = synthetic_data(storage_root)
    root = storage.join(storage_root, f"photos-{edge}")
    if not storage.exists(storage.join(root, SOP_SPLITS["test"])):  # written last
        assert products.records is not None
        paths = products.records["path"].to_pylist()
        progress = Progress("photos", "images", len(paths))
        enlarge = ray.remote(_enlarge)
        parts = [paths[start : start + IMAGES_PER_TASK] for start in range(0, len(paths), IMAGES_PER_TASK)]
        for task, part in zip([enlarge.remote(part, products.root, root, edge) for part in parts], parts, strict=True):
            cluster.get(task)
            progress.advance(len(part))
        for name in (SOP_SPLITS["train"], SOP_SPLITS["test"]):
            storage.write_bytes(storage.join(root, name), storage.read_bytes(storage.join(products.root, name)))
    return find_data(root, layout="sop")


def _enlarge(paths: list[str], source: str, target: str, edge: int) -> None:
    grain = np.random.default_rng(0).standard_normal((edge, edge, 3), dtype=np.float32)
    for path in paths:
        small = decode(storage.read_bytes(storage.join(source, path))).permute(1, 2, 0).numpy()
        large = np.asarray(Image.fromarray(small).resize((edge, edge), Image.Resampling.BICUBIC), dtype=np.float32)
        stream = io.BytesIO()
        Image.fromarray((large + GRAIN * grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
        storage.write_bytes(storage.join(target, path), stream.getvalue())

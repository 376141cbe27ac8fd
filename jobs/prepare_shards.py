"""Convert a data set to Parquet shards of class bags, from which training and evaluation stream.

python jobs/prepare_shards.py --layout sop --root Stanford_Online_Products --out s3://bucket/sop_shards

Photos of several megapixels take most of the time of every epoch, or a fraction of it with --max-edge 512.
"""

import sys
from dataclasses import dataclass, replace

import tyro

from nsl_dist.commandline import run_job
from nsl_dist.config import FolderSplit, Layout, SplitBy


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare."""

    root: str
    """Folder or URI of the unpacked data set."""
    out: str
    """Folder or URI for the shards. On a cluster, all nodes must be able to reach it."""
    layout: Layout | None = None
    """Layout of the data set: Stanford Online Products, In-Shop, CUB-200-2011, CARS196, or one folder of images per
    class. If None, it is detected from the files."""
    split: SplitBy = "classes"
    """How class folders are split: by classes, or by the images of each class (see --data.split of jobs/train.py)."""
    test_share: float = 0.5
    """Share of the class folders, or of each one's images, that is for test."""
    test_classes: str | None = None
    """File with the class folders for test, one a line, instead of drawing them."""
    max_edge: int | None = None
    """Re-encode images that have a side of more pixels, so that they fit: upright, as JPEG of quality 95. It should be
    at least 1.2 times the input size of training, divided by the square root of --data.crop-area. If None, images are
    kept as they are."""
    max_undecodable: float = 0.01
    """Fraction of the images that may fail to decode; unless it is 0, a few may always. They are listed and skipped."""
    wait_for_nodes: float = 15.0
    """Minutes to wait at the start for missing nodes, which are requested from the autoscaler."""


def main() -> None:
    """Read the records, write the shards, print a summary."""
    config = tyro.cli(PrepareConfig, args=sys.argv[1:], description=__doc__)

    if config.max_edge is not None and config.max_edge < 8:
        raise ValueError(f"--max-edge {config.max_edge} must be at least 8 pixels")

    from nsl_dist import cluster
    from nsl_dist.data.shards import find_data, prepare

    split = FolderSplit(config.split, config.test_share, config.test_classes)
    data = find_data(config.root, layout=config.layout, split=split)
    if data.records is not None:
        print(f"{data.root}: {len(data.records):,} images in the layout {data.layout}", flush=True)
    cluster.connect(num_cpus=1)
    cluster.wait_for({"reading": (1, {"CPU": 1})}, minutes=config.wait_for_nodes, fix="add nodes")
    manifest = prepare(replace(data, max_edge=config.max_edge), out=config.out, max_undecodable=config.max_undecodable)
    for name, counts in manifest.splits.items():
        print(
            f"{name}: {counts['num_images']:,} images of {counts['num_classes']:,} classes, "
            f"{counts['num_singletons']:,} classes with one image"
        )
    print(f"used: {sum(counts['num_images'] for counts in manifest.splits.values()):,} images")
    for name, text in manifest.account().items():
        print(f"{name}: {text}")
    print(f"digest {manifest.digest}\n{len(manifest.shards)} shards in {manifest.root}")


if __name__ == "__main__":
    run_job(main)

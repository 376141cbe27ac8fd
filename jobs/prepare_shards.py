"""Convert a data set to Parquet shards of class bags, from which training and evaluation stream.

python jobs/prepare_shards.py --layout sop --root Stanford_Online_Products --out s3://bucket/sop_shards
"""

import sys
from dataclasses import dataclass

import tyro

from nsl_dist.commandline import run_job
from nsl_dist.config import Layout


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare."""

    root: str
    """Folder or URI of the unpacked data set."""
    out: str
    """Folder or URI for the shards. On a cluster, all nodes must be able to reach it."""
    layout: Layout | None = None
    """Layout of the data set: Stanford Online Products, In-Shop, CUB-200-2011, CARS196, or one folder of images per
    class (the first half of the classes is for training). If None, it is detected from the files."""
    max_undecodable: float = 0.01
    """Fraction of the images that may fail to decode. They are listed in the manifest and skipped."""
    wait_for_nodes: float = 15.0
    """Minutes to wait at the start for missing nodes, which are requested from the autoscaler."""


def main() -> None:
    """Read the records, write the shards, print a summary."""
    config = tyro.cli(PrepareConfig, args=sys.argv[1:], description=__doc__)

    from nsl_dist import cluster
    from nsl_dist.data.layouts import read_records, recognise
    from nsl_dist.data.shards import prepare

    layout = config.layout or recognise(config.root)
    records = read_records(config.root, layout=layout)
    print(f"{config.root}: {len(records):,} images in the layout {layout}", flush=True)
    cluster.connect(num_cpus=1)
    cluster.wait_for({"reading": (1, {"CPU": 1})}, minutes=config.wait_for_nodes, fix="add nodes")
    manifest = prepare(records, root=config.root, layout=layout, out=config.out, max_undecodable=config.max_undecodable)
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split['num_images']:,} images of {split['num_classes']:,} classes, "
            f"{split['num_singletons']:,} classes with one image"
        )
    print(f"left out: {len(manifest.undecodable):,} undecodable images, listed in manifest.json")
    print(f"digest {manifest.digest}\n{len(manifest.shards)} shards in {manifest.root}")


if __name__ == "__main__":
    run_job(main)

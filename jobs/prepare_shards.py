"""Write a data set as Parquet shards of class bags, for training and evaluation to stream from.

python jobs/prepare_shards.py --layout sop --root Stanford_Online_Products --out s3://bucket/sop_shards
"""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from nsl_dist.commandline import run_job


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare."""

    root: str
    """Folder or URI of the unpacked data set."""
    out: str
    """Folder or URI for the shards; on a cluster, one that all nodes can reach."""
    layout: Literal["sop"] = "sop"
    """Layout of the data set: sop is that of Stanford Online Products."""
    max_undecodable: float = 0.01
    """Share of the images that may fail to decode; they are listed in the manifest and left out."""


def main() -> None:
    """Read the records, write the shards, say what they hold."""
    config = tyro.cli(PrepareConfig, args=sys.argv[1:], description=__doc__)

    from nsl_dist import cluster
    from nsl_dist.data.layouts import read_sop
    from nsl_dist.data.shards import prepare

    cluster.connect(num_cpus=1)
    records = read_sop(config.root)
    manifest = prepare(
        records, root=config.root, out=config.out, layout=config.layout, max_undecodable=config.max_undecodable
    )
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split['num_images']:,} images of {split['num_classes']:,} classes, "
            f"{split['num_singletons']:,} classes with one image"
        )
    print(f"left out: {len(manifest.undecodable):,} undecodable images, listed in manifest.json")
    print(f"digest {manifest.digest}\n{len(manifest.shards)} shards in {manifest.root}")


if __name__ == "__main__":
    run_job(main)

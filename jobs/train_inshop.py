r"""Train the paper's recipe on In-Shop Clothes Retrieval and evaluate it on unseen clothes.

    python jobs/train_inshop.py --data.root inshop

A small network, to try it without a GPU:

    python jobs/train_inshop.py --data.root inshop --recipe laptop_photos
"""

import sys

from nsl_dist.commandline import parse_train_config, run_job


def main() -> None:
    """Parse, train, evaluate."""
    config = parse_train_config(sys.argv[1:], description=__doc__ or "", recipe="inshop_resnet50", layout="inshop")

    from nsl_dist.training.train import train  # after parsing: --help needs neither torch nor Ray

    train(config)


if __name__ == "__main__":
    run_job(main, shows_results=True)

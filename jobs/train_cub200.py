r"""Train the paper's recipe on CUB-200-2011 and evaluate it on unseen classes.

    python jobs/train_cub200.py --data.root CUB_200_2011

A small network, to try it without a GPU:

    python jobs/train_cub200.py --data.root CUB_200_2011 --recipe laptop_photos
"""

import sys

from nsl_dist.commandline import parse_train_config, run_job


def main() -> None:
    """Parse, train, evaluate."""
    config = parse_train_config(sys.argv[1:], description=__doc__ or "", recipe="cub200_resnet50", layout="cub200")

    from nsl_dist.training.train import train  # after parsing: --help needs neither torch nor Ray

    train(config)


if __name__ == "__main__":
    run_job(main, shows_results=True)

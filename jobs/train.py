r"""Train on any data set and evaluate on classes that training has not seen.

On this machine with built-in synthetic products, in a few minutes:

    python jobs/train.py

On a folder of your own with one folder of images per class:

    python jobs/train.py --data.root ~/photos --epochs 20

The jobs of published data sets, jobs/train_sop.py and others, are this one with the layout of their data.
"""

import sys

from nsl_dist.commandline import parse_train_config, run_job


def main() -> None:
    """Parse, train, evaluate."""
    config = parse_train_config(sys.argv[1:], description=__doc__ or "")

    from nsl_dist.training.train import train  # after parsing: --help needs neither torch nor Ray

    train(config)


if __name__ == "__main__":
    run_job(main, shows_results=True)

r"""Train on any data set and evaluate on classes that training has not seen.

On this machine with built-in synthetic products, in a few minutes:

    python jobs/train.py

On a folder of your own with one folder of images per class:

    python jobs/train.py --data.root ~/photos

The recipe is `laptop` for the products and `laptop_photos` for your own data, unless --recipe names another.
The jobs of published data sets, jobs/train_sop.py and others, are this one with the layout of their data.
"""

import sys

from nsl_dist.commandline import parse_train_config, run_job


def main() -> None:
    """Parse, train, evaluate."""
    arguments = sys.argv[1:]
    has_data = any(argument.partition("=")[0] == "--data.root" for argument in arguments)
    recipe = "laptop_photos" if has_data else "laptop"
    config = parse_train_config(arguments, description=__doc__ or "", recipe=recipe)

    from nsl_dist.training.train import train  # after parsing: --help needs neither torch nor Ray

    train(config)


if __name__ == "__main__":
    run_job(main, shows_results=True)

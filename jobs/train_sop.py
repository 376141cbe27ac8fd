r"""Train on Stanford Online Products and evaluate on unseen products.

On this machine with built-in synthetic products, in a few minutes:

    python jobs/train_sop.py

The paper's recipe on the real data set, on a Ray cluster with GPUs:

    ray job submit --working-dir . -- python jobs/train_sop.py --recipe sop_resnet50 \
        --data.root s3://bucket/sop_shards --storage s3://bucket/nsl_dist --num-workers 8 --data.batch-size 80
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

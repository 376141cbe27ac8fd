r"""Evaluate a checkpoint: recall@K, R-precision, MAP@R and NMI of float and binary embeddings on unseen classes.

The newest checkpoint of a run, on the data it was trained on:

    python jobs/evaluate.py --checkpoint ~/nsl_dist/runs/NAME

On a cluster, with 95% confidence intervals, logged as a child of the training's MLflow run:

    ray job submit --working-dir . -- python jobs/evaluate.py --checkpoint s3://bucket/nsl_dist/runs/NAME \
        --data.root s3://bucket/sop_shards --storage s3://bucket/nsl_dist --run-id ID --eval.intervals
"""

import sys

import tyro

from nsl_dist.commandline import OUTPUT_FLAGS, run_job, spell_out
from nsl_dist.config import EvaluateConfig


def main() -> None:
    """Parse, embed, search, measure."""
    config = tyro.cli(EvaluateConfig, args=spell_out(sys.argv[1:]), description=f"{__doc__}\n{OUTPUT_FLAGS}")

    from nsl_dist.retrieval.evaluation import run  # after parsing: --help needs neither torch nor Ray

    run(config)


if __name__ == "__main__":
    run_job(main, shows_results=True)

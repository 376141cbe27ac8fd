"""Recipes, flags and errors of the jobs' command lines."""

import argparse
import sys
from collections.abc import Callable

import tyro

from nsl_dist.config import TrainConfig
from nsl_dist.recipes import RECIPES


def parse_train_config(arguments: list[str], *, description: str) -> TrainConfig:
    """Return the recipe named by `--recipe` (default: laptop) with the other flags applied.

    Raises:
        ValueError: a value is out of range.
        SystemExit: `--help`, or a flag that does not exist.

    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=list(RECIPES), default="laptop")
    recipe = first.parse_known_args(arguments)[0].recipe
    return tyro.cli(TrainConfig, args=arguments, default=RECIPES[recipe](), description=description)


def run_job(main: Callable[[], None]) -> None:
    """Run a job; a user's mistake ends it with one line and exit status 2 instead of a stack trace."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

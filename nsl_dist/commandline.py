"""Recipes, flags and errors of the jobs' command lines."""

import argparse
import dataclasses
import sys
from collections.abc import Callable

import tyro

from nsl_dist.config import Layout, TrainConfig
from nsl_dist.progress import Output, output
from nsl_dist.recipes import RECIPES
from nsl_dist.run import StoppedError, TrainingError

OUTPUT_FLAGS = "--quiet prints results and errors alone; --json prints the results as JSON, all else to stderr."


def parse_train_config(
    arguments: list[str], *, description: str, recipe: str = "laptop", layout: Layout | None = None
) -> TrainConfig:
    """Return the recipe named by `--recipe` with the other flags applied.

    Args:
        arguments: of the command line.
        description: printed by `--help`.
        recipe: where the command line names none.
        layout: of the job's data set, None for any; `--layout` overrides it.

    Raises:
        ValueError: the job's data set has no root.
        SystemExit: `--help`, a flag that does not exist, or a value out of range.

    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=list(RECIPES), default=recipe)
    default = RECIPES[first.parse_known_args(arguments)[0].recipe]()
    default = dataclasses.replace(default, data=dataclasses.replace(default.data, layout=layout))
    config = tyro.cli(
        TrainConfig, args=spell_out(arguments), default=default, description=f"{description}\n{OUTPUT_FLAGS}"
    )
    if layout is not None and config.data.root is None:
        raise ValueError(f"give the folder of the data set (layout {layout}), or shards of it, as --data.root")
    return config


def spell_out(arguments: list[str]) -> list[str]:
    """Let `--layout` stand for `--data.layout`, as in the jobs that only take a root."""
    return [f"--data.{each[2:]}" if each.partition("=")[0] == "--layout" else each for each in arguments]


def run_job(main: Callable[[], None], *, shows_results: bool = False) -> None:
    """Run a job; what a user can mend ends it with one line instead of a stack trace.

    Exit status 2: bad input; 1: training that cannot go on; 128 + signal: stopped, and can go on.

    Args:
        main: reads the command line.
        shows_results: `main` calls `show_results`. Then `--quiet` leaves out all but those and errors; `--json` prints
            the results as JSON, all else to stderr.

    """
    choice: Output = "full"
    if shows_results:
        choice = "json" if "--json" in sys.argv else "quiet" if "--quiet" in sys.argv else "full"
        sys.argv = [argument for argument in sys.argv if argument not in ("--json", "--quiet")]
    try:
        with output(choice):
            main()
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

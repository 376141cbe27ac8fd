"""Command lines of the jobs: recipes, flags and error handling."""

import argparse
import dataclasses
import sys
from collections.abc import Callable

import tyro

from nsl_dist.config import Layout, TrainConfig
from nsl_dist.progress import Output, output
from nsl_dist.recipes import RECIPES
from nsl_dist.run import StoppedError, TrainingError

OUTPUT_FLAGS = "--quiet prints only results and errors; --json prints results as JSON and everything else to stderr."


def parse_train_config(
    arguments: list[str], *, description: str, recipe: str = "laptop", layout: Layout | None = None
) -> TrainConfig:
    """Apply the command line to the recipe named by `--recipe`.

    Args:
        arguments: command line without the program name.
        description: text for `--help`.
        recipe: default recipe.
        layout: layout of the job's data set, or None for any; `--layout` overrides it.

    Raises:
        ValueError: `layout` is given but `--data.root` is not.
        SystemExit: `--help` was given, a flag is unknown, or a value is out of range.

    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=list(RECIPES), default=recipe)
    default = RECIPES[first.parse_known_args(arguments)[0].recipe]()
    default = dataclasses.replace(default, data=dataclasses.replace(default.data, layout=layout))
    config = tyro.cli(
        TrainConfig, args=spell_out(arguments), default=default, description=f"{description}\n{OUTPUT_FLAGS}"
    )
    if layout is not None and config.data.root is None:
        raise ValueError(f"set --data.root to the folder of the data set (layout {layout}) or to its shards")
    return config


def spell_out(arguments: list[str]) -> list[str]:
    """Replace `--layout`, the short form, by `--data.layout`."""
    return [f"--data.{each[2:]}" if each.partition("=")[0] == "--layout" else each for each in arguments]


def run_job(main: Callable[[], None], *, shows_results: bool = False) -> None:
    """Run a job; errors that a user can fix are printed as one line instead of a stack trace.

    The exit status is 2 for bad input, 1 if training cannot continue, and 128 + signal if the job was stopped and can
    be resumed.

    Args:
        main: parses the command line and does the work.
        shows_results: whether `main` calls `show_results`, so that `--quiet` and `--json` apply (see `OUTPUT_FLAGS`).

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

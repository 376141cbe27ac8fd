"""Command lines of the jobs: recipes, flags and error handling."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import NoReturn

import tyro

from nsl_dist.config import Layout, TrainConfig
from nsl_dist.progress import Output, output
from nsl_dist.recipes import RECIPES
from nsl_dist.run import StoppedError, TrainingError
from nsl_dist.stopping import end_on_signals

ESSENTIAL_FLAGS = """The flags that most runs need, of all those below:
  --data.root FOLDER  --run-name NAME  --num-workers N
  --epochs N  --batch-size N  --lr RATE (short for --optim.epochs, --data.batch-size, --optim.lr)
  --model.backbone NAME  --model.weights WEIGHTS  --proxies.sample-rate SHARE
"""
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
    arguments = spell_out(arguments)
    flags = {each.partition("=")[0].replace("_", "-") for each in arguments}
    asks_for_a_batch = bool(flags & {"--data.batch-size", "--data.images-per-class"})
    data = dataclasses.replace(default.data, layout=layout, fit_batch=not asks_for_a_batch)
    default = dataclasses.replace(default, data=data)
    config = tyro.cli(
        TrainConfig, args=arguments, default=default, description=f"{description}\n{ESSENTIAL_FLAGS}\n{OUTPUT_FLAGS}"
    )
    if layout is not None and config.data.root is None:
        raise ValueError(f"set --data.root to the folder of the data set (layout {layout}) or to its shards")
    return config


SHORT_FORMS = {
    "--layout": "--data.layout", "--batch-size": "--data.batch-size", "--epochs": "--optim.epochs", "--lr": "--optim.lr"
}  # fmt: skip


def spell_out(arguments: list[str]) -> list[str]:
    """Replace short forms of flags by the flags."""
    parts = [each.partition("=") for each in arguments]
    return [SHORT_FORMS.get(flag, flag) + equals + value for flag, equals, value in parts]


def run_job(main: Callable[[], None], *, shows_results: bool = False) -> None:
    """Run a job; errors that a user can fix are printed as one line instead of a stack trace.

    The exit status is 2 for bad input, 1 if training cannot continue, and 128 + signal if the job was stopped.

    Args:
        main: parses the command line and does the work.
        shows_results: whether `main` calls `show_results`, so that `--quiet` and `--json` apply (see `OUTPUT_FLAGS`).

    """
    choice: Output = "full"
    if shows_results:
        choice = "json" if "--json" in sys.argv else "quiet" if "--quiet" in sys.argv else "full"
        sys.argv = [argument for argument in sys.argv if argument not in ("--json", "--quiet")]
    end_on_signals()
    try:
        with output(choice):
            main()
    except StoppedError as error:
        _end(str(error), status=128 + error.signal)
    except TrainingError as error:
        _end(f"error: {error}", status=1)
    except (ValueError, FileNotFoundError) as error:
        _end(f"error: {error}", status=2)


def _end(message: str, *, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)

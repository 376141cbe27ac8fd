r"""Train the paper's recipe for a data set, evaluate it, and print our results beside the published ones.

    python jobs/reproduce.py --data.root Stanford_Online_Products
    python jobs/reproduce.py --data.root cars196 --recipe cars196_resnet50_512

Without --recipe, it trains ResNet-50 at 2048 dimensions for the layout of the data. All other flags are those of
jobs/train_sop.py; those that change the recipe are listed below the results. --json prints two lines, the results and
the comparison. The comparison is also written to published.json in the run's folder.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

from nsl_dist.commandline import parse_train_config, run_job
from nsl_dist.config import TrainConfig, differences
from nsl_dist.progress import show_results
from nsl_dist.recipes import FIGURES, RECIPES
from nsl_dist.retrieval.results import EvaluationResults


def recipe_of(arguments: list[str]) -> str:
    """Return the recipe given on the command line, or the default for its data.

    Raises:
        ValueError: both are missing, or the recipe has no published results.

    """
    from nsl_dist.data.shards import layout_of

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--recipe", "--data.root", "--data.layout", "--layout"):
        first.add_argument(flag)
    named = vars(first.parse_known_args(arguments)[0])
    root, recipe = named["data.root"], named["recipe"]
    if root is None:
        raise ValueError("set --data.root to the folder of the data set or to its shards")
    if recipe is None:
        recipe = f"{layout_of(root, named['data.layout'] or named['layout'])}_resnet50"
    if recipe not in FIGURES:
        raise ValueError(f"recipe {recipe} has no published results; set --recipe to one of {', '.join(FIGURES)}")
    return str(recipe)


def compare(results: EvaluationResults, config: TrainConfig) -> list[dict[str, Any]]:
    """Return a row for each published figure, in %; `ours` is None if it was not measured."""
    rows = []
    for published in FIGURES[config.recipe]:
        named = {f"R@{k}": (value, results.recall[published.kind].get(k)) for k, value in published.recall.items()}
        if published.nmi is not None:
            named["NMI"] = (published.nmi, (results.nmi or {}).get(published.kind))
        for metric, (value, share) in named.items():
            ours = None if share is None else 100 * share
            rows.append(
                {
                    "source": published.source,
                    "kind": published.kind,
                    "metric": metric,
                    "published": value,
                    "ours": ours,
                    "difference": None if ours is None else ours - value,
                }
            )
    return rows


def table(rows: list[dict[str, Any]], changed: list[str]) -> str:
    """Format the comparison as a table."""
    lines = [f"{'':16}{'':8}{'':8}{'published':>10}{'ours':>8}{'difference':>12}"]
    for row in rows:
        ours = f"{row['ours']:8.2f}{row['difference']:+12.2f}" if row["ours"] is not None else f"{'-':>8}{'-':>12}"
        lines.append(f"{row['source']:16}{row['kind']:8}{row['metric']:8}{row['published']:10.2f}{ours}")
    if changed:
        lines.append(f"changed from the published recipe: {'; '.join(changed)}")
    return "\n".join(lines)


def main() -> None:
    """Parse, train, evaluate, compare."""
    arguments = sys.argv[1:]
    recipe = "sop_resnet50" if {"-h", "--help"}.intersection(arguments) else recipe_of(arguments)
    config = parse_train_config(arguments, description=__doc__ or "", recipe=recipe)

    from nsl_dist import storage
    from nsl_dist.run import RunFolder
    from nsl_dist.training.train import train  # after parsing: --help needs neither torch nor Ray

    results = train(config)
    changed = differences(RECIPES[config.recipe](), config)
    rows = compare(results.evaluation, config)
    found = {"recipe": config.recipe, "changed": changed, "published": rows}
    location = RunFolder.of(dataclasses.replace(config, run_name=results.run_name)).file("published.json")
    storage.write_bytes(location, json.dumps(found, indent=1).encode())
    show_results(f"\n{config.recipe}, in %\n{table(rows, changed)}\ncomparison: {location}", found)


if __name__ == "__main__":
    run_job(main, shows_results=True)

r"""Train the paper's recipe for a data set, evaluate it, and print our results beside the published ones.

    python jobs/reproduce.py --data.root Stanford_Online_Products
    python jobs/reproduce.py --data.root cars196 --recipe cars196_resnet50_512

    python jobs/reproduce.py --list

--list prints, without training, what each recipe aims at, needs, and has reached. Without --recipe, the job trains
ResNet-50 at 2048 dimensions for the layout of the data. All other flags are those of
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
from nsl_dist.recipes import DATA_SETS, FIGURES, IMAGES_PER_SECOND, REACHED, RECIPES
from nsl_dist.retrieval.results import EvaluationResults
from nsl_dist.schedule import Schedule


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


def needs() -> list[dict[str, Any]]:
    """Return for each recipe with published results what it aims at and takes; None: not known."""
    rows = []
    for name, published in FIGURES.items():
        config, data = RECIPES[name](), DATA_SETS[name.partition("_")[0]]
        steps = Schedule(config.optim, data.num_images // config.data.batch_size).num_steps
        images = steps * config.data.batch_size
        rate = IMAGES_PER_SECOND.get(config.model.backbone)
        rows.append(
            {
                "recipe": name,
                "data": data.name,
                "recall@1": max(each.recall[1] for each in published if each.kind == "float"),
                "source": published[0].source,
                "weights": f"{config.model.backbone} {config.model.weights}",
                "steps": steps,
                "images": images,
                "minutes": None if rate is None else images / rate / 60,
            }
        )
    return rows


def list_of_needs(rows: list[dict[str, Any]]) -> str:
    """Format what recipes need as a table."""
    lines = [
        f"{'recipe':22}{'data':26}{'R@1':>7}  {'source':14}{'iterations':>10}{'images':>12}{'minutes':>9}  weights"
    ]
    for row in rows:
        minutes = "-" if row["minutes"] is None else f"{row['minutes']:.0f}"
        lines.append(
            f"{row['recipe']:22}{row['data']:26}{row['recall@1']:7.2f}  {row['source']:14}{row['steps']:>10,}"
            f"{row['images']:>12,}{minutes:>9}  {row['weights']}"
        )
    lines += [
        "minutes: at least, on one H100, by the measured speed of a compiled step; -: not measured for this backbone.",
        "Each also needs its data set, and the weights, as a file (--model.weights) where there is no internet.",
        "Reached here: none of these yet, since we had none of the data sets. What we have reached on other data:",
        *(f"  {name}: recall@1 of {recall} on {data}" for name, (recall, data) in REACHED.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse, train, evaluate, compare."""
    arguments = sys.argv[1:]
    if "--list" in arguments:
        rows = needs()
        show_results(list_of_needs(rows), {"recipes": rows})
        return
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

"""Runs a study with Ray Tune: each trial is an ordinary training and a child of the study's MLflow run."""

import dataclasses
import json
import os
import signal
import statistics
import time
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray import tune

from nsl_dist import cluster, storage
from nsl_dist.ablation.studies import STUDIES, Study
from nsl_dist.ablation.summary import Outcome, draw, summarise
from nsl_dist.config import Kind, TrainConfig, flatten
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import open_data, synthetic_data
from nsl_dist.progress import duration, show_results
from nsl_dist.run import MLFLOW_ID_FILE, RESULTS_FILE, RunFolder, StoppedError, TrainingError
from nsl_dist.stopping import before_a_stop
from nsl_dist.tracking.tracker import Tracker, experiment_of
from nsl_dist.training.results import TrainingResults
from nsl_dist.training.train import cpus_needed, find_source, fit_batch, refuse_to_change, train

TRIALS_AT_ONCE_HERE = 2  # on a single machine: one starts or evaluates while the other trains
IDLE_SECONDS = 120  # keep idle worker processes of a local Ray, whose imports take seconds


def run_study(name: str, base: TrainConfig, *, seeds: tuple[int, ...], at_once: int | None) -> dict[str, Any]:
    """Train every setting of a study with every seed, compare them, and write table, figure and findings.

    Calling it again with the same `base.run_name` skips finished trainings and resumes interrupted ones.

    Args:
        name: key in `STUDIES`.
        base: configuration shared by all settings; `run_name` is the name of the study.
        seeds: use at least two to tell differences from chance.
        at_once: maximum number of parallel trials. None: as many as the cluster has room for, or two on one machine.

    Returns:
        The content of `results.json`.

    Raises:
        FileNotFoundError: the data does not exist.
        ValueError: configuration, data or storage is unsuitable; nothing was trained.
        StoppedError: Ctrl-C was pressed.
        TrainingError: trials failed.

    """
    if base.init_from is not None:
        raise ValueError("--init-from does not go with a study, which compares trainings from the start")
    run_name = base.run_name or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    base = dataclasses.replace(base, storage=storage.absolute(base.storage), run_name=run_name)
    first = STUDIES[name](base).arms[0].config  # first, because it validates the configuration
    folder = storage.join(base.storage, "studies", run_name)
    storage.check_writable(base.storage)
    tracker = Tracker(base.tracking.uri, storage_root=base.storage)
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(1000 * IDLE_SECONDS))
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # replace Tune's own table by `_Show`
    needed = cpus_needed(first, (base.worker_range or (1, 1))[1])
    cluster.connect(num_cpus=needed * (at_once or TRIALS_AT_ONCE_HERE), show_workers=False)
    manifest = open_data(
        find_source(base.data) or synthetic_data(base.storage),
        storage_root=base.storage,
        max_undecodable=base.data.max_undecodable,
    )
    base = fit_batch(base, manifest.split("train").sizes)  # once, so that all settings have the same batch
    experiment = experiment_of(base, manifest)
    in_shards = dataclasses.replace(
        base.data, root=manifest.root, fit_batch=False, split="classes", test_share=0.5, test_classes=None
    )
    base = dataclasses.replace(base, data=in_shards)
    _start_tracking(tracker, base, experiment, folder, study=name)
    tracking = dataclasses.replace(base.tracking, experiment=experiment, parent=tracker.run_id)
    base = dataclasses.replace(base, tracking=tracking)

    at_once = at_once or _room(base, cpus=needed)
    base = dataclasses.replace(base, threads=base.threads or max(1, (os.cpu_count() or 1) // at_once))
    study = _fitting(STUDIES[name](base), manifest.split("train").sizes)
    by_arm = _by_arm(study, seeds)
    trials = {str(config.run_name): config for _, config in by_arm}
    for config in trials.values():
        refuse_to_change(config)
    to_do = {name: config for name, config in trials.items() if not RunFolder.of(config).is_finished()}
    print(
        f"     study  {run_name}: {study.title}\n"
        f"    trials  {len(study.arms)} settings x {len(seeds)} seeds = {len(trials)}, {at_once} at a time"
        f"{f'; {len(trials) - len(to_do)} are finished' if len(to_do) < len(trials) else ''}\n"
        f"      data  {manifest.root} (digest {manifest.digest[:16]})\n"
        f"written to  {folder}\n"
        f"    MLflow  {tracker.uri}, run {tracker.run_id}",
        flush=True,
    )

    def stop() -> None:
        tracker.finish(status="KILLED")

    try:
        if to_do:
            with before_a_stop(stop, said=f"the same command with --run-name {run_name} continues"):
                _run_trials(to_do, study_folder=folder, at_once=at_once)
        outcomes = [_outcome(config, arm, tracker) for arm, config in by_arm]
        text, results = summarise(study, outcomes)
        results |= {"study": name, "config": dataclasses.asdict(base), "seeds": seeds}
        files = {"summary.md": text, "figure.svg": draw(study, outcomes), RESULTS_FILE: json.dumps(results, indent=1)}
        for path, content in files.items():
            storage.write_bytes(storage.join(folder, path), content.encode())
            tracker.log_file(path, content)
        tracker.finish(status="FINISHED")
    except BaseException as error:
        tracker.finish(status="KILLED" if isinstance(error, StoppedError) else "FAILED")
        raise
    show_results(f"\n{text}\nfigure:  {folder}/figure.svg\nresults: {folder}/{RESULTS_FILE}", results)
    return results


def _fitting(study: Study, sizes: NDArray[np.int64]) -> Study:
    """Leave out, and say so, the settings whose batches need more classes than there are."""
    arms = []
    for arm in study.arms:
        data = arm.config.data
        try:
            ClassBalancedPlan(sizes, data.batch_size, data.images_per_class, arm.config.seed)
            arms.append(arm)
        except ValueError as error:
            print(f"left out  {arm.name}: {error}", flush=True)
    return dataclasses.replace(study, arms=tuple(arms))


def _room(base: TrainConfig, *, cpus: int) -> int:
    """Return how many trials the cluster has room for. Without --num-workers, one trial takes all GPUs."""
    total_cpus, total_gpus = cluster.totals()
    room = total_cpus // cpus
    if cluster.settle_device(base.device) == "cuda":
        room = min(room, total_gpus // base.worker_range[1] if base.worker_range is not None else 1)
    return max(1, room)


def _start_tracking(tracker: Tracker, base: TrainConfig, experiment: str, folder: str, *, study: str) -> None:
    location = storage.join(folder, MLFLOW_ID_FILE)
    if storage.exists(location):
        tracker.resume(storage.read_bytes(location).decode())
        return
    tracker.start_study(experiment, name=str(base.run_name), params={"study": study} | flatten(base))
    storage.write_bytes(location, tracker.run_id.encode())


def _by_arm(study: Study, seeds: tuple[int, ...]) -> list[tuple[str, TrainConfig]]:
    return [
        (arm.name, dataclasses.replace(arm.config, seed=seed, run_name=f"{arm.config.run_name}-{arm.name}-seed-{seed}"))
        for seed in seeds  # seeds in the outer loop, so that all settings can be compared early
        for arm in study.arms
    ]


def _results_of(config: TrainConfig) -> TrainingResults:
    return TrainingResults.from_json(json.loads(storage.read_bytes(RunFolder.of(config).results)))


def _run_trials(trials: dict[str, TrainConfig], *, study_folder: str, at_once: int) -> None:
    """Run all trials. Failed ones do not stop the others.

    Raises:
        StoppedError: Ctrl-C was pressed.
        TrainingError: some trials failed.

    """
    filesystem, path = storage.resolve(storage.join(study_folder, "tune"))
    tuner = tune.Tuner(
        # The training in a trial reserves its own resources, but Tune must reserve something.
        tune.with_resources(tune.with_parameters(_trial, trials=trials), {"memory": 2**20}),
        param_space={"run_name": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["run_name"],
            trial_dirname_creator=lambda trial: trial.config["run_name"],
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_Show(trials)],
        ),
    )
    found = tuner.fit()
    left = sum(not RunFolder.of(config).is_finished() for config in trials.values())
    goes_on = f"the same command with --run-name {study_folder.rpartition('/')[2]} resumes them"
    if left > found.num_errors:
        raise StoppedError(
            signal.SIGINT, f"the study was stopped with {left} of {len(trials)} trials unfinished; {goes_on}"
        )
    if left:
        raise TrainingError(f"{left} of {len(trials)} trials failed; {goes_on}")


def _trial(params: dict[str, Any], *, trials: dict[str, TrainConfig]) -> None:
    # In a task outside Tune's placement group, because the training would have to fit into it.
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="DEFAULT")(train)
    cluster.get(task.remote(trials[params["run_name"]], of_study=True))
    tune.report({"finished": True})


class _Show(tune.Callback):
    """Prints a line for each finished trial."""

    def __init__(self, trials: dict[str, TrainConfig]) -> None:
        self._trials = trials
        self._started = time.monotonic()
        self._num_done = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        """Print the result and the estimated time left."""
        self._num_done += 1
        name = trial.config["run_name"]
        recall_at_1 = _recall_at_1(_results_of(self._trials[name]))
        recall = ", ".join(f"{kind} {share:.1f}" for kind, share in recall_at_1.items())
        each = (time.monotonic() - self._started) / self._num_done
        left = duration(each * (len(self._trials) - self._num_done))
        print(f"{self._num_done}/{len(self._trials)}  {name}: recall@1 {recall}; {left} left", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        """Print the file in which Tune has saved the stack trace."""
        self._num_done += 1
        print(f"{trial.config['run_name']} failed: see {trial.error_file}", flush=True)


def _recall_at_1(results: TrainingResults) -> dict[Kind, float]:
    """Return recall@1 in % by kind of embeddings."""
    return {kind: 100 * by_k[1] for kind, by_k in results.evaluation.recall.items()}


def _outcome(config: TrainConfig, arm: str, tracker: Tracker) -> Outcome:
    results = _results_of(config)
    history = tracker.history(["loss", "recall_at_1_float"], run_id=results.mlflow_run_id)
    optim, num_steps = config.optim, results.steps
    steps_per_epoch = num_steps / (optim.epochs + optim.new_layers_epochs)
    losses = history.get("loss", [])
    by_epoch: dict[int, list[float]] = {}
    for step, loss in losses:
        by_epoch.setdefault(int((step - 1) // steps_per_epoch) + 1, []).append(loss)
    last = [loss for step, loss in losses if step > 0.9 * num_steps]
    return Outcome(
        arm=arm,
        seed=config.seed,
        run_name=str(config.run_name),
        recall=_recall_at_1(results),
        loss=statistics.mean(last) if last else None,
        seconds=results.seconds["train"] + results.seconds["evaluate"],
        history={
            "loss": [(epoch, statistics.mean(each)) for epoch, each in by_epoch.items()],
            "recall": [(step / steps_per_epoch, 100 * share) for step, share in history.get("recall_at_1_float", [])],
        },
    )

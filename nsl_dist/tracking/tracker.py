"""A run in MLflow. The driver owns it; workers send it their records."""

import json
import logging
import os
import time
from collections import deque
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID

from nsl_dist import storage
from nsl_dist.config import EvaluateConfig, TrainConfig, flatten
from nsl_dist.run import CheckpointRecord, unsent_file

if TYPE_CHECKING:
    from nsl_dist.data.shards import Manifest

# Packages whose versions are tags; faiss comes from any of three.
PACKAGES = ("torch", "torchvision", "ray", "faiss-gpu", "faiss-gpu-cu12", "faiss-cpu", "pyarrow", "mlflow")
MLFLOW_PATIENCE = 300.0  # seconds that the end of a run waits for it
SECONDS_BETWEEN_TRIES = 10.0


def installed_versions() -> dict[str, str]:
    """Return the version of each of `PACKAGES` that is installed."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


class Tracker:
    """MLflow, and one run in it: parameters at its start, metrics by global step, files at its end.

    What it cannot be told while it is away is kept, in memory and in a file of the storage, and sent when it is back.

    Attributes:
        run_id: MLflow's, once `start` was called.
        uri: MLflow's, without credentials.

    """

    def __init__(self, uri: str | None, *, storage_root: str, may_be_away: bool = False) -> None:
        """Connect; the first time, MLflow sets its database up for seconds.

        Args:
            uri: MLflow server or database; None: that of MLFLOW_TRACKING_URI, else a SQLite database in `storage_root`,
                or where that is remote in the user's own folder.
            storage_root: folder or URI of the runs.
            may_be_away: for a run that goes on, which need not wait for it.

        Raises:
            ValueError: the tracking URI cannot be used, or one that is not from the environment holds a password.

        """
        if uri is not None:
            storage.refuse_password(uri, instead="the environment, as that of MLFLOW_TRACKING_URI")
        self.run_id = ""
        self._storage_root = storage_root
        self._unsent: deque[dict[str, Any]] = deque()
        self._is_kept = False  # whether there is a file
        self._away = False
        self._try_again_at = 0.0
        self._last_steps: dict[str, int] = {}  # of metrics that are logged once, by the first of their record
        # MLflow's own retries would hold progress up for minutes; what fails is kept and sent later.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # it warns at length of a machine without git
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of each step of a new database
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        local_root = storage.absolute("~/nsl_dist" if "://" in storage_root else storage_root)
        self._artifacts = None if uri and uri.startswith("http") else storage.join(local_root, "mlartifacts")
        uri = uri or f"sqlite:///{local_root}/mlflow.db"
        self._tracking_uri = uri
        self.uri = storage.without_password(uri)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            if not may_be_away:
                self._client.search_experiments(max_results=1)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            cause = storage.without_password(str(error))
            raise ValueError(f"the tracking URI {self.uri} cannot be used: {cause}") from None

    def add_to(self, run_id: str) -> None:
        """Log into a run that is there, whatever its status, and send first what was kept for it.

        Raises:
            ValueError: MLflow does not know it.

        """
        with suppress(mlflow.exceptions.MlflowException):  # it is away, as the first record will find
            self.find(run_id)
        self.run_id = run_id
        kept = unsent_file(self._storage_root, run_id)
        if storage.exists(kept):
            self._unsent.extend(json.loads(storage.read_bytes(kept)))
            self._is_kept = True
            num_kept = len(self._unsent)
            self._send_all()
            if not self._unsent:
                print(f"MLflow {self.uri} has got the {num_kept} records that it had missed", flush=True)

    def resume(self, run_id: str) -> None:
        """Go on with a run: as `add_to`, and it is running again."""
        self.add_to(run_id)
        self._send({"status": "RUNNING"})

    def start(self, config: TrainConfig, manifest: "Manifest", *, cluster: str, git_commit: str | None) -> None:
        """Create the run of a training: its configuration as parameters, data set, and tags of where it runs.

        Args:
            config: of the run.
            manifest: of its data.
            cluster: in words.
            git_commit: of the code, where git cannot be asked; None: it can, or nobody knows.

        Raises:
            ValueError: MLflow does not know the parent.

        """
        experiment_id = self._experiment(config.tracking.experiment or manifest.layout)
        tags = {"cluster": cluster} | {f"version.{name}": number for name, number in installed_versions().items()}
        if git_commit is not None:
            tags[MLFLOW_GIT_COMMIT] = git_commit
        if config.tracking.parent is not None:
            self.find(config.tracking.parent)
            tags[MLFLOW_PARENT_RUN_ID] = config.tracking.parent
        self._create_run(experiment_id, str(config.run_name), tags, manifest, context="training")
        self._log_params(flatten(config) | {"data.digest": manifest.digest})

    def start_study(self, experiment: str, *, name: str, params: dict[str, Any]) -> None:
        """Create the run that trainings are children of."""
        run = self._client.create_run(self._experiment(experiment), run_name=name, tags=resolve_tags())
        self.run_id = run.info.run_id
        self._log_params(params)

    def start_evaluation(self, config: EvaluateConfig, manifest: "Manifest", *, parent: str, name: str) -> None:
        """Create the run of an evaluation of its own, as a child of that of the training, and in its experiment.

        Args:
            config: of the evaluation.
            manifest: of its data.
            parent: MLflow's id of the training's run.
            name: of the new run.

        Raises:
            ValueError: MLflow does not know the parent.

        """
        experiment_id = self.find(parent).info.experiment_id
        self._create_run(experiment_id, name, {MLFLOW_PARENT_RUN_ID: parent}, manifest, context="evaluation")
        self._log_params(flatten(config) | {"data.digest": manifest.digest})

    def find(self, run_id: str) -> Run:
        """Return a run.

        Raises:
            ValueError: MLflow does not know it.
            mlflow.exceptions.MlflowException: MLflow is away.

        """
        try:
            return self._client.get_run(run_id)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ValueError(
                f"{self.uri} has no MLflow run {run_id} ({error}); give the storage or tracking URI of its training"
            ) from error

    def _experiment(self, name: str) -> str:
        """Return the id of an experiment, which is made if it is new."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=self._artifacts))

    def _create_run(
        self, experiment_id: str, name: str, tags: dict[str, str], manifest: "Manifest", *, context: str
    ) -> None:
        run = self._client.create_run(experiment_id, run_name=name, tags=resolve_tags() | tags)
        self.run_id = run.info.run_id
        data = Dataset(
            name=manifest.layout,
            digest=manifest.digest[:36],  # MLflow keeps no more
            source_type="shards",
            source=json.dumps({"root": manifest.root, "source": manifest.source}),
            profile=json.dumps(manifest.splits),
        )
        self._client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def _log_params(self, params: dict[str, Any]) -> None:
        self._client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in params.items()])

    def log(self, metrics: dict[str, float], *, step: int, once: bool = False) -> None:
        """Log metrics at a global step, now or when MLflow can be reached again.

        Args:
            metrics: by name.
            step: iterations before them.
            once: leave them out where the run has the first of them at this step or a later one: steps that are done
                again after a failure.

        """
        self._send({"metrics": metrics, "timestamp": int(time.time() * 1000), "step": step, "once": once})

    def log_file(self, name: str, content: str) -> None:
        """Log a text as an artifact, now or when MLflow can be reached again."""
        self._send({"file": name, "content": content})

    def register(self, checkpoint: str, *, name: str) -> str:
        """Register the model of a checkpoint as the newest version of `name`; return the URI to load it by.

        Raises:
            ValueError: MLflow is away, or refuses it.

        """
        from nsl_dist.tracking.models import register  # imports torch

        step = CheckpointRecord.read(checkpoint).step
        try:
            number = register(checkpoint, name=name, run_id=self.run_id, step=step, tracking_uri=self._tracking_uri)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            cause = storage.without_password(str(error))
            raise ValueError(f"MLflow {self.uri} does not register {name}: {cause}") from error
        return f"models:/{name}/{number}"

    def history(self, names: list[str], *, run_id: str) -> dict[str, list[tuple[int, float]]]:
        """Return the steps and values of some metrics of a run, by step; nothing where MLflow is away.

        Args:
            names: of metrics; those that the run has not are left out.
            run_id: MLflow's.

        """
        found = {}
        try:
            for name in names:
                metrics = self._client.get_metric_history(run_id, name)
                last = {metric.step: metric.value for metric in sorted(metrics, key=lambda each: each.timestamp)}
                if last:
                    found[name] = sorted(last.items())
        except (mlflow.exceptions.MlflowException, OSError) as error:
            cause = storage.without_password(str(error))
            print(f"MLflow {self.uri} does not answer with the course of the run: {cause}", flush=True)
            return {}
        return found

    def finish(self, *, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, and `wait`."""
        self._send({"status": status})
        self.wait()

    def wait(self) -> None:
        """Wait for MLflow until it has all records, or for five minutes."""
        given_up = time.monotonic() + MLFLOW_PATIENCE
        while self._unsent and time.monotonic() < given_up:
            time.sleep(1)
            self._send_all()
        if self._unsent:
            print(
                f"MLflow {self.uri} is still away: {len(self._unsent)} of its records are kept in "
                f"{unsent_file(self._storage_root, self.run_id)}; the same command with its --run-name sends them",
                flush=True,
            )

    def _send(self, record: dict[str, Any]) -> None:
        self._unsent.append(record)
        if not self._away or time.monotonic() > self._try_again_at:
            self._send_all()
        else:
            self._keep_unsent()

    def _send_all(self) -> None:
        """Send what is unsent, in order, up to the first that fails."""
        was_away, self._away = self._away, False
        while self._unsent and not self._away:
            try:
                self._send_one(self._unsent[0])
                self._unsent.popleft()
            except (mlflow.exceptions.MlflowException, OSError) as error:
                self._away = True
                self._try_again_at = time.monotonic() + SECONDS_BETWEEN_TRIES
                if not was_away:
                    cause = storage.without_password(str(error))
                    print(f"MLflow {self.uri} does not answer; its records are sent later: {cause}", flush=True)
            except Exception:
                self._unsent.popleft()  # it can never be sent, and must not hold up those after it
                raise
        if was_away and not self._away:
            print(f"MLflow {self.uri} answers again and has all records", flush=True)
        self._keep_unsent()

    def _send_one(self, record: dict[str, Any]) -> None:
        if "metrics" in record:
            timestamp, step, first = record["timestamp"], record["step"], next(iter(record["metrics"]))
            if record["once"] and step <= self._last_step_of(first):
                return
            metrics = [Metric(name, value, timestamp, step) for name, value in record["metrics"].items()]
            self._client.log_batch(self.run_id, metrics=metrics)
            if record["once"]:
                self._last_steps[first] = step
        elif "file" in record:
            self._client.log_text(self.run_id, record["content"], record["file"])
        elif record["status"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, record["status"])

    def _last_step_of(self, name: str) -> int:
        """Return the last step at which a metric was logged."""
        if name not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, name)
            self._last_steps[name] = max((metric.step for metric in history), default=0)
        return self._last_steps[name]

    def _keep_unsent(self) -> None:
        """Keep what is unsent in a file too, for a driver that is lost or gives up waiting."""
        location = unsent_file(self._storage_root, self.run_id)
        try:
            if self._unsent:
                storage.write_bytes(location, json.dumps(list(self._unsent)).encode())
                self._is_kept = True
            elif self._is_kept:
                storage.delete(location)
                self._is_kept = False
        except OSError as error:
            print(f"{location} cannot be written: {error}", flush=True)

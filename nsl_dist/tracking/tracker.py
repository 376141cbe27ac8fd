"""An MLflow run. It belongs to the driver, which logs on behalf of the workers."""

import json
import logging
import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from nsl_dist import storage
from nsl_dist.config import EvaluateConfig, TrainConfig, flatten
from nsl_dist.run import CheckpointRecord, unsent_file

if TYPE_CHECKING:
    from nsl_dist.data.shards import Manifest

# Packages whose versions are logged as tags; faiss comes from any of three.
PACKAGES = ("torch", "torchvision", "ray", "faiss-gpu", "faiss-gpu-cu12", "faiss-cpu", "pyarrow", "mlflow")
MLFLOW_PATIENCE = 300.0  # seconds to wait for MLflow at the end of a run
SECONDS_BETWEEN_TRIES = 10.0
PAGES = "http://127.0.0.1:5000"  # of `mlflow ui`
# The page of an experiment is for the development of models, not of agents; MLflow 3.17 forgets it.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def experiment_of(config: TrainConfig, manifest: "Manifest") -> str:
    """Return the name of a run's experiment."""
    by_default = "synthetic products" if config.data.root is None else manifest.name
    return config.tracking.experiment or by_default


def installed_versions() -> dict[str, str]:
    """Return the version of each of `PACKAGES` that is installed."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


class Tracker:
    """Client for one MLflow run: parameters at the start, metrics by global step, files at the end.

    While MLflow is unavailable, records are kept in memory and in a file in the storage, and sent later.

    Attributes:
        run_id: id of the MLflow run once it was started or resumed.
        uri: MLflow server or database, without credentials.

    """

    def __init__(self, uri: str | None, *, storage_root: str, may_be_away: bool = False) -> None:
        """Connect. The first time, MLflow takes seconds to set up its database.

        Args:
            uri: MLflow server or database. None: MLFLOW_TRACKING_URI if set, else a SQLite database in `storage_root`,
                or in ~/nsl_dist if that is remote.
            storage_root: folder or URI of the runs.
            may_be_away: do not fail if MLflow is unavailable, because a resumed run can continue without it.

        Raises:
            ValueError: the tracking URI cannot be used, or contains a password and is not from the environment.

        """
        if uri is not None:
            storage.refuse_password(uri, instead="the environment, as that of MLFLOW_TRACKING_URI")
        self.run_id = ""
        self._storage_root = storage_root
        self._sending = threading.RLock()
        self._unsent: deque[dict[str, Any]] = deque()
        self._is_kept = False  # whether the file of unsent records exists
        self._away = False
        self._try_again_at = 0.0
        self._last_steps: dict[str, int] = {}  # for `once`, by the first metric of a record
        # MLflow's own retries would block for minutes; failed records are sent later anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # suppress its long warning on machines without git
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it logs each step of a new database
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
        """Log into an existing run, whatever its status, after sending the records that were kept for it.

        Raises:
            ValueError: the run does not exist.

        """
        with suppress(mlflow.exceptions.MlflowException):  # unavailable; the first record will report it
            self.find(run_id)
        self.run_id = run_id
        kept = unsent_file(self._storage_root, run_id)
        if storage.exists(kept):
            self._unsent.extend(json.loads(storage.read_bytes(kept)))
            self._is_kept = True
            num_kept = len(self._unsent)
            self._send_all()
            if not self._unsent:
                print(f"MLflow {self.uri}: sent the {num_kept} records that it had missed", flush=True)

    def where_to_look(self) -> str:
        """Return the address of the run's page, after the command that starts MLflow if it has no server."""
        try:
            experiment_id = self.find(self.run_id).info.experiment_id
        except mlflow.exceptions.MlflowException:  # unavailable
            return self.uri
        server = self.uri if self.uri.startswith("http") else PAGES
        # Else the page opens in the mode for agents, whatever the experiment's tag says.
        page = f"{server}/#/experiments/{experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        if server == self.uri:
            return page
        return f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {self.uri}\n         {page}"

    def resume(self, run_id: str) -> None:
        """Resume a run: like `add_to`, and set its status to RUNNING."""
        self.add_to(run_id)
        self._send({"status": "RUNNING"})

    def note(self, text: str) -> None:
        """Put a paragraph of Markdown above the run's description, now or when MLflow is available again."""
        self._send({"note": text})

    def start(self, config: TrainConfig, manifest: "Manifest", *, cluster: str, git_commit: str | None) -> None:
        """Create the run of a training, with its configuration, data set and environment.

        Args:
            config: logged as parameters.
            manifest: manifest of the data set.
            cluster: description of the cluster.
            git_commit: commit of the code; None to let MLflow ask git.

        Raises:
            ValueError: the parent run does not exist.

        """
        experiment_id = self._experiment(experiment_of(config, manifest))
        tags = {"cluster": cluster} | {f"version.{name}": number for name, number in installed_versions().items()}
        if git_commit is not None:
            tags[MLFLOW_GIT_COMMIT] = git_commit
        if config.tracking.parent is not None:
            self.find(config.tracking.parent)
            tags[MLFLOW_PARENT_RUN_ID] = config.tracking.parent
        self._create_run(experiment_id, str(config.run_name), tags, manifest, context="training")
        self._log_params(flatten(config) | {"data.digest": manifest.digest})

    def start_study(self, experiment: str, *, name: str, params: dict[str, Any]) -> None:
        """Create the parent run of a study."""
        run = self._client.create_run(self._experiment(experiment), run_name=name, tags=resolve_tags())
        self.run_id = run.info.run_id
        self._log_params(params)

    def start_evaluation(self, config: EvaluateConfig, manifest: "Manifest", *, parent: str, name: str) -> None:
        """Create the run of a standalone evaluation as a child of the training's run `parent`.

        Raises:
            ValueError: the parent run does not exist.

        """
        experiment_id = self.find(parent).info.experiment_id
        self._create_run(experiment_id, name, {MLFLOW_PARENT_RUN_ID: parent}, manifest, context="evaluation")
        self._log_params(flatten(config) | {"data.digest": manifest.digest})

    def find(self, run_id: str) -> Run:
        """Return a run.

        Raises:
            ValueError: the run does not exist.
            mlflow.exceptions.MlflowException: MLflow is unavailable.

        """
        try:
            return self._client.get_run(run_id)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ValueError(
                f"{self.uri} has no MLflow run {run_id} ({error}); give the tracking URI of its training, or --no-track"
            ) from error

    def _experiment(self, name: str) -> str:
        """Return the id of an experiment, creating it if necessary."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=self._artifacts, tags=EXPERIMENT_TAGS))
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by a run that started at the same time
                raise
            return self._experiment(name)

    def _create_run(
        self, experiment_id: str, name: str, tags: dict[str, str], manifest: "Manifest", *, context: str
    ) -> None:
        run = self._client.create_run(experiment_id, run_name=name, tags=resolve_tags() | tags)
        self.run_id = run.info.run_id
        data = Dataset(
            name=manifest.name,
            digest=manifest.digest[:36],  # MLflow's limit
            source_type="shards",
            source=json.dumps({"root": manifest.root, "source": manifest.source}),
            profile=json.dumps(manifest.splits),
        )
        inputs = [DatasetInput(data, [InputTag("mlflow.data.context", context)])]
        try:
            self._client.log_inputs(self.run_id, inputs)
        except mlflow.exceptions.MlflowException as error:
            # MLflow looks for the data set, then inserts it: of two trials that start together, one finds it taken.
            if "unique" not in str(error).lower():
                raise
            self._client.log_inputs(self.run_id, inputs)

    def _log_params(self, params: dict[str, Any]) -> None:
        self._client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in params.items()])

    def log(self, metrics: dict[str, float], *, step: int, once: bool = False) -> None:
        """Log metrics at a global step, now or when MLflow is available again.

        Args:
            metrics: values by name.
            step: number of finished iterations.
            once: skip the metrics if the run already has the first of them at this or a later step, which happens when
                steps are repeated after a failure.

        """
        self._send({"metrics": metrics, "timestamp": int(time.time() * 1000), "step": step, "once": once})

    def log_file(self, name: str, content: str) -> None:
        """Log a text file as an artifact, now or when MLflow is available again."""
        self._send({"file": name, "content": content})

    def register(self, checkpoint: str, *, name: str) -> str:
        """Register the model of a checkpoint as the newest version of `name` and return its URI.

        Raises:
            ValueError: MLflow is unavailable or rejects the model.

        """
        from nsl_dist.tracking.models import register  # imports torch

        step = CheckpointRecord.read(checkpoint).step
        try:
            number = register(checkpoint, name=name, run_id=self.run_id, step=step, tracking_uri=self._tracking_uri)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            cause = storage.without_password(str(error))
            raise ValueError(f"MLflow {self.uri} cannot register {name}: {cause}") from error
        return f"models:/{name}/{number}"

    def history(self, names: list[str], *, run_id: str) -> dict[str, list[tuple[int, float]]]:
        """Return steps and values of the named metrics of a run; empty if MLflow is unavailable.

        Metrics that the run does not have are omitted.
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
            print(f"MLflow {self.uri} does not return the history of the run: {cause}", flush=True)
            return {}
        return found

    def finish(self, *, status: str) -> None:
        """End the run with status FINISHED, FAILED or KILLED, and `wait`."""
        self._send({"status": status})
        self.wait()

    def wait(self) -> None:
        """Wait up to five minutes until MLflow has all records."""
        given_up = time.monotonic() + MLFLOW_PATIENCE
        while self._unsent and time.monotonic() < given_up:
            time.sleep(1)
            with self._sending:
                self._send_all()
        if self._unsent:
            print(
                f"MLflow {self.uri} is still unavailable: {len(self._unsent)} of its records are kept in "
                f"{unsent_file(self._storage_root, self.run_id)}; the same command with its --run-name sends them",
                flush=True,
            )

    def _send(self, record: dict[str, Any]) -> None:
        with self._sending:  # the reporter's thread and a signal's may both have records
            self._unsent.append(record)
            if not self._away or time.monotonic() > self._try_again_at:
                self._send_all()
            else:
                self._keep_unsent()

    def _send_all(self) -> None:
        """Send unsent records in order, up to the first that fails."""
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
                    print(f"MLflow {self.uri} does not answer; its records will be sent later: {cause}", flush=True)
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
        elif "note" in record:
            before = self._client.get_run(self.run_id).data.tags.get(MLFLOW_RUN_NOTE, "")
            self._client.set_tag(self.run_id, MLFLOW_RUN_NOTE, f"{record['note']}\n\n{before}".strip())
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
        """Also keep unsent records in a file, in case the driver dies or stops waiting."""
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

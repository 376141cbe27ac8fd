"""MLflow: the one module that speaks to it. The driver owns the run; workers send it their records."""

import dataclasses
import re
import time
from typing import Any

import mlflow
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from nsl_dist import storage
from nsl_dist.config import TrainConfig

_CREDENTIALS = re.compile(r"://[^/@\s]+@")


def tracking_uri(config: TrainConfig) -> str:
    """Return the configured MLflow URI, or that of a SQLite database beside the runs."""
    if config.tracking.uri is not None:
        return config.tracking.uri
    return f"sqlite:///{_local_root(config)}/mlflow.db"


def _local_root(config: TrainConfig) -> str:
    return storage.absolute("~/nsl_dist" if "://" in config.storage else config.storage)


class TrackedRun:
    """One MLflow run: parameters at its start, metrics by global step, files at its end.

    Attributes:
        run_id: MLflow's, once `start` was called.
        uri: MLflow's, without credentials.

    """

    def __init__(self, config: TrainConfig) -> None:
        """Open the experiment; the first time, MLflow sets its database up for seconds.

        Raises:
            ValueError: the tracking URI cannot be used.

        """
        self.run_id = ""
        uri = tracking_uri(config)
        self.uri = _CREDENTIALS.sub("://***@", uri)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            experiment = self._client.get_experiment_by_name(config.tracking.experiment)
            if experiment is None:
                artifacts = None if uri.startswith("http") else storage.join(_local_root(config), "mlartifacts")
                self._experiment_id = self._client.create_experiment(
                    config.tracking.experiment, artifact_location=artifacts
                )
            else:
                self._experiment_id = experiment.experiment_id
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise ValueError(f"--tracking.uri {self.uri} cannot be used: {error}") from error

    def start(self, config: TrainConfig, *, digest: str, run_id: str | None) -> None:
        """Create a run with the configuration and the data's digest as parameters, or go on with `run_id`.

        Raises:
            ValueError: MLflow does not know `run_id`.

        """
        if run_id is not None:
            try:
                self._client.update_run(run_id, status="RUNNING")
            except mlflow.exceptions.MlflowException as error:
                raise ValueError(
                    f"run {config.run_name} was tracked elsewhere: {self.uri} has no MLflow run {run_id} ({error}); "
                    "give its --tracking.uri, or choose another --run-name"
                ) from error
            self.run_id = run_id
            return
        self.run_id = self._client.create_run(self._experiment_id, run_name=config.run_name).info.run_id
        params = {**_flatten(dataclasses.asdict(config)), "data.digest": digest}
        self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in params.items()])

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        """Log metrics at a global step."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def log_file(self, name: str, content: str) -> None:
        """Log a text as an artifact."""
        self._client.log_text(self.run_id, content, name)

    def finish(self, *, status: str) -> None:
        """End the run as FINISHED or FAILED."""
        self._client.set_terminated(self.run_id, status)


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn a nested configuration into parameters by dotted name, without the credentials that a URI may hold."""
    flat: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _CREDENTIALS.sub("://***@", str(value))
    return flat

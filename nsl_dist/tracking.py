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


class Tracker:
    """MLflow, and one run in it: parameters at its start, metrics by global step, files at its end.

    Attributes:
        run_id: MLflow's, once `start` was called.
        uri: MLflow's, without credentials.

    """

    def __init__(self, uri: str | None, *, storage_root: str) -> None:
        """Connect; the first time, MLflow sets its database up for seconds.

        Args:
            uri: MLflow server or database; None: a SQLite database in `storage_root`, or where that is remote in the
                user's own folder.
            storage_root: folder or URI of the runs.

        Raises:
            ValueError: the tracking URI cannot be used.

        """
        self.run_id = ""
        local_root = storage.absolute("~/nsl_dist" if "://" in storage_root else storage_root)
        self._artifacts = None if uri and uri.startswith("http") else storage.join(local_root, "mlartifacts")
        uri = uri or f"sqlite:///{local_root}/mlflow.db"
        self.uri = _CREDENTIALS.sub("://***@", uri)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise ValueError(f"the tracking URI {self.uri} cannot be used: {error}") from error

    def add_to(self, run_id: str) -> None:
        """Log into a run that is there, whatever its status.

        Raises:
            ValueError: MLflow does not know it.

        """
        try:
            self._client.get_run(run_id)
        except mlflow.exceptions.MlflowException as error:
            raise ValueError(
                f"{self.uri} has no MLflow run {run_id} ({error}); give the tracking URI that it was tracked with"
            ) from error
        self.run_id = run_id

    def resume(self, run_id: str) -> None:
        """Go on with a run: as `add_to`, and it is running again."""
        self.add_to(run_id)
        self._client.update_run(run_id, status="RUNNING")

    def start(self, config: TrainConfig, *, experiment: str, digest: str) -> None:
        """Create a run with the configuration and the data's digest as parameters."""
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            experiment_id = self._client.create_experiment(experiment, artifact_location=self._artifacts)
        else:
            experiment_id = found.experiment_id
        self.run_id = self._client.create_run(experiment_id, run_name=config.run_name).info.run_id
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

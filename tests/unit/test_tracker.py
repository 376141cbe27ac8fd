"""Runs in MLflow that start at the same moment."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlflow

from nsl_dist.config import TrainConfig
from nsl_dist.data.shards import Manifest
from nsl_dist.tracking.tracker import Tracker


def test_runs_that_start_together_share_their_data_set(tmp_path: Path) -> None:
    """As the trials of a study do."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    trackers = [Tracker(uri, storage_root=str(tmp_path)) for _ in range(3)]
    trackers[0].start_study("synthetic products", name="study", params={})
    barrier = Barrier(2)

    def start(turn: int, tracker: Tracker) -> str:
        data = Manifest("/data", "sop", source="/raw", digest=str(turn), splits={}, undecodable=[], shards=[])
        barrier.wait()
        tracker.start(TrainConfig(run_name=f"{turn}"), data, cluster="1 node", git_commit=None)
        return tracker.run_id

    client = mlflow.MlflowClient(uri)
    with ThreadPoolExecutor(2) as pool:
        for turn in range(8):
            run_ids = list(pool.map(start, [turn, turn], trackers[1:]))
            for run_id in run_ids:
                (logged,) = client.get_run(run_id).inputs.dataset_inputs
                assert logged.dataset.digest == str(turn)

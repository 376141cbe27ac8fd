"""What workers report is shown and tracked, whatever is wrong with one record."""

import queue
from pathlib import Path

import mlflow
import pytest

from nsl_dist.config import OptimConfig
from nsl_dist.progress import Phases
from nsl_dist.schedule import Schedule
from nsl_dist.tracking.tracker import Tracker
from nsl_dist.training.records import AttemptStarted, CheckpointWritten, Left, NodeMeasured, StepMetrics, Warned
from nsl_dist.training.reporting import Reporter

METRICS = StepMetrics(
    step=10,
    loss=2.5,
    accuracy_sampled=0.25,
    learning_rate=0.01,
    learning_rate_proxies=0.1,
    images_per_second=100.0,
    step_seconds=0.8,
    data_wait_share=0.1,
    seconds_left=70.0,
)


def test_a_record_that_fails_does_not_take_the_others_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", storage_root=str(tmp_path))
    tracker.start_study("shop", name="x", params={})
    records: queue.Queue[object] = queue.Queue()
    reporter = Reporter(records, tracker, Schedule(OptimConfig(epochs=2), 50), Phases())
    for record in (
        AttemptStarted(0, 1, None, bytes_read=0, num_left_out=0, compile_seconds=None),
        NodeMeasured({}),  # nothing to log: the tracker does not expect that
        METRICS,
        Warned(10, "worker 0 cannot write"),
        AttemptStarted(5, 2, "/x/checkpoint_000000005", bytes_read=2**20, num_left_out=3, compile_seconds=70.0),
        METRICS,  # repeated
        CheckpointWritten(10, "checkpoint_000000010", 1.0, 0.5),
        Left(10),
    ):
        records.put(record)
    reporter.close()
    assert (reporter.rates, reporter.left_at) == ([100.0, 100.0], 10)

    said = capsys.readouterr().out
    assert "step 1: training on 1 worker\n" in said
    assert "training continues on 2 workers from checkpoint_000000005, of which the first worker read 1.0 MiB" in said
    assert "without 3 classes of damaged shards" in said
    assert "of damaged shards, the model compiled in 1 min 10 s, " in said
    assert "at least 5 steps repeated" in said
    assert "step 10: worker 0 cannot write" in said
    assert said.count("warning: ") == 2  # at once and at the end
    assert said.splitlines()[-1].startswith("warning: 1 record of this run could not be shown or tracked; the first: ")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(tracker.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 2.5)]
    assert client.get_run(tracker.run_id).data.metrics["checkpoint_wait_seconds"] == 0.5
    assert "step" not in client.get_run(tracker.run_id).data.metrics

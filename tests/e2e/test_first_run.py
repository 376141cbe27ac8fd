"""What a newcomer sees of a first training: what this project has to say, and nothing of Ray's, torch's or MLflow's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import write_sop
from tests.support.local_cluster import started_local
from tests.support.processes import ROOT, user_environment

FLAGS = [
    "--num-workers=1", "--optim.epochs=2", "--data.image-size=16", "--data.batch-size=20", "--model.dim=16",
]  # fmt: skip
FOREIGN = re.compile(
    r"pid=|\(raylet|\(autoscaler|\(gcs|core_worker|\.(py|cc|cpp):\d"  # Ray's processes, and lines of code
    r"|\b(DEBUG|INFO|WARN|WARNING|ERROR)\b|Warning\b|Traceback"
    r"|^\s*(\x1b\[\d+m)?\[?\d{4}[-/]\d\d[-/]\d\d|^[IWEF]\d{4} |^\[[WE]"  # times; absl and torch
    r"|\bRay Data\b|Progress bars|auth token|Token authentication|alembic"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sop(tmp_path_factory.mktemp("raw"), {"train": [7] * 20, "test": [5] * 8})


@pytest.mark.parametrize(
    "line",
    [
        "(raylet) There are tasks with infeasible resource requests that cannot be scheduled.",
        "\x1b[36m(TrainController pid=21308)\x1b[0m hello",
        "[2026-11-26 13:45:28,382 E 18248 18248] core_worker.cc:2465: Actor with class name: 'MapWorker'",
        "2026-11-26 13:42:58,622\tWARNING authentication_token_setup.py:85 -- Token authentication is enabled",
        "2026/11/26 13:43:16 INFO mlflow.store.db.utils: Creating initial MLflow database tables...",
        "[W1126 13:00:00.000000000 socket.cpp:764] [c10d] The client socket cannot be initialized",
        "/x/torch/nn/functional.py:1: UserWarning: deprecated",
    ],
)
def test_foreign_lines_are_told_apart(line: str) -> None:
    assert FOREIGN.search(line)


@pytest.mark.slow
def test_a_first_training_prints_its_own_lines_alone(root: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "jobs/train_sop.py", f"--data.root={root}", f"--storage={tmp_path}", *FLAGS]
    done = subprocess.run(
        command, cwd=ROOT, env=user_environment(home), capture_output=True, text=True, timeout=900, check=True
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if FOREIGN.search(line)] == []
    assert any(line.startswith("step 14/14 ") for line in lines), done.stdout


@pytest.mark.slow
def test_a_first_submission_prints_its_own_lines_alone(root: Path, tmp_path: Path) -> None:
    """Between the lines of `ray job submit`."""
    with started_local(tmp_path) as local:
        status, output = local.submit(" ".join([f"--data.root={root}", f"--storage={tmp_path}", *FLAGS]))
    assert status == 0, output
    printed = re.search(r"\nRunning entrypoint for job .*\n((?:.*\n)*?)(.* -- WebSocket closed|.*SUCC cli.py)", output)
    assert printed is not None, output
    lines = printed[1].splitlines()
    assert [line for line in lines if FOREIGN.search(line)] == []
    assert any(line.startswith("step 14/14 ") for line in lines), output

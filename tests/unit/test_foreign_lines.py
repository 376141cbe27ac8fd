import pytest

from tests.support.foreign_lines import foreign_lines


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
    ours = "step 7/14  loss 3.01"
    assert foreign_lines(f"{ours}\n{line}\n{ours}") == [line]

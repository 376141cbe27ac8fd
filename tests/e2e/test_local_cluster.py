"""The cluster of cluster/local.py, whose nodes come and go, and the jobs that are submitted to it."""

import re
import subprocess
from pathlib import Path

import mlflow
import pytest

from tests.support.foreign_lines import foreign_lines
from tests.support.local_cluster import LocalCluster
from tests.support.processes import BIN, ROOT, listening_addresses, run, wait_until
from tests.support.trained_run import SMALL

pytestmark = pytest.mark.slow


def test_a_job_gets_the_nodes_that_it_needs(local: LocalCluster, raw: Path, tmp_path: Path) -> None:
    """Submitted to a cluster without nodes, which start for it and leave again."""
    wait_until(lambda: local.node_counts()[-1:] in ([], [0]), why=local.log.read_text)
    flags = [f"--data.root={raw}", f"--storage={tmp_path}", "--run-name=first", "--num-workers=2", *SMALL]
    flags += ["--optim.epochs=1", "--eval.every=1"]
    status, output = local.submit(" ".join(flags))
    assert status == 0, output
    for text in (
        "cluster  0 CPUs and 0 GPUs on 1 node; "
        "this takes 2 x training (1 CPU), 1 x reading (1 CPU), 1 x evaluation in mid-run (1 CPU)",
        "step 7/7",
        f"results: {tmp_path}/runs/first/results.json",
    ):
        assert text in output
    printed = re.search(r"\nRunning entrypoint for job .*\n((?:.*\n)*?)(.* -- WebSocket closed|.*SUCC cli.py)", output)
    assert printed is not None, output  # the job's own lines, between those of `ray job submit`
    assert foreign_lines(printed[1]) == []
    wait_until(lambda: local.node_counts()[-1] == 0, why=local.log.read_text)
    assert max(local.node_counts()) == 2
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name(raw.name).experiment_id])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert tracked.data.tags["mlflow.source.git.commit"] == commit
    assert re.fullmatch(r"\d+ CPUs and 0 GPUs on \d+ nodes?", tracked.data.tags["cluster"])  # idle ones go meanwhile


def test_a_job_that_no_node_has_room_for_is_refused(local: LocalCluster, raw: Path, tmp_path: Path) -> None:
    status, output = local.submit(f"--data.root={raw} --storage={tmp_path} --num-workers=20 --data.batch-size=20")
    assert status != 0
    message = r"error: the cluster has \d CPUs and 0 GPUs on \d nodes? and can add no nodes for 20 x training \(1 CPU\)"
    assert re.search(message, output), output
    assert "Traceback" not in output
    assert not (tmp_path / "shards").exists()


def test_a_job_that_is_stopped_has_time_to_write_a_checkpoint(local: LocalCluster) -> None:
    """Ray kills it after 3 seconds, where it is not told otherwise."""
    job = (
        "import signal, time\n"
        "def leave(*_):\n"
        "    time.sleep(8)\n"
        "    raise SystemExit(print('left in order', flush=True))\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('it runs', flush=True)\n"
        "time.sleep(480)\n"
    )
    with local.submitted("stopped", ["python", "-c", job]) as log:
        wait_until(lambda: "\nit runs" in log.read_text(), why=log.read_text)
        status, output = local.ray("job", "stop", "stopped")
    assert (status, "was stopped" in output) == (0, True), output
    _, output = local.ray("job", "logs", "stopped")
    assert "\nleft in order" in output, output


def test_a_submission_without_the_token_is_refused(local: LocalCluster) -> None:
    submit = [str(BIN / "ray"), "job", "submit", "--address", local.address, "--", "python", "-c", "print(6 * 7)"]
    for mode in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}):
        status, output = run(submit, local.environment | mode)
        assert status != 0
        assert re.search(r"Unauthorized|Forbidden", output), output
        assert "submitted successfully" not in output
    status, output = run(submit, local.environment | {"RAY_AUTH_MODE": "token"})
    assert (status, "42" in output) == (0, True), output


def test_a_cluster_without_jobs_listens_on_loopback_alone(local: LocalCluster) -> None:
    addresses = listening_addresses(of_session_below=local.process.pid)
    assert len(addresses) > 5
    loopback = re.compile(r"(0{16}FFFF0000)?[0-9A-F]{6}7F:|0{24}01000000:")  # 127.0.0.0/8, also as IPv6, and ::1
    assert not [address for address in addresses if not loopback.match(address)], addresses

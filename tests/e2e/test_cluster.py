"""Clusters as their users launch them, and the jobs that they submit."""

import getpass
import http.server
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_tasks

from nsl_dist import cluster
from nsl_dist.config import DataConfig, EvalConfig
from nsl_dist.data import stream
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import open_data
from nsl_dist.data.stream import planned_batches
from nsl_dist.ray_internals import draining_nodes
from nsl_dist.retrieval import sharded_search as search
from tests.conftest import write_sop
from tests.e2e.local_cluster import (
    BIN,
    ROOT,
    LocalCluster,
    free_ports,
    listens,
    run,
    started_local,
    user_environment,
    wait_until,
)
from tests.e2e.test_search import DIM, NUM, brute_force, tied, write

SSHD = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
SMALL = "--data.image-size=16 --model.dim=16 --tracking.every=2"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sop(tmp_path_factory.mktemp("raw"), {"train": [7] * 20, "test": [5] * 8})


@pytest.mark.usefixtures("cluster")
def test_a_busy_cluster_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    cpus, _ = cluster.totals()

    @ray.remote(num_cpus=cpus)
    def busy(seconds: float) -> None:
        time.sleep(seconds)

    def started(seconds: float) -> ray.ObjectRef:
        reference = busy.remote(seconds)
        wait_until(lambda: not ray.available_resources().get("CPU"), seconds=30, why=lambda: "it does not begin")
        return reference

    everything = {"training": (cpus, {"CPU": 1.0})}
    reference = started(60)
    with pytest.raises(ValueError, match=rf"without room for {cpus} x training \(1 CPU\), after 0.05 min .* add nodes"):
        cluster.wait_for(everything, minutes=0.05, fix="add nodes")
    ray.cancel(reference, force=True)
    wait_until(lambda: ray.available_resources().get("CPU") == cpus, seconds=30, why=lambda: "it does not end")
    running = started(4)
    cluster.wait_for(everything, minutes=1, fix="add nodes")
    assert ray.get(running, timeout=0.1) is None  # not before it had ended
    assert re.search(r"nodes are there after \d+ s: \d+ CPUs and 0 GPUs on 1 node\n", capsys.readouterr().out)


def test_notice_of_the_spot_market_drains_the_node() -> None:
    noticed, asked = threading.Event(), threading.Event()

    class Metadata(http.server.BaseHTTPRequestHandler):
        """What both clouds tell their machines."""

        def do_PUT(self) -> None:
            assert self.path == "/latest/api/token"
            assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self._answer(200, b"let me in")

        def do_GET(self) -> None:
            asked.set()
            if self.path == "/latest/meta-data/spot/instance-action":
                assert self.headers["X-aws-ec2-metadata-token"] == "let me in"
                self._answer(200 if noticed.is_set() else 404, b'{"action": "terminate"}' if noticed.is_set() else b"")
            else:
                assert self.path == "/computeMetadata/v1/instance/preempted"
                assert self.headers["Metadata-Flavor"] == "Google"
                self._answer(200, b"TRUE" if noticed.is_set() else b"FALSE")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    @ray.remote
    def work() -> None:
        time.sleep(120)  # an idle node would leave at once

    ray.shutdown()  # that of other tests, which go on
    ray.init(address="local", num_cpus=1)
    working = work.remote()
    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "METADATA": f"http://127.0.0.1:{server.server_port}",
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    try:
        for cloud, seconds_left in (("aws", 110), ("gcp", 25)):
            before = draining_nodes()
            noticed.clear()
            asked.clear()
            watch = subprocess.Popen([ROOT / "cluster" / "spot_notice.sh", cloud], env=environment)
            try:
                assert asked.wait(20)
                time.sleep(3)  # it has asked once more
                assert watch.poll() is None
                assert draining_nodes() == before
                noticed.set()
                assert watch.wait(60) == 0
            finally:
                watch.kill()
            left = draining_nodes()[ray.get_runtime_context().get_node_id()] / 1000 - time.time()
            assert seconds_left - 20 < left <= seconds_left
    finally:
        server.shutdown()
        ray.cancel(working, force=True)
        ray.shutdown()


def test_decoding_keeps_to_nodes_without_gpus_while_they_have_room(raw: Path, tmp_path: Path, monkeypatch) -> None:
    ray.shutdown()  # that of other tests
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1)  # a task for each batch
    dashboard, agent = free_ports(2)
    nodes = Cluster()
    nodes.add_node(num_cpus=0, include_dashboard=True, dashboard_port=dashboard, dashboard_agent_listen_port=agent)
    kinds = {
        nodes.add_node(num_cpus=4, num_gpus=2).node_id: "gpu",
        (data_node := nodes.add_node(num_cpus=5).node_id): "data",  # room for more than the 8 tasks
    }
    ray.init(address=nodes.address)
    try:
        manifest = open_data(str(raw), layout="sop", storage_root=str(tmp_path), max_undecodable=0)
        split, config = manifest.split("train"), DataConfig(batch_size=20, image_size=16)
        plan = ClassBalancedPlan(split.sizes, config.batch_size, config.images_per_class, 0)

        def decode_somewhere(*, tasks_in_all: int) -> Counter[str]:
            (batches,) = planned_batches(plan, split, config, first_step=0, last_step=8, world_size=1)
            assert sum(len(batch["image"]) for batch in batches.iter_batches(batch_size=20)) == 160
            decoding: list[Any] = [("name", "=", "MapBatches(make_block)"), ("state", "=", "FINISHED")]

            def tasks() -> list[Any]:
                return list_tasks(address=f"http://127.0.0.1:{dashboard}", filters=decoding, detail=True)

            wait_until(lambda: len(tasks()) == tasks_in_all, seconds=20, why=lambda: str(tasks()))
            return Counter(kinds[task.node_id] for task in tasks())

        assert decode_somewhere(tasks_in_all=8) == {"data": 8}

        @ray.remote(num_cpus=5, scheduling_strategy=NodeAffinitySchedulingStrategy(data_node, soft=False))
        def other_work() -> None:
            time.sleep(120)

        working = other_work.remote()
        wait_until(lambda: ray.available_resources()["CPU"] == 4, seconds=30, why=lambda: "the other work")
        assert decode_somewhere(tasks_in_all=16) == {"data": 8, "gpu": 8}
        ray.cancel(working, force=True)
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_a_node_that_goes_as_a_search_comes_is_a_node_less(tmp_path: Path, monkeypatch) -> None:
    ray.shutdown()  # that of other tests
    nodes = Cluster()
    nodes.add_node(num_cpus=0)
    workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
    start_shards, num_shards = search._start_shards, []

    def place_of(_: search.GalleryShard) -> tuple[str, int]:
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def lose_a_node(*arguments: Any, **settings: Any) -> tuple[list[Any], list[int], set[str]]:
        started = start_shards(*arguments, **settings)
        if not num_shards:
            process_on = dict(ray.get([shard.__ray_call__.remote(place_of) for shard in started[0]]))
            assert process_on.keys() == {worker.node_id for worker in workers}
            nodes.remove_node(workers[0], allow_graceful=False)
            os.kill(process_on[workers[0].node_id], signal.SIGKILL)
            wait_until(lambda: len(cluster.live_nodes()) == 2, seconds=60, why=lambda: str(ray.nodes()))
        num_shards.append(len(started[0]))
        return started

    monkeypatch.setattr(search, "_start_shards", lose_a_node)
    ray.init(address=nodes.address)
    wait_until(lambda: ray.available_resources().get("CPU") == 2, seconds=30, why=lambda: "the nodes")
    try:
        vectors = tied(NUM, DIM, np.random.default_rng(0))
        embeddings = write(tmp_path, vectors)
        with search.open_gallery(embeddings, ("float",), EvalConfig(), k=10, num_gpus=0) as gallery:
            (found,) = search.search(embeddings, gallery, "float", lambda _, ids: ids, k=10, blocks=[range(NUM)])
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert num_shards == [2, 1]
    np.testing.assert_array_equal(found, brute_force(vectors, vectors, 10, kind="float", own=True))


@dataclass(frozen=True)
class SSHMachine:
    """This machine as one that is reached by SSH, with a home of its own on either side."""

    environment: dict[str, str]
    key: Path


@pytest.fixture
def ssh_machine(tmp_path: Path) -> Iterator[SSHMachine]:
    if SSHD is None or shutil.which("rsync") is None:
        pytest.skip("no OpenSSH server or rsync: install openssh-server and rsync")
    ray.shutdown()  # that of other tests
    if subprocess.run(["pgrep", "-x", "raylet"], capture_output=True).returncode == 0:
        pytest.skip("another Ray runs on this machine, which `ray down` would end too")
    (port,) = free_ports(1)
    remote, user, shims = (tmp_path / name for name in ("remote", "user", "shims"))
    for each in (remote, user, shims):
        each.mkdir()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/host_key\nPidFile {tmp_path}/sshd.pid\nUsePAM no\n"
        f"AuthorizedKeysFile {tmp_path}/key.pub\nPasswordAuthentication no\nStrictModes no\nPermitRootLogin yes\n"
        f"SetEnv HOME={remote}\nSubsystem sftp internal-sftp\n"
    )
    (remote / ".bashrc").write_text(
        f"export PATH={BIN}:$PATH RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_worker_niceness=0\n"
    )
    (shims / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -p {port} "$@"\n')  # Ray knows port 22 alone
    (shims / "ssh").chmod(0o755)
    os.makedirs("/run/sshd", exist_ok=True)  # which Debian's makes at boot
    with (tmp_path / "sshd.log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", tmp_path / "sshd_config"], stdout=log, stderr=log)
    try:
        wait_until(lambda: listens(port), seconds=20, why=(tmp_path / "sshd.log").read_text)
        environment = user_environment(user)
        environment["PATH"] = f"{shims}:{environment['PATH']}"
        yield SSHMachine(environment | {"RAY_AUTH_MODE": "token"}, tmp_path / "key")
    finally:
        server.terminate()
        server.wait(20)


def test_ray_up_submit_down(ssh_machine: SSHMachine, raw: Path, tmp_path: Path) -> None:
    dashboard, agent = free_ports(2)
    ray_command, environment = str(BIN / "ray"), ssh_machine.environment
    status, output = run([ray_command, "get-auth-token", "--generate"], environment)
    assert status == 0, output
    words = {
        "USER": getpass.getuser(), "KEY": ssh_machine.key, "TOKEN": Path(environment["HOME"], ".ray", "auth_token"),
        "DASHBOARD": dashboard, "AGENT": agent,
    }  # fmt: skip
    text = (ROOT / "tests" / "e2e" / "ssh_cluster.yaml").read_text()
    file = tmp_path / "cluster.yaml"
    file.write_text(re.sub("|".join(words), lambda word: str(words[word[0]]), text))
    try:
        status, output = run([ray_command, "up", "--yes", "--no-config-cache", str(file)], environment)
        assert status == 0, output
        wait_until(lambda: listens(dashboard) and listens(agent), seconds=60, why=lambda: output)
        address = f"http://127.0.0.1:{dashboard}"
        arguments = (
            f"--data.root={raw} --storage={tmp_path} --run-name=ssh --data.batch-size=20 --optim.epochs=2 {SMALL}"
        )
        status, output = run(["make", "submit", f"ADDRESS={address}", f"ARGS={arguments}"], environment)
        assert status == 0, output
        assert (tmp_path / "runs" / "ssh" / "results.json").exists()
    finally:
        status, output = run([ray_command, "down", "--yes", str(file)], environment)
    assert status == 0, output
    wait_until(lambda: not listens(dashboard), seconds=30, why=lambda: output)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started_local(tmp_path_factory.mktemp("home")) as started:
        yield started


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
        wait_until(lambda: "\nit runs" in log.read_text(), seconds=120, why=log.read_text)
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


def listening_addresses(*, of_session_below: int) -> set[str]:
    """Return addresses and ports, as the kernel writes them, on which the sessions of a process's children listen."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        stats[int(path.parent.name)] = (int(fields[1]), int(fields[3]))  # parent, session
    sessions = {session for parent, session in stats.values() if parent == of_session_below}
    inodes = set()
    for process in (process for process, (_, session) in stats.items() if session in sessions):
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except OSError:  # it was closed
                continue
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {line[1] for line in lines if line[3] == "0A" and line[9] in inodes}

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
from concurrent.futures import ThreadPoolExecutor
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
from nsl_dist.data.shards import find_data, load_manifest, open_data
from nsl_dist.data.stream import planned_batches
from nsl_dist.ray_internals import draining_nodes
from nsl_dist.retrieval import sharded_search as search
from nsl_dist.retrieval.gallery_shard import GalleryShard
from tests.support.processes import (
    BIN,
    PATIENCE,
    ROOT,
    free_ports,
    listens,
    run,
    user_environment,
    wait_until,
)
from tests.support.vectors import DIM, NUM, brute_force, tied, write

SSHD = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")


@pytest.mark.usefixtures("cluster")
def test_a_busy_cluster_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "ROOM_SECONDS", 0.5)
    cpus, _ = cluster.totals()

    @ray.remote(num_cpus=cpus)
    def busy(until: Path) -> None:
        while not until.exists():
            time.sleep(0.1)

    running = busy.remote(tmp_path / "done")
    wait_until(lambda: not ray.available_resources().get("CPU"), why=lambda: "it does not begin")
    everything = {"training": (cpus, {"CPU": 1.0})}
    with pytest.raises(ValueError, match=rf"without room for {cpus} x training \(1 CPU\), after 0.05 min .* add nodes"):
        cluster.wait_for(everything, minutes=0.05, fix="add nodes")
    capsys.readouterr()
    printed: list[str] = []

    def waits() -> bool:
        printed.append(capsys.readouterr().out)
        return "waiting  up to 30 min for nodes" in "".join(printed)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cluster.wait_for, everything, minutes=30, fix="add nodes")
        try:
            wait_until(waits, why=lambda: "".join(printed))
            assert not waiting.done()
        finally:
            monkeypatch.undo()  # on a busy machine, Ray may take longer to reserve what becomes free
            (tmp_path / "done").touch()
        waiting.result(PATIENCE)
    ray.get(running)
    said = capsys.readouterr().out
    assert re.search(r"nodes are there after \d+ s: \d+ CPUs and 0 GPUs on 1 node\n", said), said


@pytest.mark.slow
@pytest.mark.own_process
def test_notice_of_the_spot_market_drains_the_node() -> None:
    noticed = threading.Event()
    asked: list[str] = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        """What both clouds tell their machines."""

        def do_PUT(self) -> None:
            assert self.path == "/latest/api/token"
            assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self._answer(200, b"let me in")

        def do_GET(self) -> None:
            asked.append(self.path)
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
        time.sleep(3600)  # an idle node would leave at once

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
                wait_until(lambda: len(asked) > 1, why=lambda: "it does not ask")
                assert watch.poll() is None
                assert draining_nodes() == before
                noticed_at = time.time()
                noticed.set()
                assert watch.wait(PATIENCE) == 0
            finally:
                watch.kill()
            deadline = draining_nodes()[ray.get_runtime_context().get_node_id()] / 1000
            assert noticed_at <= deadline - seconds_left <= time.time()
    finally:
        server.shutdown()
        ray.cancel(working, force=True)
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.own_process
def test_decoding_keeps_to_nodes_without_gpus_while_they_have_room(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1)  # a task for each batch
    dashboard, agent = free_ports(2)
    nodes = Cluster()
    nodes.add_node(num_cpus=0, include_dashboard=True, dashboard_port=dashboard, dashboard_agent_listen_port=agent)
    kinds = {
        nodes.add_node(num_cpus=2, num_gpus=2).node_id: "gpu",
        (data_node := nodes.add_node(num_cpus=4).node_id): "data",  # room for more than the 3 tasks
    }
    ray.init(address=nodes.address)
    try:
        manifest = open_data(find_data(str(raw), layout="sop"), storage_root=str(tmp_path), max_undecodable=0)
        split, config = manifest.split("train"), DataConfig(batch_size=20, image_size=16)
        plan = ClassBalancedPlan(split.sizes, config.batch_size, config.images_per_class, 0)

        def decode_somewhere(*, tasks_in_all: int) -> Counter[str]:
            (batches,) = planned_batches(plan, split, config, first_step=0, last_step=3, world_size=1)
            assert sum(len(batch["image"]) for batch in batches.iter_batches(batch_size=20)) == 60
            decoding: list[Any] = [("name", "=", "MapBatches(make_block)"), ("state", "=", "FINISHED")]

            def tasks() -> list[Any]:
                return list_tasks(address=f"http://127.0.0.1:{dashboard}", filters=decoding, detail=True)

            wait_until(lambda: len(tasks()) == tasks_in_all, why=lambda: str(tasks()))
            return Counter(kinds[task.node_id] for task in tasks())

        assert decode_somewhere(tasks_in_all=3) == {"data": 3}

        @ray.remote(num_cpus=4, scheduling_strategy=NodeAffinitySchedulingStrategy(data_node, soft=False))
        def other_work() -> None:
            time.sleep(3600)

        working = other_work.remote()
        wait_until(lambda: ray.available_resources()["CPU"] == 2, why=lambda: "the other work")
        assert decode_somewhere(tasks_in_all=6) == {"data": 3, "gpu": 3}
        ray.cancel(working, force=True)
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.own_process
def test_a_node_that_goes_as_a_search_comes_is_a_node_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Cluster()
    nodes.add_node(num_cpus=0, dashboard_port=None)  # the next free one
    workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
    start_shards = search._start_shards
    num_shards: list[int] = []

    def place_of(_: GalleryShard) -> tuple[str, int]:
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def lose_a_node(*arguments: Any, **settings: Any) -> tuple[list[Any], list[int], list[str]]:
        started = start_shards(*arguments, **settings)
        if not num_shards:
            process_on = dict(ray.get([shard.__ray_call__.remote(place_of) for shard in started[0]]))
            assert process_on.keys() == {worker.node_id for worker in workers}
            nodes.remove_node(workers[0], allow_graceful=False)
            os.kill(process_on[workers[0].node_id], signal.SIGKILL)
            wait_until(lambda: len(cluster.live_nodes()) == 2, why=lambda: str(ray.nodes()))
        num_shards.append(len(started[0]))
        return started

    monkeypatch.setattr(search, "_start_shards", lose_a_node)
    ray.init(address=nodes.address)
    wait_until(lambda: ray.available_resources().get("CPU") == 2, why=lambda: "the nodes")
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
    # Of processes, so that `ray stop` over SSH does not end those of other tests, nor a developer's.
    namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a namespace of processes, without which `ray down` would end every Ray here")
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
        command = [*namespace, SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: listens(port), why=(tmp_path / "sshd.log").read_text)
        environment = user_environment(user)
        environment["PATH"] = f"{shims}:{environment['PATH']}"
        yield SSHMachine(environment | {"RAY_AUTH_MODE": "token"}, tmp_path / "key")
    finally:
        server.kill()  # unshare ignores SIGTERM while its child lives; with it goes all that runs in the namespace
        server.wait(PATIENCE)


@pytest.mark.slow
def test_ray_up_submit_down(ssh_machine: SSHMachine, raw: Path, tmp_path: Path) -> None:
    dashboard, agent = free_ports(2)
    ray_command, environment = str(BIN / "ray"), ssh_machine.environment
    status, output = run([ray_command, "get-auth-token", "--generate"], environment)
    assert status == 0, output
    words = {
        "USER": getpass.getuser(), "KEY": ssh_machine.key, "TOKEN": Path(environment["HOME"], ".ray", "auth_token"),
        "DASHBOARD": dashboard, "AGENT": agent,
    }  # fmt: skip
    text = (ROOT / "tests" / "support" / "ssh_cluster.yaml").read_text()
    file = tmp_path / "cluster.yaml"
    file.write_text(re.sub("|".join(words), lambda word: str(words[word[0]]), text))
    try:
        status, output = run([ray_command, "up", "--yes", "--no-config-cache", str(file)], environment)
        assert status == 0, output
        wait_until(lambda: listens(dashboard) and listens(agent), why=lambda: output)
        address = f"http://127.0.0.1:{dashboard}"
        arguments = f"ARGS=--root={raw} --out={tmp_path}/shards --layout=sop"
        job = ["JOB=jobs/prepare_shards.py", f"ADDRESS={address}", arguments]
        status, output = run(["make", "submit", *job], environment)
        assert status == 0, output
        assert load_manifest(str(tmp_path / "shards")).split("train").num_images == 140
    finally:
        status, output = run([ray_command, "down", "--yes", str(file)], environment)
    assert status == 0, output
    wait_until(lambda: not listens(dashboard), why=lambda: output)

"""Clusters as their users launch them, and the jobs that they submit."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from nsl_dist.runs import newest_checkpoint
from tests.conftest import write_sop

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SSHD = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
SMALL = "--data.image-size=16 --model.dim=16 --tracking.every=2"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sop(tmp_path_factory.mktemp("raw"), {"train": [7] * 20, "test": [5] * 8})


def user_environment(home: Path) -> dict[str, str]:
    """That of a user without any Ray, whose home is `home`."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return outside | {"HOME": str(home)}


def run(command: list[str], environment: dict[str, str], *, timeout: float = 240) -> tuple[int, str]:
    """Run a command at the root of the repository; return its exit status and output."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    return done.returncode, done.stdout


def wait_until(holds: Callable[[], object], *, seconds: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


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


@dataclass(frozen=True)
class LocalCluster:
    """What cluster/local.py has started."""

    process: "subprocess.Popen[bytes]"
    address: str
    environment: dict[str, str]
    log: Path

    def submit(self, arguments: str) -> tuple[int, str]:
        return run(["make", "submit", f"ADDRESS={self.address}", f"ARGS={arguments} {SMALL}"], self.environment)

    def ray(self, *command: str) -> tuple[int, str]:
        as_user = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": self.address}
        return run([str(BIN / "ray"), *command], self.environment | as_user)

    def node_counts(self) -> list[int]:
        """What it has said of the nodes beside the head."""
        return [int(count) for count in re.findall(r"nodes beside the head: (\d+)", self.log.read_text())]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    ray.shutdown()  # that of other tests: both would share the cores
    home = tmp_path_factory.mktemp("home")
    environment = user_environment(home)
    (port,) = free_ports(1)
    log = home / "local.log"
    command = [sys.executable, "cluster/local.py", f"--port={port}", "--nodes=3", "--idle-seconds=8"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: "A Ray cluster is up" in log.read_text(), seconds=120, why=log.read_text)
        yield LocalCluster(process, f"http://127.0.0.1:{port}", environment, log)
    finally:
        process.send_signal(signal.SIGINT)  # Ctrl-C
        process.wait(60)
    assert process.returncode == 0, log.read_text()
    assert not listens(port)


def test_a_job_brings_the_nodes_that_it_needs(local: LocalCluster, raw: Path, tmp_path: Path) -> None:
    status, output = local.submit(
        f"--data.root={raw} --storage={tmp_path} --run-name=grown --num-workers=3 --data.batch-size=60 --optim.epochs=4"
    )
    assert status == 0, output
    assert "cluster  0 CPUs and 0 GPUs on 1 nodes; asked of it: 3 x training (1 CPU), 1 x reading (1 CPU)" in output
    assert re.search(r"nodes are there after \d+ s: [46] CPUs and 0 GPUs on [34] nodes", output), output
    assert "training on 3 workers" in output
    assert re.search(
        r"started in .*: job and Ray \d+ s, nodes \d+ s, data and model \d+ s, MLflow \d+ s, workers", output
    )
    assert "\r" not in output
    assert (tmp_path / "runs" / "grown" / "results.json").exists()
    wait_until(lambda: local.node_counts()[-1] == 0, seconds=60, why=local.log.read_text)
    assert max(local.node_counts()) >= 2


def test_a_job_that_no_node_has_room_for_is_refused(local: LocalCluster, raw: Path, tmp_path: Path) -> None:
    status, output = local.submit(f"--data.root={raw} --storage={tmp_path} --num-workers=20 --data.batch-size=20")
    assert status != 0
    message = r"error: the cluster has \d CPUs and 0 GPUs on \d nodes and can add no nodes for 20 x training \(1 CPU\)"
    assert re.search(message, output), output
    assert "Traceback" not in output
    assert not (tmp_path / "shards").exists()


def test_a_job_that_is_stopped_writes_a_checkpoint(local: LocalCluster, raw: Path, tmp_path: Path) -> None:
    flags = (
        f"--data.root={raw} --storage={tmp_path} --run-name=stopped --data.batch-size=20 --optim.epochs=3000 {SMALL}"
    )
    command = ["python", "jobs/train_sop.py", *flags.split()]
    local.ray("job", "submit", "--no-wait", "--submission-id=stopped", "--working-dir=.", "--", *command)

    def logs() -> str:
        return local.ray("job", "logs", "stopped")[1]

    wait_until(lambda: "step 6/" in logs(), seconds=120, why=logs)
    status, output = local.ray("job", "stop", "stopped")
    assert (status, "was stopped" in output) == (0, True), output
    assert "SIGTERM: the workers write a checkpoint and leave" in logs()
    assert "the same command with --run-name stopped goes on from" in logs()
    assert newest_checkpoint(str(tmp_path / "runs" / "stopped")) is not None


def test_a_submission_without_the_token_is_refused(local: LocalCluster) -> None:
    submit = [str(BIN / "ray"), "job", "submit", "--address", local.address, "--", "python", "-c", "print(6 * 7)"]
    for mode in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}):
        status, output = run(submit, local.environment | mode)
        assert status != 0
        assert re.search(r"Unauthorized|Forbidden", output), output
        assert "submitted successfully" not in output
    status, output = run(submit, local.environment | {"RAY_AUTH_MODE": "token"})
    assert (status, "42" in output) == (0, True), output


def test_nothing_listens_beyond_loopback(local: LocalCluster) -> None:
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

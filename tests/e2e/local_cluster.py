"""The cluster of cluster/local.py, and what the tests of clusters share."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def user_environment(home: Path) -> dict[str, str]:
    """That of a user without any Ray, whose home is `home`."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return outside | {"HOME": str(home)}


def run(command: list[str], environment: dict[str, str], *, timeout: float = 480) -> tuple[int, str]:
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
class LocalCluster:
    """What cluster/local.py has started."""

    process: "subprocess.Popen[bytes]"
    address: str
    environment: dict[str, str]
    log: Path

    def submit(self, arguments: str) -> tuple[int, str]:
        return run(["make", "submit", f"ADDRESS={self.address}", f"ARGS={arguments}"], self.environment)

    def ray(self, *command: str) -> tuple[int, str]:
        return run([str(BIN / "ray"), *command], self.environment | self._as_user)

    @contextmanager
    def submitted(self, name: str, command: list[str]) -> Iterator[Path]:
        """A job whose output is followed in a file."""
        log = self.log.with_name(f"{name}.log")
        submit = [str(BIN / "ray"), "job", "submit", f"--submission-id={name}", "--working-dir=.", "--", *command]
        with log.open("w") as output:
            process = subprocess.Popen(
                submit, cwd=ROOT, env=self.environment | self._as_user, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                yield log
            finally:
                process.terminate()  # it may still follow
                process.wait(60)

    @property
    def _as_user(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": self.address, "PYTHONUNBUFFERED": "1"}

    def node_counts(self) -> list[int]:
        """What it has said of the nodes beside the head."""
        return [int(count) for count in re.findall(r"nodes beside the head: (\d+)", self.log.read_text())]


@contextmanager
def started_local(directory: Path) -> Iterator[LocalCluster]:
    """Start a cluster of up to 2 nodes with 3 CPUs; end it with Ctrl-C. `directory` is its user's home."""
    ray.shutdown()  # that of other tests: both would share the cores
    environment = user_environment(directory)
    (port,) = free_ports(1)
    log = directory / "local.log"
    command = [sys.executable, "cluster/local.py", f"--port={port}", "--nodes=2", "--cpus=3", "--idle-seconds=8"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: "A Ray cluster is up" in log.read_text(), seconds=120, why=log.read_text)
        yield LocalCluster(process, f"http://127.0.0.1:{port}", environment, log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode == 0, log.read_text()
    assert not listens(port)

"""The cluster of cluster/local.py."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import BIN, PATIENCE, ROOT, free_ports, listens, run, user_environment, wait_until


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
                process.wait(PATIENCE)

    @property
    def _as_user(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": self.address, "PYTHONUNBUFFERED": "1"}

    def node_counts(self) -> list[int]:
        """What it has said of the nodes beside the head."""
        return [int(count) for count in re.findall(r"nodes beside the head: (\d+)", self.log.read_text())]


@contextmanager
def started_local(directory: Path) -> Iterator[LocalCluster]:
    """Start a cluster of up to 2 nodes with 3 CPUs; end it with Ctrl-C. `directory` is its user's home."""
    environment = user_environment(directory)
    (port,) = free_ports(1)
    log = directory / "local.log"
    command = [sys.executable, "cluster/local.py", f"--port={port}", "--nodes=2", "--cpus=3", "--idle-seconds=8"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: "A Ray cluster is up" in log.read_text(), why=log.read_text)
        yield LocalCluster(process, f"http://127.0.0.1:{port}", environment, log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    assert process.returncode == 0, log.read_text()
    assert not listens(port)

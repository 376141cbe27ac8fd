"""Commands, ports and what listens on them."""

import os
import re
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
BIN = Path(sys.executable).parent
PATIENCE = 300.0  # seconds after which what is waited for is taken to hang, however busy the machine is
PATIENT_RAY = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{PATIENCE:.0f}", "RAY_gcs_server_request_timeout_seconds": f"{PATIENCE:.0f}",
}  # fmt: skip


def job(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Run a job as its command line would, in this process and on its Ray."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")


def user_environment(home: Path) -> dict[str, str]:
    """The environment of a user without any Ray and without GPUs, whose home is `home`."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return outside | PATIENT_RAY | {"HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str], environment: dict[str, str], *, timeout: float = 900) -> tuple[int, str]:
    """Run a command at the root of the repository; return its exit status and output."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    return done.returncode, done.stdout


def wait_until(holds: Callable[[], object], *, why: Callable[[], str], seconds: float = PATIENCE) -> None:
    """Wait for a condition; fail with `why` after `seconds`, which only guard against hanging."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def listens(port: int) -> bool:
    """Whether something listens on a port of loopback."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


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

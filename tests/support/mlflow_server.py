"""MLflow's own server on loopback."""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import wait_until


def start_mlflow(store: str, *, port: int, folder: Path) -> "subprocess.Popen[bytes]":
    """Start a server over a store (the URI of a database); return it once it answers."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # five more processes, not needed here
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        assert server.poll() is None, (folder / "server.log").read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
            return True
        return False

    wait_until(answers, why=(folder / "server.log").read_text)
    return server


def stop_mlflow(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextmanager
def started_mlflow(store: str, *, port: int, folder: Path) -> Iterator[str]:
    """Start a server and stop it at the end; its address."""
    server = start_mlflow(store, port=port, folder=folder)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_mlflow(server)

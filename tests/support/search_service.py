"""The search service over a small gallery."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsl_dist.data.layouts import read_catalogue
from tests.support.checkpoints import write_model
from tests.support.images import write_folders, write_image
from tests.support.processes import JOBS, PATIENCE, free_ports, user_environment, wait_until

DIM = 32
LOOSE = 5  # images outside of class folders
SIZES = [4] * 8


@dataclass(frozen=True)
class Service:
    """A running service; `files` are those of the gallery in order of their ids."""

    process: subprocess.Popen[bytes]
    port: int
    files: list[Path]
    checkpoint: Path
    log: Path

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()

    def search(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> dict[str, Any]:
        status, content = self.ask("POST", path, body, headers)
        assert status == 200, content
        answer: dict[str, Any] = json.loads(content)
        return answer


@contextmanager
def started_service(root: Path) -> Iterator[Service]:
    """Start the job with a gallery of class folders and loose images; end it with Ctrl-C."""
    checkpoint = write_model(root / "checkpoint", dim=DIM, image_size=32)
    gallery = write_folders(root / "gallery", SIZES)
    for number in range(LOOSE):
        write_image(gallery / f"a {number}.jpg", 100 + number, number)
    (port,) = free_ports(1)
    log = root / "log"
    command = [
        sys.executable, str(JOBS / "search.py"), f"--checkpoint={checkpoint}", f"--gallery={gallery}",
        f"--storage={root / 'storage'}", f"--port={port}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=user_environment(root), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:

        def serves() -> bool:
            assert process.poll() is None, log.read_text()
            return "serving" in log.read_text()

        wait_until(serves, why=log.read_text)
        files = [gallery / path for path in read_catalogue(str(gallery))["path"].to_pylist()]
        yield Service(process, port, files, checkpoint, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 130, log.read_text()  # Ctrl-C ends it in order
    assert log.read_text().endswith(f"http://127.0.0.1:{port} is closed\n")
    assert "Traceback" not in log.read_text(), log.read_text()

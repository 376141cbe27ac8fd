"""What surrounds the tasks on a cluster."""

import signal
import sys
from pathlib import Path
from types import FrameType

import pytest

from nsl_dist.cluster import import_whole


def test_a_cancelled_import_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that Ray cancels leaves the process to others, and to them a whole torch."""
    (tmp_path / "takes_long.py").write_text(
        "import os, signal, time\ntime.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGALRM)\ntime.sleep(0.5)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def cancel(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, cancel)
    try:
        with pytest.raises(KeyboardInterrupt):
            import_whole("takes_long")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sys.modules.pop("takes_long").whole

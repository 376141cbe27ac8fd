"""The main job on small data, as its user runs it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import JOBS, user_environment

SMALL = [
    "--recipe=laptop_scratch", "--optim.epochs=2", "--data.image-size=16", "--model.dim=16", "--data.batch-size=20",
    "--tracking.every=2",
]  # fmt: skip


@dataclass(frozen=True)
class TrainedRun:
    """A finished run and what its job has printed."""

    raw: Path
    storage: Path
    output: str

    @property
    def folder(self) -> Path:
        return self.storage / "runs" / "first"


def train(raw: Path, home: Path) -> TrainedRun:
    """Train two workers on a Ray of their own, half of the classes sampled, evaluated after every epoch."""
    storage = home / "storage"
    flags = [
        f"--data.root={raw}", f"--storage={storage}", "--run-name=first", "--num-workers=2", *SMALL,
        "--proxies.sample-rate=0.5", "--eval.every=1", "--eval.untrained", "--eval.num-shards=2", "--checkpoint.keep=1",
        "--tracking.register=shop",
    ]  # fmt: skip
    command = [sys.executable, str(JOBS / "train_sop.py"), *flags]
    done = subprocess.run(
        command, cwd=home, env=user_environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return TrainedRun(raw, storage, done.stdout)

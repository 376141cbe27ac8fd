"""The folder of a run: names of its files, and its newest checkpoint. Needs neither torch nor Ray."""

import json
import re

from pyarrow import fs

from nsl_dist import storage

MODEL_FILE = "embedder.safetensors"  # of a checkpoint: the embedding model alone
DESCRIPTION_FILE = "embedder.json"  # what rebuilds it
OPTIMIZER_FILE = "optimizer.safetensors"
RUN_FILE = "run.json"
LEFT_OUT_FILE = "left_out.json"  # of a run: shards that turned out damaged
BEST = "best"  # of a run: the best model among those evaluated
CONFIG_FILE = "config.json"  # of a run: what it was started with
_CHECKPOINT = re.compile(r"checkpoint_\d{9}")


class TrainingError(RuntimeError):
    """What ended a training and would end it again."""


class StoppedError(RuntimeError):
    """A training that was told to stop, and can go on.

    Attributes:
        signal: that stopped it.

    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after `step` iterations; such names sort by step."""
    return f"checkpoint_{step:09d}"


def step_of(checkpoint: str) -> int:
    """Return the number of iterations before a checkpoint."""
    return int(json.loads(storage.read_bytes(storage.join(checkpoint, RUN_FILE)))["step"])


def unsent_file(storage_root: str, mlflow_run_id: str) -> str:
    """Return where the records wait that MLflow could not be told yet."""
    return storage.join(storage_root, "unsent", f"{mlflow_run_id}.json")


def rows_file(rank: int, world_size: int) -> str:
    """Return the name of one worker's part of the class proxies in a checkpoint."""
    return f"proxies-{rank:05d}-of-{world_size:05d}.safetensors"


def newest_checkpoint(run_dir: str) -> str | None:
    """Return the newest whole checkpoint below a folder or URI of a run, if there is one."""
    for name in sorted(_names(run_dir), reverse=True):
        location = storage.join(run_dir, name)
        if _CHECKPOINT.fullmatch(name) and _is_whole(location):
            return location
    return None


def left_out_shards(run_dir: str) -> list[str]:
    """Return the shards that turned out damaged in the course of a run, and whose classes it goes on without."""
    location = storage.join(run_dir, LEFT_OUT_FILE)
    return list(json.loads(storage.read_bytes(location))) if storage.exists(location) else []


def prune_checkpoints(run_dir: str, *, keep: int) -> None:
    """Delete all but the newest checkpoints of a run that has ended, those half written before a crash included."""
    filesystem, path = storage.resolve(run_dir)
    names = sorted(name for name in _names(run_dir) if _CHECKPOINT.fullmatch(name))
    for name in names[:-keep]:
        filesystem.delete_dir(f"{path}/{name}")


def _is_whole(checkpoint: str) -> bool:
    """Tell whether all files of a checkpoint are there; each appears complete or not at all."""
    there = _names(checkpoint)
    if RUN_FILE not in there:
        return False
    world_size = json.loads(storage.read_bytes(storage.join(checkpoint, RUN_FILE)))["world_size"]
    rows = {rows_file(rank, world_size) for rank in range(world_size)}
    return there >= rows | {MODEL_FILE, DESCRIPTION_FILE, OPTIMIZER_FILE}


def _names(location: str) -> set[str]:
    filesystem, path = storage.resolve(location)
    return {info.base_name for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))}

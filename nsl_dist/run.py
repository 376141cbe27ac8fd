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
DIGEST_FILE = "data_digest"  # of a run: that of its data
MLFLOW_ID_FILE = "mlflow_run_id"  # of a run: MLflow's own name of it
RESULTS_FILE = "results.json"  # of a run that is finished
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


def run_folder(storage_root: str, run_name: str) -> str:
    """Return the folder or URI of a run."""
    return storage.join(storage_root, "runs", run_name)


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
    for name in sorted(_sizes(run_dir), reverse=True):
        location = storage.join(run_dir, name)
        if _CHECKPOINT.fullmatch(name) and _is_whole(location):
            return location
    return None


def left_out_shards(run_dir: str) -> list[str]:
    """Return the shards that turned out damaged in the course of a run, and whose classes it goes on without."""
    location = storage.join(run_dir, LEFT_OUT_FILE)
    return list(json.loads(storage.read_bytes(location))) if storage.exists(location) else []


def prune_checkpoints(run_dir: str, *, keep: int | None) -> None:
    """Delete the checkpoints of a run that a crash left half written, and all whole ones but the newest `keep`."""
    filesystem, path = storage.resolve(run_dir)
    names = [name for name in sorted(_sizes(run_dir)) if _CHECKPOINT.fullmatch(name)]
    whole = [name for name in names if _is_whole(storage.join(run_dir, name))]
    kept = whole if keep is None else whole[-keep:]
    for name in set(names).difference(kept):
        filesystem.delete_dir(f"{path}/{name}")


def _is_whole(checkpoint: str) -> bool:
    """Tell whether all files of a checkpoint are there, with something in them; each appears complete or not at all."""
    there = {name for name, size in _sizes(checkpoint).items() if size}
    if RUN_FILE not in there:
        return False
    try:
        world_size = json.loads(storage.read_bytes(storage.join(checkpoint, RUN_FILE)))["world_size"]
    except ValueError:
        return False  # damaged since
    rows = {rows_file(rank, world_size) for rank in range(world_size)}
    return there >= rows | {MODEL_FILE, DESCRIPTION_FILE, OPTIMIZER_FILE}


def _sizes(location: str) -> dict[str, int | None]:
    """Return the bytes of each file in a folder, None of each folder in it; nothing of a folder that is not there."""
    filesystem, path = storage.resolve(location)
    return {info.base_name: info.size for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))}


def find_checkpoint(location: str) -> str:
    """Return the checkpoint that is meant: the folder itself, or the newest below the folder of a run.

    Raises:
        FileNotFoundError: there is none.

    """
    location = storage.absolute(location).rstrip("/")
    if storage.exists(storage.join(location, RUN_FILE)):
        return location
    checkpoint = newest_checkpoint(location)
    if checkpoint is None:
        raise FileNotFoundError(
            f"no checkpoint in {location}: it has neither {RUN_FILE} nor a whole checkpoint_*; give the folder of a "
            "run (STORAGE/runs/NAME) or of one of its checkpoints as --checkpoint"
        )
    return checkpoint


def keep_best(checkpoint: str, recall_by_k: dict[int, float], run_dir: str) -> None:
    """Copy the model of a checkpoint to the run's `best`, unless one with a higher recall at the lowest K is there."""
    best = storage.join(run_dir, BEST)
    k, recall = min(recall_by_k.items())
    scored = storage.join(best, "score.json")
    if storage.exists(scored) and json.loads(storage.read_bytes(scored)).get(f"recall@{k}", 0.0) >= recall:
        return
    for name in (MODEL_FILE, DESCRIPTION_FILE, RUN_FILE):
        storage.write_bytes(storage.join(best, name), storage.read_bytes(storage.join(checkpoint, name)))
    storage.write_bytes(scored, json.dumps({f"recall@{k}": recall}).encode())

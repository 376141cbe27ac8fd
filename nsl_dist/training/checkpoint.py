"""One checkpoint format for any number of workers.

A checkpoint is a folder: `model.pt`, the embedding model alone; what `torch.distributed.checkpoint` writes of the
optimiser and of the proxies with their momentum, one matrix of which every worker writes and reads its own rows; and
`run.json`: step, number of classes, data digest and configuration.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.tensor import DTensor, Shard

from nsl_dist.storage import MODEL_FILE
from nsl_dist.training.step import TrainingStep


def save(directory: Path, training: TrainingStep, *, step: int, digest: str) -> None:
    """Write the state before iteration `step`; every worker calls this with a folder of its own, merged later."""
    training.proxies.complete(step=step)
    save_sharded(_state(training), checkpoint_id=directory, no_dist=not dist.is_initialized())
    if training.proxies.partition.rank == 0:
        torch.save(training.model.state_dict(), directory / MODEL_FILE)
        run = {
            "step": step,
            "num_classes": training.proxies.partition.num_classes,
            "digest": digest,
            "config": dataclasses.asdict(training.config),
        }
        (directory / "run.json").write_text(json.dumps(run, indent=1))


def load(directory: Path, training: TrainingStep, *, digest: str) -> int:
    """Load a checkpoint saved by any number of workers; return the iteration to go on with.

    Raises:
        ValueError: it belongs to other data or another number of classes.

    """
    run = json.loads((directory / "run.json").read_text())
    num_classes = training.proxies.partition.num_classes
    if (run["digest"], run["num_classes"]) != (digest, num_classes):
        raise ValueError(
            f"checkpoint {directory} is of data {run['digest'][:16]} with {run['num_classes']} classes, this run "
            f"trains on {digest[:16]} with {num_classes}; choose another --run-name"
        )
    step = int(run["step"])
    training.begin_phase(max(step - 1, 0))  # that of the step before, whose optimiser was saved
    state = _state(training)
    load_sharded(state, checkpoint_id=directory, no_dist=not dist.is_initialized())
    training.model.load_state_dict(torch.load(directory / MODEL_FILE, map_location="cpu", weights_only=True))
    if training.optimizer is not None:
        set_optimizer_state_dict(training.model, training.optimizer, state["optimizer"])
    training.proxies.declare_loaded()  # in place, into the very memory
    return step


def _state(training: TrainingStep) -> dict[str, Any]:
    state: dict[str, Any] = {
        "proxies": {name: _as_one_matrix(rows_CD, training) for name, rows_CD in training.proxies.state().items()}
    }
    if training.optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(training.model, training.optimizer)
    return state


def _as_one_matrix(local_CD: Tensor, training: TrainingStep) -> Tensor:
    """View this worker's rows as its part of the whole matrix."""
    if training.mesh is None:
        return local_CD
    shape = torch.Size((training.proxies.partition.num_classes, local_CD.shape[1]))
    whole = DTensor.from_local(local_CD, training.mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
    assert whole.to_local().data_ptr() == local_CD.data_ptr()
    return whole

"""A checkpoint format that does not depend on the number of workers.

A checkpoint is a folder with these files:

- `embedder.safetensors` and `embedder.json`: the embedding model only (see `nsl_dist.embedder`); in a run with a moving
  average of the weights, the average;
- `optimizer.safetensors`: the state of the model's optimiser by parameter (SGD's momentum under its bare name, AdamW's
  under `exp_avg.`, `exp_avg_sq.` and `step.`), under `raw.` the weights that an average is of, and under `proxies.` the
  updates that unsampled proxies have missed;
- `proxies-RANK-of-WORKERS.safetensors`: each worker's rows of the class proxies and of their optimiser's state; any
  other number of workers reads its own rows by range;
- `run.json`: step, number of classes and workers, data digest and configuration.

All random numbers of a run are derived from its seed, the step and the worker, so there is no random state to save. A
checkpoint is complete if all its files exist, since each file appears complete or not at all.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from nsl_dist import storage
from nsl_dist.embedder import describe, load_weights, weights_of
from nsl_dist.memory_map import map_file
from nsl_dist.model import EmbeddingModel
from nsl_dist.proxies.partition import Partition
from nsl_dist.run import (
    DESCRIPTION_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    RUN_FILE,
    CheckpointRecord,
    rows_file,
)
from nsl_dist.training.row_files import read_rows, write_rows
from nsl_dist.training.step import TrainingStep

# Prefixes of names in `optimizer.safetensors`.
HISTORY = "proxies."  # what unsampled proxies have missed
RAW = "raw."  # weights that are trained, where the embedder has their average
STATE = {"momentum_buffer": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq.", "step": "step."}


class Checkpointer:
    """Copies the state of one worker, then writes the copy in the background while training continues.

    The copy takes as much memory as the state; if the proxies are kept in a file, so is the copy.

    Args:
        training: this worker's model, proxies and optimisers.
        digest: digest of the training data.

    """

    def __init__(self, training: TrainingStep, *, digest: str) -> None:
        self._training = training
        self._digest = digest
        self._written = threading.Event()
        self._written.set()
        self._step = 0
        self._rows: dict[str, Tensor] = {}
        self._model: dict[str, Tensor] = {}
        self._optimizer: dict[str, Tensor] = {}

    def copy(self, *, step: int) -> None:
        """Copy the state before iteration `step`; waits until the previous copy is written.

        Raises:
            FloatingPointError: the state is not finite.

        """
        training, partition = self._training, self._training.proxies.partition
        self._written.wait()
        self._written.clear()
        self._step = step
        for name, tensor in training.proxies.state().items():
            if name not in self._rows or self._rows[name].shape != tensor.shape:
                self._rows[name] = _like(tensor, self._training)
            self._rows[name].copy_(tensor, non_blocking=True)
        if partition.rank == 0:
            embedder = _embedder_of(training)
            self._model = {name: _to_host(tensor) for name, tensor in embedder.state_dict().items()}
            self._optimizer = {name: _to_host(tensor) for name, tensor in _optimizer_state(training).items()}
        if training.device.type == "cuda":
            torch.cuda.synchronize()
        for name, tensor in self._model.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} is nan or infinite after step {step - 1}; start another run with a lower --optim.lr"
                )

    def write(self, location: str, *, on_failure: Callable[[OSError], None]) -> None:
        """Write the copy; each worker writes its own rows, and the first one also everything else.

        Failures of storage are retried (see `storage.patiently`), and the next `copy` waits until this one is written.

        Args:
            location: folder or URI of the checkpoint, the same for all workers.
            on_failure: called each time storage fails.

        Raises:
            OSError: storage kept failing.

        """
        storage.patiently(lambda: self._write(location), on_failure=on_failure)
        # Not if it failed: Ray Train may retry later, and the copy must still be of this step.
        self._written.set()

    def _write(self, location: str) -> None:
        partition, config = self._training.proxies.partition, self._training.config
        name = rows_file(partition.rank, partition.world_size)
        write_rows(storage.join(location, name), self._rows, start=self._training.proxies.weight.rows.start)
        if partition.rank > 0:
            return
        record = CheckpointRecord(
            step=self._step,
            num_classes=partition.num_classes,
            world_size=partition.world_size,
            digest=self._digest,
            config=dataclasses.asdict(config),
        )
        contents = {
            MODEL_FILE: weights_of(self._model),
            DESCRIPTION_FILE: describe(config),
            OPTIMIZER_FILE: save_safetensors(self._optimizer),
            RUN_FILE: record.to_json(),
        }
        for name, content in contents.items():
            storage.write_bytes(storage.join(location, name), content)


@dataclass(frozen=True)
class Loaded:
    """What one worker loaded: the iteration to continue with, and the number of bytes read."""

    step: int
    num_bytes: int


def load(location: str, training: TrainingStep, *, digest: str) -> Loaded:
    """Load a checkpoint saved by any number of workers; each worker reads the model and its own rows of the proxies.

    Args:
        location: folder or URI of the checkpoint.
        training: receives the loaded state.
        digest: digest of the current training data.

    Raises:
        ValueError: the checkpoint belongs to other data or another number of classes, or it is damaged.

    """

    def read(name: str) -> bytes:
        return storage.patiently(lambda: storage.read_bytes(storage.join(location, name)))

    record = storage.patiently(lambda: CheckpointRecord.read(location))
    partition = training.proxies.partition
    if (record.digest, record.num_classes) != (digest, partition.num_classes):
        raise ValueError(
            f"checkpoint {location} is of data {record.digest[:16]} with {record.num_classes} classes, this run "
            f"trains on {digest[:16]} with {partition.num_classes}; choose another --run-name"
        )
    training.begin_phase(max(record.step - 1, 0))  # the saved optimiser is that of the previous step
    weights, content = read(MODEL_FILE), read(OPTIMIZER_FILE)
    load_weights(_embedder_of(training), weights, location=location)
    try:
        state = load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{location}/{OPTIMIZER_FILE} is damaged: {error}") from error
    num_bytes = len(weights) + len(content)
    rows, ours = training.proxies.overwrite(), training.proxies.weight.rows
    for rank in range(record.world_size):
        saved = Partition(partition.num_classes, rank, record.world_size).rows(training.config.proxies.per_class)
        first, last = max(saved.start, ours.start), min(saved.stop, ours.stop)
        if first < last:
            shared = {name: tensor[first - ours.start : last - ours.start] for name, tensor in rows.items()}
            path = storage.join(location, rows_file(rank, record.world_size))
            num_bytes += storage.patiently(functools.partial(read_rows, path, shared, first_row=first))
    training.proxies.resume(
        {name.removeprefix(HISTORY): tensor for name, tensor in state.items() if name.startswith(HISTORY)}
    )
    if training.average is not None:
        raw = {name.removeprefix(RAW): tensor for name, tensor in state.items() if name.startswith(RAW)}
        training.model.load_state_dict(raw)
    _load_optimizer(training, state)
    return Loaded(record.step, num_bytes)


def _embedder_of(training: TrainingStep) -> EmbeddingModel:
    return training.average.model if training.average is not None else training.model


def _load_optimizer(training: TrainingStep, state: dict[str, Tensor]) -> None:
    """Load what `_optimizer_state` has returned, where and in the memory format that the optimiser itself would."""
    if training.optimizer is None:
        return
    for name, parameter in training.model.named_parameters():
        for kind, prefix in STATE.items():
            saved = state.get(prefix + name)
            if saved is not None:
                like = torch.empty_like(saved if kind == "step" else parameter, device=training.device)
                training.optimizer.state[parameter][kind] = like.copy_(saved)


def _optimizer_state(training: TrainingStep) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    if training.optimizer is not None:
        for name, parameter in training.model.named_parameters():
            for kind, tensor in training.optimizer.state.get(parameter, {}).items():
                if tensor is not None:
                    state[STATE[kind] + name] = tensor
    if training.average is not None:
        state |= {RAW + name: tensor for name, tensor in training.model.state_dict().items()}
    assert training.proxies.optimizer is not None
    return state | {HISTORY + name: tensor for name, tensor in training.proxies.optimizer.history.items()}


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _like(tensor: Tensor, training: TrainingStep) -> Tensor:
    """Return memory for a copy of rows: host memory, or another file if the rows are kept in one."""
    table = training.proxies.weight
    if table.placement == "disk" and tensor.ndim == 2 and len(tensor) > 0:
        memory = map_file(
            tensor.nbytes,
            directory=table.directory,
            what="class proxies for a checkpoint",
            remedy="set --proxies.directory to a folder on a local disk with room for two copies of them",
        )
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

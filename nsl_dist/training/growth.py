"""A run that starts from the model and the class proxies of another, whose classes may partly be others.

It is written as the checkpoint before the first iteration, so that any number of workers can begin with it.
"""

import dataclasses
import functools
import json
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from nsl_dist import storage
from nsl_dist.config import ModelConfig, ProxyConfig, TrainConfig
from nsl_dist.data.shards import Manifest, Split
from nsl_dist.embedder import describe
from nsl_dist.model import RESCALING
from nsl_dist.proxies.counter_random import uniform_rows
from nsl_dist.proxies.partition import Partition
from nsl_dist.retrieval.batch_inference import mean_embeddings
from nsl_dist.run import (
    DESCRIPTION_FILE,
    GROWTH_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    RUN_FILE,
    CheckpointRecord,
    Run,
    RunFolder,
    find_checkpoint,
    is_complete,
    rows_file,
)
from nsl_dist.training.checkpoint import HISTORY, RAW
from nsl_dist.training.row_files import read_rows, write_rows

BYTES_AT_ONCE = 2**30  # of proxies: the size of a file of the checkpoint
CLASSES_AT_ONCE = 2**18  # of a source, that are read together
ROWS_BETWEEN = 1024  # that are read although nobody needs them, to read their neighbours at once


@dataclass(frozen=True)
class Growth:
    """How many classes of a run the one that it started from knows.

    Attributes:
        source: checkpoint that it started from.
        known: classes of both, which keep their proxies and the state of these.
        new: classes that start from the mean embedding of their images.
        vanished: classes that the run lacks.

    """

    source: str
    known: int
    new: int
    vanished: int

    def sentence(self) -> str:
        """Say it."""
        return f"{self.known:,} known classes, {self.new:,} new, {self.vanished:,} vanished; from {self.source}"


def check_source(config: TrainConfig) -> None:
    """Refuse to start from a run that does not fit.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it has no record of its classes, or another model or kind of proxies.

    """
    source, record, _ = _source_of(config)
    if config.optim.new_layers_epochs > 0:
        raise ValueError(
            f"--init-from {source}: set --optim.new-layers-epochs 0; the state of the optimisers, which is kept, "
            "would be lost after them"
        )
    pairs = [
        *(("model", each.name) for each in fields(ModelConfig) if each.name not in ("weights", "batch_norm")),
        *(("proxies", name) for name in ("per_class", "optimizer", "dtype")),
        ("optim", "optimizer"),
    ]
    default = dataclasses.asdict(TrainConfig())
    changed = []
    for part, name in pairs:
        theirs, ours = record.config[part].get(name, default[part][name]), getattr(getattr(config, part), name)
        if theirs != ours:
            changed.append(f"--{part}.{name.replace('_', '-')} {theirs} -> {ours}")
    batch_norms = record.config["model"]["batch_norm"], config.model.batch_norm
    if "frozen" in batch_norms and batch_norms[0] != batch_norms[1]:  # the others have the same state
        changed.append("--model.batch-norm {} -> {}".format(*batch_norms))
    if changed:
        raise ValueError(f"--init-from {source} has other options: {'; '.join(changed)}; use the same")
    given = [weights is not None for weights in (record.config["model"]["weights"], config.model.weights)]
    if config.model.backbone in RESCALING and given[0] != given[1]:
        raise ValueError(
            f"--init-from {source} has --model.weights {record.config['model']['weights']}; give the same, because a "
            f"{config.model.backbone} from random weights sees images in another scale than one from given weights"
        )


@dataclass(frozen=True)
class Match:
    """What a run starts from.

    Attributes:
        source: the checkpoint.
        record: its record.
        places: the place of each class of the run among its classes; -1 for new ones.

    """

    source: str
    record: CheckpointRecord
    places: NDArray[np.int64]


def match_classes(config: TrainConfig, manifest: Manifest) -> Match:
    """Match the training classes of a run and of the one that it starts from.

    Raises:
        ValueError: a class id occurs twice, the data sets name classes in different ways, or classes that the other run
            was trained on are to be unseen ones of the test; or see `check_source`.

    """
    source, record, folder = _source_of(config)
    table = folder.classes()
    layout = table.schema.metadata[b"layout"].decode()
    if layout != manifest.layout:
        raise ValueError(
            f"--init-from {source} is of layout {layout}, {manifest.root} of {manifest.layout}: classes differ"
        )
    ids, theirs = _unique(manifest.class_ids("train"), manifest.root), _unique(table["class_id"], folder.location)
    if len(theirs) != record.num_classes:
        raise ValueError(
            f"--init-from {source} has proxies of {record.num_classes} classes, {folder.location} names {len(theirs)}"
        )
    if manifest.split_by == "classes":
        tested = manifest.class_ids(manifest.evaluation_splits[0]).cast(pa.large_string())
        seen = tested.filter(pc.is_in(tested, value_set=theirs))
        if len(seen):
            remedy = f"test on the same ones as before: --data.test-classes {folder.test_classes}"
            raise ValueError(
                f"{len(seen)} of the test classes, such as {seen[0]}, are among those that {source} was trained on; "
                + (remedy if layout == "folders" else "the splits of the two data sets differ")
            )
    return Match(source, record, pc.index_in(ids, value_set=theirs).fill_null(-1).to_numpy().astype(np.int64))


def write_start(run: Run, match: Match, *, num_gpus: int) -> None:
    """Write the checkpoint before the first iteration, and how the classes relate."""
    known = int((match.places >= 0).sum())
    growth = Growth(match.source, known, len(match.places) - known, match.record.num_classes - known)
    print(f"classes: {growth.sentence()}", flush=True)
    content = json.dumps(dataclasses.asdict(growth), indent=1).encode()
    storage.write_bytes(run.folder.file(GROWTH_FILE), content)
    _write_checkpoint(run, match, num_gpus=num_gpus)


def growth_of(folder: RunFolder) -> Growth | None:
    """Return how the classes relate; None for a run that did not start from another."""
    location = folder.file(GROWTH_FILE)
    return Growth(**json.loads(storage.read_bytes(location))) if storage.exists(location) else None


def _source_of(config: TrainConfig) -> tuple[str, CheckpointRecord, RunFolder]:
    assert config.init_from is not None
    source = find_checkpoint(config.init_from)
    if not is_complete(source):
        raise ValueError(
            f"--init-from {source} is no complete checkpoint: give the folder of a run, or take only its model by "
            "--model.weights"
        )
    folder = RunFolder.holding(source)
    if folder is None or not folder.has_classes():
        raise ValueError(
            f"--init-from {source} is not in the folder of a run that names its classes, as those of version 0.2.0 and "
            "later do; to start from its model alone, with new proxies: --model.weights"
        )
    return source, storage.patiently(lambda: CheckpointRecord.read(source)), folder


def _unique(ids: pa.ChunkedArray, location: str) -> pa.Array:
    counts = pc.value_counts(ids)
    if len(counts) < len(ids):
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise ValueError(f"{location} has class {twice} twice; merge the two, or rename one")
    return ids.cast(pa.large_string()).combine_chunks()  # others hold at most 2 GiB


def _read(location: str, name: str) -> bytes:
    return storage.patiently(lambda: storage.read_bytes(storage.join(location, name)))


def _write_checkpoint(run: Run, match: Match, *, num_gpus: int) -> None:
    config, source, record, places = run.config, match.source, match.record, match.places
    weights, state = _read(source, MODEL_FILE), load_safetensors(_read(source, OPTIMIZER_FILE))
    if config.optim.ema is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(RAW)}
    elif not any(name.startswith(RAW) for name in state):
        state |= {RAW + name: tensor for name, tensor in load_safetensors(weights).items()}
    split = run.manifest.split("train")
    blank = _blank_rows(1, config)
    bytes_per_class = config.proxies.per_class * sum(tensor.nbytes for tensor in blank.values())
    num_files = -(-len(places) * bytes_per_class // BYTES_AT_ONCE)
    target = run.folder.checkpoint(0)
    for rank in range(num_files):
        part = Partition(len(places), rank, num_files)
        rows = _blank_rows(part.num_rows, config)
        labels = np.arange(part.start, part.stop)
        is_new = places[labels] < 0
        _read_known(rows, source, record, places[labels], config.proxies)
        if is_new.any():
            new = _classes_of(split, labels[is_new])
            means_ND = mean_embeddings(weights, config, new, num_gpus=num_gpus)
            _make_new(rows, torch.from_numpy(means_ND), labels, is_new, config)
            if "step" in rows:  # they have missed no update
                rows["step"].view(part.num_rows, -1)[torch.from_numpy(is_new)] = state[f"{HISTORY}within"].shape[2]
        first_row = part.rows(config.proxies.per_class).start
        path = storage.join(target, rows_file(rank, num_files))
        storage.patiently(functools.partial(write_rows, path, rows, start=first_row))
    begun = CheckpointRecord(
        step=0,
        num_classes=len(places),
        world_size=num_files,
        digest=run.manifest.digest,
        config=dataclasses.asdict(config),
    )
    contents = {
        MODEL_FILE: weights,
        DESCRIPTION_FILE: describe(config),
        OPTIMIZER_FILE: save_safetensors(state),
        RUN_FILE: begun.to_json(),
    }
    for name, content in contents.items():
        storage.patiently(functools.partial(storage.write_bytes, storage.join(target, name), content))


def _blank_rows(num_classes: int, config: TrainConfig) -> dict[str, Tensor]:
    """Return zeros for everything that a checkpoint has of the proxies of some classes (`ProxyMatrix.state`)."""
    num_rows, dtype = num_classes * config.proxies.per_class, getattr(torch, config.proxies.dtype)
    rows = {"weight": torch.zeros(num_rows, config.model.dim, dtype=dtype)}
    if config.proxies.optimizer == "adagrad":
        return rows | {"accumulator": torch.zeros(num_rows, 1)}
    return rows | {
        "velocity": torch.zeros(num_rows, config.model.dim, dtype=dtype),
        "step": torch.zeros(num_rows, dtype=torch.int32),
    }


def _read_known(
    rows: dict[str, Tensor], source: str, record: CheckpointRecord, places: NDArray[np.int64], config: ProxyConfig
) -> None:
    """Read the rows of known classes from a checkpoint, whose classes `places` are of those in `rows`."""
    order = np.argsort(places, kind="stable")
    order = order[places[order] >= 0]  # of known classes, in the order of the source
    for rank in range(record.world_size):
        saved = Partition(record.num_classes, rank, record.world_size)
        inside = order[(places[order] >= saved.start) & (places[order] < saved.stop)]
        far = np.diff(places[inside]) * config.per_class > ROWS_BETWEEN
        cuts = np.flatnonzero(far | (np.diff(places[inside] // CLASSES_AT_ONCE) > 0)) + 1
        for part in np.split(inside, cuts) if len(inside) else []:
            first, last = int(places[part[0]]) * config.per_class, (int(places[part[-1]]) + 1) * config.per_class
            span = {name: tensor.new_empty(last - first, *tensor.shape[1:]) for name, tensor in rows.items()}
            path = storage.join(source, rows_file(rank, record.world_size))
            storage.patiently(functools.partial(read_rows, path, span, first_row=first))
            theirs, ours = (_rows_of(each, config.per_class) for each in (places[part], part))
            for name, tensor in rows.items():
                tensor[ours] = span[name][theirs - first]


def _rows_of(classes: NDArray[np.int64], per_class: int) -> Tensor:
    return torch.from_numpy((classes[:, None] * per_class + np.arange(per_class)).reshape(-1))


def _classes_of(split: Split, labels: NDArray[np.int64]) -> Split:
    return dataclasses.replace(
        split, sizes=split.sizes[labels], shards=split.shards[labels], row_groups=split.row_groups[labels]
    )


def _make_new(
    rows: dict[str, Tensor],
    means_ND: Tensor,
    labels: NDArray[np.int64],
    is_new: NDArray[np.bool_],
    config: TrainConfig,
) -> None:
    """Let new classes start in the direction of their images, as long as random proxies are on average.

    Where a class has several proxies, the others begin near the first, each in a random direction of its own.
    """
    dim, per_class = config.model.dim, config.proxies.per_class
    first_ND = F.normalize(means_ND) * 3**-0.5
    random = uniform_rows(_rows_of(labels[is_new], per_class), dim, bound=dim**-0.5, seed=config.seed)
    random_NKD = random.view(-1, per_class, dim) / 2
    random_NKD[:, 0] = 0
    made = (first_ND[:, None] + random_NKD).flatten(0, 1)
    rows["weight"][_rows_of(np.flatnonzero(is_new), per_class)] = made.to(rows["weight"].dtype)

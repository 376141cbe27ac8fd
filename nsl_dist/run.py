"""A training run and the layout of its folder. Imports neither torch nor Ray."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from nsl_dist import storage
from nsl_dist.config import DEFAULT_STORAGE, DataConfig, ModelConfig, TrainConfig, config_from_dict
from nsl_dist.schedule import Schedule

if TYPE_CHECKING:
    from nsl_dist.data.shards import Manifest

# Files of a checkpoint:
MODEL_FILE = "embedder.safetensors"  # weights of the embedding model only
DESCRIPTION_FILE = "embedder.json"  # how to rebuild it
OPTIMIZER_FILE = "optimizer.safetensors"
RUN_FILE = "run.json"
# Files of a run:
BEST = "best"
RESULTS_FILE = "results.json"
GROWTH_FILE = "growth.json"
FAILURES_FILE = "failures.csv"
MLFLOW_ID_FILE = "mlflow_run_id"
_CLASSES_FILE = "classes.parquet"
_CONFIG_FILE = "config.json"
_DIGEST_FILE = "data_digest"
_LEFT_OUT_FILE = "left_out.json"
_CHECKPOINT = re.compile(r"checkpoint_(\d{9})")

RUN_VERSION = 1


class TrainingError(RuntimeError):
    """A training failed in a way that restarting it would not fix."""


class StoppedError(RuntimeError):
    """A training was stopped by a signal and can be continued.

    Attributes:
        signal: number of the signal.

    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class CheckpointRecord:
    """`run.json` of a checkpoint.

    Attributes:
        step: number of iterations before the checkpoint.
        num_classes: classes of the proxies, over all workers.
        world_size: number of workers that wrote it, each its own rows.
        digest: digest of the training data.
        config: fields of the run's `TrainConfig`, possibly from another release.
        version: format version; 0 for files without one.

    """

    step: int
    num_classes: int
    world_size: int
    digest: str
    config: dict[str, Any]
    version: int = RUN_VERSION

    @classmethod
    def read(cls, checkpoint: str) -> "CheckpointRecord":
        """Read the record of a checkpoint; unknown fields are ignored.

        Raises:
            FileNotFoundError: the checkpoint has no record.
            ValueError: the record is damaged or has a newer format.

        """
        location = storage.join(checkpoint, RUN_FILE)
        content = storage.read_bytes(location)
        try:
            fields = {"version": 0} | json.loads(content)
            record = cls(**_known(cls, fields))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{location} is damaged: {error}") from error
        if record.version > RUN_VERSION:
            raise ValueError(f"{location} has format version {record.version}, this release reads up to {RUN_VERSION}")
        return record

    def to_json(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def model_settings(self) -> TrainConfig:
        """Return the run's name, seed, model, data and precision; everything else has its default.

        Using the model requires no other options, so checkpoints of other releases work even if those have changed.
        """
        return TrainConfig(
            **{name: self.config[name] for name in ("run_name", "seed", "precision")},
            data=DataConfig(**_known(DataConfig, self.config["data"])),
            model=ModelConfig(**_known(ModelConfig, self.config["model"])),
        )


def _known(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    return {field.name: fields[field.name] for field in dataclasses.fields(kind) if field.name in fields}


def rows_file(rank: int, world_size: int) -> str:
    """Return the name of the file with one worker's rows of the class proxies in a checkpoint."""
    return f"proxies-{rank:05d}-of-{world_size:05d}.safetensors"


def unsent_file(storage_root: str, mlflow_run_id: str) -> str:
    """Return the location of the records not yet sent to MLflow."""
    return storage.join(storage_root, "unsent", f"{mlflow_run_id}.json")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        location: absolute path or URI.

    """

    location: str

    @classmethod
    def of(cls, config: TrainConfig) -> "RunFolder":
        """Return the folder of the configured run."""
        return cls(storage.join(storage.absolute(config.storage), "runs", str(config.run_name)))

    @classmethod
    def holding(cls, checkpoint: str) -> "RunFolder | None":
        """Return the run that a checkpoint, `best`, or the folder itself belongs to; None if it is of no run."""
        location = storage.absolute(checkpoint).rstrip("/")
        candidates = (cls(location), cls(location.rpartition("/")[0]))
        return next((each for each in candidates if each.mlflow_run_id() is not None), None)

    @classmethod
    def storage_of(cls, checkpoint: str) -> str:
        """Return the --storage of the run of a checkpoint; ~/nsl_dist if it is of no run."""
        folder = cls.holding(checkpoint)
        return folder.storage_root if folder is not None else storage.absolute(DEFAULT_STORAGE)

    @property
    def storage_root(self) -> str:
        """The --storage of the run; ~/nsl_dist if its folder was moved to elsewhere."""
        root, _, folder = self.parent.rpartition("/")
        return root if folder == "runs" else storage.absolute(DEFAULT_STORAGE)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.location.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """The folder of all runs."""
        return self.location.rpartition("/")[0]

    @property
    def best(self) -> str:
        """The best evaluated model."""
        return self.file(BEST)

    @property
    def test_classes(self) -> str:
        """The class folders that were for test, as --data.test-classes takes them."""
        return self.file("test_classes.txt")

    @property
    def results(self) -> str:
        """The results; a run that has them is finished."""
        return self.file(RESULTS_FILE)

    def file(self, name: str) -> str:
        """Return the location of any other file."""
        return storage.join(self.location, name)

    def checkpoint(self, step: int) -> str:
        """Return the location of the checkpoint after `step` iterations; names sort by step."""
        return self.file(f"checkpoint_{step:09d}")

    def newest_checkpoint(self) -> tuple[str, int] | None:
        """Return the location and step of the newest complete checkpoint, or None."""
        for step in sorted(self._checkpoint_steps(), reverse=True):
            if is_complete(self.checkpoint(step)):
                return self.checkpoint(step), step
        return None

    def prune_checkpoints(self, *, keep: int | None) -> None:
        """Delete incomplete checkpoints, which a crash can leave, and all but the newest `keep` complete ones.

        None keeps all complete checkpoints.
        """
        filesystem, path = storage.resolve(self.location)
        steps = sorted(self._checkpoint_steps())
        complete = [step for step in steps if is_complete(self.checkpoint(step))]
        kept = complete if keep is None else complete[-keep:]
        for step in set(steps).difference(kept):
            filesystem.delete_dir(f"{path}/{self.checkpoint(step).rpartition('/')[2]}")

    def keep_best(self, step: int, *, recall: dict[int, float]) -> None:
        """Copy the model of a checkpoint to `best`, unless that has at least the same recall at the lowest K.

        Args:
            step: step of the checkpoint.
            recall: recall of float embeddings by K.

        """
        checkpoint, scored = self.checkpoint(step), storage.join(self.best, "score.json")
        k, share = min(recall.items())
        if storage.exists(scored) and json.loads(storage.read_bytes(scored)).get(f"recall@{k}", 0.0) >= share:
            return
        for name in (MODEL_FILE, DESCRIPTION_FILE, RUN_FILE):
            storage.write_bytes(storage.join(self.best, name), storage.read_bytes(storage.join(checkpoint, name)))
        storage.write_bytes(scored, json.dumps({f"recall@{k}": share}).encode())

    def is_finished(self) -> bool:
        """Return whether the run has results."""
        return storage.exists(self.results)

    def begin(self, config: TrainConfig, *, digest: str, mlflow_run_id: str) -> None:
        """Record how the run was started; `mlflow_run_id` is written last and marks the record as complete."""
        storage.write_bytes(self.file(_CONFIG_FILE), json.dumps(dataclasses.asdict(config), indent=1).encode())
        storage.write_bytes(self.file(_DIGEST_FILE), digest.encode())
        storage.write_bytes(self.file(MLFLOW_ID_FILE), mlflow_run_id.encode())

    def started_with(self) -> TrainConfig | None:
        """Return the configuration that the run was started with, or None if it has not started.

        Raises:
            ValueError: the configuration is from another release.

        """
        location = self.file(_CONFIG_FILE)
        if not storage.exists(location):
            return None
        return config_from_dict(json.loads(storage.read_bytes(location)), location=location)

    def record_classes(self, manifest: "Manifest") -> None:
        """Record the training classes in the order of their proxies, for runs to come, and test folders as a list."""
        table = pa.table({"class_id": manifest.class_ids("train")})
        with storage.open_output(self.file(_CLASSES_FILE)) as stream:
            pq.write_table(table.replace_schema_metadata({"layout": manifest.layout}), stream, compression="zstd")
        if manifest.layout == "folders" and manifest.split_by == "classes":
            names = manifest.class_ids(manifest.evaluation_splits[0]).to_pylist()
            storage.write_bytes(self.test_classes, ("\n".join(names) + "\n").encode())

    def has_classes(self) -> bool:
        """Return whether the training classes are recorded, as versions before 0.2.0 did not."""
        return storage.exists(self.file(_CLASSES_FILE))

    def classes(self) -> pa.Table:
        """Return the recorded training classes, `class_id`, with their layout in the metadata."""
        filesystem, path = storage.resolve(self.file(_CLASSES_FILE))
        return pq.read_table(path, filesystem=filesystem)

    def tracking_uri(self) -> str | None:
        """Return --tracking.uri as the run was started with, whatever release that was."""
        text = self._read_text(_CONFIG_FILE)
        return json.loads(text)["tracking"]["uri"] if text is not None else None

    def mlflow_run_id(self) -> str | None:
        """Return MLflow's id of the run, or None if it has not started."""
        return self._read_text(MLFLOW_ID_FILE)

    def data_digest(self) -> str | None:
        """Return the digest of the run's training data, or None if it has not started."""
        return self._read_text(_DIGEST_FILE)

    def left_out_shards(self) -> list[str]:
        """Return the shards found damaged during the run, whose classes are left out from then on."""
        text = self._read_text(_LEFT_OUT_FILE)
        return list(json.loads(text)) if text is not None else []

    def leave_out(self, shards: list[str]) -> None:
        """Record the shards whose classes the next attempt leaves out."""
        storage.write_bytes(self.file(_LEFT_OUT_FILE), json.dumps(shards).encode())

    def _read_text(self, name: str) -> str | None:
        location = self.file(name)
        return storage.read_bytes(location).decode() if storage.exists(location) else None

    def _checkpoint_steps(self) -> list[int]:
        matches = (_CHECKPOINT.fullmatch(name) for name in _sizes(self.location))
        return [int(match[1]) for match in matches if match]


@dataclass(frozen=True)
class Run:
    """A run with a settled configuration, shared by the driver, the workers and evaluations during training.

    Attributes:
        config: the configuration, with everything that depends on the cluster filled in.

    """

    config: TrainConfig
    folder: RunFolder
    manifest: "Manifest"
    schedule: Schedule
    mlflow_run_id: str


def find_checkpoint(location: str) -> str:
    """Return the checkpoint at `location`, or the newest one if `location` is the folder of a run.

    Raises:
        FileNotFoundError: there is no checkpoint.

    """
    location = storage.absolute(location).rstrip("/")
    if storage.exists(storage.join(location, RUN_FILE)):
        return location
    newest = RunFolder(location).newest_checkpoint()
    if newest is None:
        raise FileNotFoundError(
            f"no checkpoint in {location}: it has neither {RUN_FILE} nor a complete checkpoint_*; give the folder of "
            "a run (STORAGE/runs/NAME) or of one of its checkpoints"
        )
    return newest[0]


def model_of_run(location: str) -> str | None:
    """Return the folder of the best model of a run, or of the checkpoint itself, or None if `location` is neither."""
    location = storage.absolute(location).rstrip("/")
    found = [
        each for each in (location, storage.join(location, BEST)) if storage.exists(storage.join(each, MODEL_FILE))
    ]
    return found[0] if found else None


def is_complete(checkpoint: str) -> bool:
    """Return whether all files of a checkpoint exist and are not empty; each file appears complete or not at all."""
    there = {name for name, size in _sizes(checkpoint).items() if size}
    if RUN_FILE not in there:
        return False
    try:
        world_size = json.loads(storage.read_bytes(storage.join(checkpoint, RUN_FILE)))["world_size"]
    except (ValueError, KeyError):
        return False  # damaged after it was written
    rows = {rows_file(rank, world_size) for rank in range(world_size)}
    return there >= rows | {MODEL_FILE, DESCRIPTION_FILE, OPTIMIZER_FILE}


def _sizes(location: str) -> dict[str, int | None]:
    """Return the size in bytes of each file in a folder (None for subfolders); empty if the folder does not exist."""
    filesystem, path = storage.resolve(location)
    return {info.base_name: info.size for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))}

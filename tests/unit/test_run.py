"""The folder of a run: what is written to it is found again, by this release and of the one before."""

import dataclasses
import json
from pathlib import Path

import pytest

from nsl_dist.config import TrainConfig
from nsl_dist.run import CheckpointRecord, RunFolder, find_checkpoint

WRITTEN_BY_0_1_0 = Path(__file__).parents[1] / "support" / "run_0.1.0.json"


def write_record(checkpoint: Path, **changes: object) -> None:
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "run.json").write_text(json.dumps(json.loads(WRITTEN_BY_0_1_0.read_text()) | changes))


def test_a_record_of_the_release_before_is_read(tmp_path: Path) -> None:
    content = json.loads(WRITTEN_BY_0_1_0.read_text())
    assert "version" not in content  # it had none
    of_later = {**content["config"], "margin": 0.1, "model": {**content["config"]["model"], "sub_centres": 3}}
    del of_later["optim"]["warmup_steps"]
    write_record(tmp_path, config=of_later, hostname="a")
    record = CheckpointRecord.read(str(tmp_path))
    assert (record.version, record.step, record.num_classes, record.world_size) == (0, 4, 11, 1)
    settings = record.model_settings()
    assert (settings.run_name, settings.precision, settings.data.root, settings.data.layout) == (
        "shop", "auto", "/data/sop", "sop"
    )  # fmt: skip
    assert (settings.model.backbone, settings.model.dim, settings.data.image_size) == ("resnet18", 16, 32)


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    record = CheckpointRecord(7, 100, 2, "d" * 64, dataclasses.asdict(TrainConfig(run_name="x")))
    (tmp_path / "run.json").write_bytes(record.to_json())
    assert CheckpointRecord.read(str(tmp_path)) == record
    assert record.model_settings() == TrainConfig(run_name="x")


def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CheckpointRecord.read(str(tmp_path))
    write_record(tmp_path, version=2)
    with pytest.raises(ValueError, match=r"run.json has format version 2, this release reads up to 1"):
        CheckpointRecord.read(str(tmp_path))
    for content in ("{", "[]", '{"step": 4}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run.json is damaged"):
            CheckpointRecord.read(str(tmp_path))


def test_a_checkpoint_of_a_newer_release_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    checkpoint = Path(folder.checkpoint(4))
    write_record(checkpoint, version=2)
    files = ("embedder.safetensors", "embedder.json", "optimizer.safetensors", "proxies-00000-of-00001.safetensors")
    for name in files:
        (checkpoint / name).write_bytes(b"x")
    folder.prune_checkpoints(keep=None)
    assert folder.newest_checkpoint() == (str(checkpoint), 4)
    assert find_checkpoint(f"{tmp_path}/") == find_checkpoint(str(checkpoint)) == str(checkpoint)


def test_what_a_run_was_started_with_is_found_again(tmp_path: Path) -> None:
    config = TrainConfig(storage=str(tmp_path), run_name="x", num_workers="1..2")
    folder = RunFolder.of(config)
    assert folder.location == f"{tmp_path}/runs/x"
    assert (folder.started_with(), folder.mlflow_run_id(), folder.data_digest()) == (None, None, None)
    folder.begin(config, digest="d", mlflow_run_id="m")
    assert (folder.started_with(), folder.mlflow_run_id(), folder.data_digest()) == (config, "m", "d")
    assert folder.left_out_shards() == []
    folder.leave_out(["train-00001.parquet"])
    assert folder.left_out_shards() == ["train-00001.parquet"]
    assert not folder.is_finished()
    Path(folder.results).write_text("{}")
    assert folder.is_finished()


def test_the_best_model_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    for step, share in ((1, 0.5), (2, 0.7), (3, 0.6)):
        checkpoint = Path(folder.checkpoint(step))
        write_record(checkpoint, step=step)
        for name in ("embedder.safetensors", "embedder.json"):
            (checkpoint / name).write_text(str(step))
        folder.keep_best(step, recall={10: 0.9, 1: share})
    assert CheckpointRecord.read(folder.best).step == 2
    assert Path(folder.best, "embedder.safetensors").read_text() == "2"

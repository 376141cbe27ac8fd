"""Runs that start from the proxies of others: every class has its own, whoever has written and reads them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig
from nsl_dist.data.shards import CLASSES_SCHEMA, Manifest
from nsl_dist.run import Run, RunFolder
from nsl_dist.schedule import Schedule
from nsl_dist.training import checkpoint
from nsl_dist.training.growth import check_source, growth_of, match_classes, write_start
from nsl_dist.training.step import TrainingStep
from tests.support.checkpoints import write_step
from tests.support.ranks import Ranks

BEFORE = [f"class {number}" for number in range(11)]
AFTER = [f"class {number}" for number in (9, 2, 3, 10, 0, 5, 4)]
CONFIG = TrainConfig(
    precision="float32",
    data=DataConfig(batch_size=12, images_per_class=2, image_size=32),
    model=ModelConfig(backbone="timm/test_resnet", dim=8),
    optim=OptimConfig(epochs=2),
)


def manifest_of(root: Path, class_ids: list[str], *, tested: list[str] | None = None) -> Manifest:
    root.mkdir(parents=True)
    splits = {"train": class_ids, "test": tested or ["unseen"]}
    rows = [
        (split, label, class_id, 3, "shard", label)
        for split, ids in splits.items()
        for label, class_id in enumerate(ids)
    ]
    columns = [pa.array(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.Table.from_arrays(columns, schema=CLASSES_SCHEMA), root / "classes.parquet")
    counts = {
        split: {"num_images": 3 * len(ids), "num_classes": len(ids), "num_singletons": 0}
        for split, ids in splits.items()
    }
    return Manifest(str(root), "folders", "photos", f"digest of {root.name}", counts, [], [])


def training_of(config: TrainConfig, num_classes: int, rank: int, world_size: int) -> TrainingStep:
    return TrainingStep(
        config,
        num_classes=num_classes,
        schedule=Schedule(config.optim, 5),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        group=dist.group.WORLD if world_size > 1 else None,
    )


def train_and_write(rank: int, world_size: int, config: TrainConfig, folder: Path) -> None:
    training = training_of(config, len(BEFORE), rank, world_size)
    size = config.data.batch_size // world_size
    for step in range(3):
        images = np.random.default_rng((step, rank)).integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)
        labels = np.random.default_rng(step).integers(0, len(BEFORE), config.data.batch_size)
        training.run(torch.from_numpy(images), labels, step=step)
    write_step(training, folder, step=3)


def rows_by_class(training: TrainingStep, class_ids: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the rows of this worker's classes, by class and name."""
    partition, per_class = training.proxies.partition, training.config.proxies.per_class
    mine = class_ids[partition.start : partition.stop]
    rows = {name: tensor.unflatten(0, (-1, per_class)) for name, tensor in training.proxies.state().items()}
    return {each: {name: tensor[place].clone() for name, tensor in rows.items()} for place, each in enumerate(mine)}


def check_every_class_has_its_own(rank: int, world_size: int, config: TrainConfig, old: Path, new: Path) -> None:
    before = training_of(config, len(BEFORE), 0, 1)
    checkpoint.load(str(old), before, digest="d")
    after = training_of(config, len(AFTER), rank, world_size)
    checkpoint.load(str(new), after, digest="digest of new")
    expected, found = rows_by_class(before, BEFORE), rows_by_class(after, AFTER)
    assert found
    for class_id, rows in found.items():
        assert rows.keys() == expected[class_id].keys()
        for name, tensor in rows.items():
            assert torch.equal(tensor, expected[class_id][name]), (class_id, name)
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name]), name
    momenta = []
    for training in (before, after):
        assert training.optimizer is not None
        states = [training.optimizer.state[parameter] for parameter in training.model.parameters()]
        momenta.append(torch.cat([state["momentum_buffer"].flatten() for state in states]))
    assert torch.equal(*momenta)
    # Rows that were not sampled catch up with what they have missed.
    state, wanted = after.proxies.complete(step=0), before.proxies.complete(step=3)
    part = after.proxies.partition.rows(config.proxies.per_class)
    places = [BEFORE.index(each) for each in AFTER]
    weight = wanted["weight"].unflatten(0, (len(BEFORE), -1))[places].flatten(0, 1)[part.start : part.stop]
    assert torch.equal(state["weight"], weight)


def started(tmp_path: Path, config: TrainConfig) -> tuple[TrainConfig, RunFolder]:
    """Return a configuration that starts from a run, and the folder of that."""
    source = dataclasses.replace(config, storage=str(tmp_path), run_name="old")
    folder = RunFolder.of(source)
    folder.begin(source, digest="d", mlflow_run_id="m")
    folder.record_classes(manifest_of(tmp_path / "before", BEFORE, tested=["class 20", "class 21"]))
    return dataclasses.replace(source, run_name="new", init_from=folder.location), folder


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"sample_rate": 0.3}, 3, 2),
        ({"per_class": 3}, 2, 3),
        ({"per_class": 2, "optimizer": "adagrad", "dtype": "bfloat16", "sample_rate": 0.3}, 1, 4),
    ],
)
def test_every_class_keeps_its_own_proxies(
    options: dict[str, Any], before: int, after: int, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsl_dist.training.growth.BYTES_AT_ONCE", 600)  # several files
    monkeypatch.setattr("nsl_dist.training.growth.ROWS_BETWEEN", 2)
    config, folder = started(tmp_path, dataclasses.replace(CONFIG, proxies=ProxyConfig(**options)))
    ranks.run(train_and_write, before, config, Path(folder.checkpoint(3)))
    check_source(config)
    manifest = manifest_of(tmp_path / "new", AFTER)
    run = Run(config, RunFolder.of(config), manifest, Schedule(config.optim, 5), "m")
    write_start(run, match_classes(config, manifest), num_gpus=0)
    assert run.folder.newest_checkpoint() == (run.folder.checkpoint(0), 0)
    growth = growth_of(run.folder)
    assert growth is not None
    assert growth.sentence() == f"7 known classes, 0 new, 4 vanished; from {folder.checkpoint(3)}"
    places = (Path(folder.checkpoint(3)), Path(run.folder.checkpoint(0)))
    ranks.run(check_every_class_has_its_own, after, config, *places)


def test_new_classes_start_where_their_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as random proxies on average, with nothing to catch up, and near each other if they are several."""
    means = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    monkeypatch.setattr("nsl_dist.training.growth.mean_embeddings", lambda *arguments, **options: means)
    proxies = ProxyConfig(per_class=2, sample_rate=0.3)
    config, folder = started(tmp_path, dataclasses.replace(CONFIG, proxies=proxies))
    train_and_write(0, 1, config, Path(folder.checkpoint(3)))
    averaged = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema=0.9))
    manifest = manifest_of(tmp_path / "new", ["class 30", *AFTER, "class 31"])
    run = Run(averaged, RunFolder.of(config), manifest, Schedule(config.optim, 5), "m")
    write_start(run, match_classes(averaged, manifest), num_gpus=0)
    training = training_of(averaged, 9, 0, 1)
    checkpoint.load(run.folder.checkpoint(0), training, digest="digest of new")
    assert training.average is not None
    for ours, theirs in zip(training.average.model.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    before = training.proxies.weight.values.clone().unflatten(0, (9, 2))
    after = training.proxies.complete(step=0)["weight"].unflatten(0, (9, 2))
    assert not torch.equal(after[1:8], before[1:8])  # the others were not sampled in all steps
    for place, mean in ((0, means[0]), (8, means[1])):
        assert torch.equal(after[place], before[place])
        direction = torch.from_numpy(mean / np.linalg.norm(mean))
        torch.testing.assert_close(after[place, 0], direction * 3**-0.5)
        near = torch.cosine_similarity(after[place, 1], direction, dim=0)
        assert 0.7 < float(near) < 0.999


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config, folder = started(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*/old"):
        check_source(config)
    train_and_write(0, 1, config, Path(folder.checkpoint(3)))
    check_source(config)
    for changes, message in (
        ({"model": dataclasses.replace(CONFIG.model, dim=16)}, "--model.dim 8 -> 16; use the same"),
        ({"proxies": ProxyConfig(per_class=2)}, "--proxies.per-class 1 -> 2; use the same"),
        ({"optim": dataclasses.replace(CONFIG.optim, optimizer="adamw")}, "--optim.optimizer sgd -> adamw"),
        ({"optim": dataclasses.replace(CONFIG.optim, new_layers_epochs=1)}, "set --optim.new-layers-epochs 0"),
        ({"model": dataclasses.replace(CONFIG.model, batch_norm="frozen")}, "--model.batch-norm local -> frozen"),
    ):
        with pytest.raises(ValueError, match=message):
            check_source(dataclasses.replace(config, **changes))
    with pytest.raises(ValueError, match=r"has class class 2 twice; merge the two, or rename one"):
        match_classes(config, manifest_of(tmp_path / "twice", [*AFTER, "class 2"]))
    message = rf"2 of the test classes, such as class 1, are among those .*: --data.test-classes {folder.test_classes}"
    with pytest.raises(ValueError, match=message):
        match_classes(config, manifest_of(tmp_path / "seen", AFTER, tested=["class 1", "class 40", "class 6"]))
    assert Path(folder.test_classes).read_text().split("\n") == ["class 20", "class 21", ""]
    other = dataclasses.replace(manifest_of(tmp_path / "other", AFTER), layout="sop")
    with pytest.raises(ValueError, match=r"is of layout folders, .*/other of sop: classes differ"):
        match_classes(config, other)
    folder.keep_best(3, recall={1: 0.5})
    with pytest.raises(ValueError, match=r"best is no complete checkpoint: give the folder of a run, or take only its"):
        check_source(dataclasses.replace(config, init_from=folder.best))
    (tmp_path / "runs" / "old" / "classes.parquet").unlink()
    with pytest.raises(ValueError, match=r"checkpoint_000000003 is not in the folder of a run that names its classes"):
        check_source(config)

"""Workers, nodes, the driver and the head are really killed, storage and MLflow really go away: nothing is lost."""

import contextlib
import dataclasses
import json
import multiprocessing
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from multiprocessing.managers import BaseManager
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import torch.distributed as dist
from chaos import Driver, Nodes, compare

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig, config_from_dict
from nsl_dist.data.sampler import ClassBalancedPlan, PlannedBatch
from nsl_dist.data.shards import DamagedShardError, Manifest, _open_shard, find_data, load_manifest, open_data
from nsl_dist.data.stream import fetch
from nsl_dist.data.transforms import augment
from nsl_dist.run import RunFolder, TrainingError
from nsl_dist.schedule import Schedule
from nsl_dist.tracking.tracker import Tracker
from nsl_dist.training.checkpoint import Checkpointer
from nsl_dist.training.fit import drop_damaged_record
from nsl_dist.training.step import TrainingStep
from nsl_dist.training.train import as_started, begin, refuse_to_change, train
from tests.support.checkpoints import write_step
from tests.support.images import write_sop
from tests.support.mlflow_server import start_mlflow, stop_mlflow
from tests.support.processes import PATIENCE, listens
from tests.support.ranks import Ranks


class NodesManager(BaseManager):
    """A process of their own for the nodes: Ray Data does not find its way from one Ray to another in one process."""


NodesManager.register("Nodes", Nodes)
SIZES = {"train": [7] * 20, "test": [4] * 5}  # 140 images of 20 classes


def undisturbed(rank: int, world_size: int, shards: str, run_dir: str) -> None:
    """Train a run of `run_dir` in a plain loop over its plan, without Ray, to its end."""
    location = Path(run_dir) / "config.json"
    config = config_from_dict(json.loads(location.read_text()), location=str(location))
    assert config.threads is not None
    torch.set_num_threads(config.threads)
    manifest = load_manifest(shards)
    split = manifest.split("train")
    plan = ClassBalancedPlan(split.sizes, config.data.batch_size, config.data.images_per_class, config.seed)
    training = TrainingStep(
        config,
        num_classes=split.num_classes,
        schedule=Schedule(config.optim, plan.steps_per_epoch),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        group=dist.group.WORLD,
    )
    size = plan.batch_size // world_size
    positions = range(rank * size, (rank + 1) * size)
    for step in range(training.schedule.num_steps):
        resized = fetch(plan.part(step, rank=rank, world_size=world_size), split, config.data)
        images = augment(resized, positions, config.data, seed=config.seed, step=step)
        training.run(images, plan.batch(step).labels, step=step)
    training.proxies.complete(step=step + 1)
    undisturbed_run = RunFolder(str(Path(run_dir).with_name("undisturbed")))
    write_step(training, Path(undisturbed_run.checkpoint(step + 1)), step=step + 1)


@contextlib.contextmanager
def started(num_nodes: int, tmp_path: Path, run_name: str, flags: list[str]) -> Iterator[tuple[Nodes, Driver]]:
    """Nodes, and a training on them in a process of its own."""
    root = write_sop(tmp_path / "raw", SIZES)
    small = [
        "--recipe=laptop_scratch", "--max-failures=-1", "--tracking.every=5", "--data.batch-size=12",
        "--data.images-per-class=2",
        "--data.image-size=32", "--model.dim=16", "--model.backbone=shufflenet_v2_x0_5",
        "--eval.no-nmi",
    ]  # fmt: skip
    arguments = [f"--data.root={root}", f"--storage={tmp_path}", f"--run-name={run_name}", *small, *flags]
    # Not forked: a copy of a process with threads may wait for a lock for ever.
    with NodesManager(ctx=multiprocessing.get_context("spawn")) as manager:
        nodes = manager.Nodes(num_nodes)  # type: ignore[attr-defined]
        try:
            with Driver(arguments, address=nodes.address(), log=tmp_path / "log") as driver:
                yield nodes, driver
        finally:
            nodes.kill_all()


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path: Path, ranks: Ranks) -> None:
    """A worker, a node and the head are killed, storage fails, the driver is stopped; the run ends as if not."""
    flags = ["--num-workers=2", "--checkpoint.every=10", "--optim.epochs=10", "--proxies.sample-rate=0.5"]
    with started(2, tmp_path, "disturbed", flags) as (nodes, driver):
        driver.wait_for_step(15)
        rng = random.Random(0)
        assert nodes.kill_worker(rng)
        driver.wait_for_attempt(2)
        driver.wait_for_step(40)
        nodes.kill_node(rng)
        nodes.add()
        driver.wait_for_attempt(3)
        driver.wait_for_step(65)
        record = tmp_path / "runs" / "disturbed" / "checkpoint_manager_snapshot.json"  # Ray Train's own
        record.unlink()
        record.mkdir()
        driver.wait(lambda: "controller failed" in driver.output, "the failure of its storage")
        record.rmdir()
        driver.wait_for_attempt(4)
        driver.wait_for_step(75)
        driver.process.terminate()
        assert driver.process.wait(PATIENCE) == 143, driver.output
        stopped_at = driver.step
        nodes.kill_all()
        nodes.start()
        driver.start(nodes.address())
        assert driver.process.wait(900) == 0, driver.output

    first, after_worker, after_node, after_storage, after_stop = driver.attempts
    assert first == 1
    assert after_worker > 10
    assert after_node > after_worker
    assert after_storage > 60
    assert after_stop >= stopped_at  # it had left with a checkpoint
    assert "SIGTERM: the workers write a checkpoint and leave" in driver.output
    (shards,) = (tmp_path / "shards").iterdir()
    ranks.run(undisturbed, 2, str(shards), str(tmp_path / "runs" / "disturbed"))
    assert compare(str(tmp_path / "runs" / "disturbed"), str(tmp_path / "runs" / "undisturbed")) == 0

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("raw").experiment_id])
    assert tracked.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(tracked.info.run_id, "loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 10 * 11
    results = json.loads((tmp_path / "runs" / "disturbed" / "results.json").read_text())
    assert results["num_queries"] == 20


@pytest.mark.slow
def test_nodes_that_come_and_go_resize_an_elastic_run(tmp_path: Path) -> None:
    """The head has room for one worker, so has the node, which is taken away after a notice; then another comes."""
    flags = ["--num-workers=1..2", "--checkpoint.every=1000", "--optim.epochs=1000"]
    with started(1, tmp_path, "elastic", flags) as (nodes, driver):
        driver.wait_for_step(20)
        nodes.preempt_node(seconds=15)
        driver.wait_for_attempt(2)
        driver.wait_for_step(driver.attempts[1] + 20)
        nodes.add()
        driver.wait_for_attempt(3)
        driver.wait_for_step(driver.attempts[2] + 20)
        stopped_at = driver.step
        driver.process.terminate()
        assert driver.process.wait(PATIENCE) == 143, driver.output
    workers = re.findall(r"training (?:continues )?on (\d) worker", driver.output)
    assert workers == ["2", "1", "2"]
    _, after_notice, after_growth = driver.attempts
    assert after_notice > 20  # a checkpoint was written for it
    assert after_growth > after_notice
    newest = RunFolder(str(tmp_path / "runs" / "elastic")).newest_checkpoint()
    assert newest is not None
    assert newest[1] >= stopped_at


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_lasting_errors_end_the_run_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A damaged shard does; with the flag the run starts again without its classes, up to a loss that is nan."""
    root = write_sop(tmp_path / "raw", SIZES)
    manifest = open_data(find_data(str(root), layout="sop"), storage_root=str(tmp_path), max_undecodable=0)
    split = manifest.split("train")
    path = Path(manifest.root) / split.shard_names[0]
    path.write_bytes(b"\0" * path.stat().st_size)  # of the right size, so that only reading it tells
    config = TrainConfig(
        storage=str(tmp_path),
        run_name="faults",
        max_failures=1,
        data=DataConfig(root=str(root), batch_size=10, images_per_class=2, image_size=32),
        model=ModelConfig(backbone="timm/test_resnet", dim=16),
        optim=OptimConfig(epochs=8, lr=1e18, warmup_steps=0),
    )
    with pytest.raises(TrainingError, match=f"shard .*{split.shard_names[0]}"):
        train(config)
    printed = capfd.readouterr()
    assert ": training " not in printed.out
    assert "Traceback" not in printed.out + printed.err
    assert "DamagedShardError" in (tmp_path / "runs" / "faults" / "error.txt").read_text()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_damaged_shards=1))
    message = r"step \d+: embeddings are nan or infinite: \d+ of the 10 of worker 0.*; there is no checkpoint yet"
    with pytest.raises(TrainingError, match=message):
        train(config)
    assert RunFolder(str(tmp_path / "runs" / "faults")).left_out_shards() == [split.shard_names[0]]
    num_classes = int((split.shards == 0).sum())
    lines = [line for line in capfd.readouterr().out.splitlines() if ": training " in line]
    assert [line.partition(": ")[2] for line in lines] == [
        f"training on 1 worker, without {num_classes} classes of damaged shards"
    ]


def test_a_damaged_shard_is_named(tmp_path: Path, shards: Manifest) -> None:
    manifest = load_manifest(str(shutil.copytree(shards.root, tmp_path / "shards")))
    split = manifest.split("train")
    path = Path(manifest.root) / split.shard_names[0]
    content = bytearray(path.read_bytes())
    label = int(np.flatnonzero(split.shards == 0)[0])
    image = split.read_bag(label, ["image"])["image"][0].as_py()
    place = content.index(image)
    content[place : place + 40] = b"\0" * 40
    path.write_bytes(content)
    part = PlannedBatch(labels=np.array([label]), indices=np.array([0]))
    with pytest.raises(DamagedShardError, match=f"{split.shard_names[0]}: image 0 of class {label}: .*max-damaged"):
        fetch(part, split, DataConfig())
    path.unlink()
    _open_shard.cache_clear()
    with pytest.raises(DamagedShardError, match=f"{split.shard_names[0]}: .*No such file"):
        fetch(part, split, DataConfig())
    (path.parent / "manifest.json").unlink()  # no shard is damaged where nothing can be read
    with pytest.raises(FileNotFoundError, match=r"manifest.json"):
        fetch(part, split, DataConfig())


def test_a_changed_configuration_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(storage=str(tmp_path), run_name="x", num_workers=1, optim=OptimConfig(lr=0.01))
    folder = RunFolder.of(config)
    assert as_started(config) == config  # it was not
    free = dataclasses.replace(config, num_workers=2, device="cpu", max_failures=7, threads=3)
    folder.begin(free, digest="d", mlflow_run_id="m")
    refuse_to_change(config)
    settled = as_started(dataclasses.replace(config, num_workers=None))
    assert (settled.device, settled.num_workers, settled.threads) == ("cpu", 2, 3)
    assert as_started(dataclasses.replace(config, num_workers=4)).num_workers == 4
    changed = dataclasses.replace(config, optim=OptimConfig(lr=0.02), proxies=ProxyConfig(sample_rate=0.1))
    with pytest.raises(ValueError, match=r"--proxies.sample-rate 1.0 -> 0.1; --optim.lr 0.01 -> 0.02; use the same"):
        refuse_to_change(changed)
    Path(folder.file("config.json")).write_text(json.dumps(dataclasses.asdict(config) | {"margin": 0.1}))
    with pytest.raises(ValueError, match=r"config.json is of another release of nsl_dist: .* TrainConfig: margin"):
        refuse_to_change(config)


def test_other_data_is_refused(tmp_path: Path, shards: Manifest) -> None:
    config = TrainConfig(storage=str(tmp_path), run_name="x", num_workers=1)
    folder, tracker = RunFolder.of(config), Tracker(None, storage_root=str(tmp_path))
    first = begin(config, folder, shards, tracker)
    assert begin(config, folder, shards, tracker) == first
    with pytest.raises(ValueError, match=r"with data of digest .*, .* has fffff; give the same --data.root"):
        begin(config, folder, dataclasses.replace(shards, digest="fffff"), tracker)


def test_a_damaged_record_of_ray_train_is_dropped(tmp_path: Path) -> None:
    record = tmp_path / "checkpoint_manager_snapshot.json"
    (tmp_path / "checkpoint_000000001").mkdir()
    for content, is_damaged in (
        ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_000000001"}]}', False),
        ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_000000002"}]}', True),
        ('{"checkpoint_results": [{"check', True),
    ):
        record.write_text(content)
        drop_damaged_record(RunFolder(str(tmp_path)))
        assert record.exists() is not is_damaged


def test_storage_that_fails_for_a_while(tmp_path: Path) -> None:
    """A folder that cannot be made, until it can: the checkpoint is written, the one before is still there."""
    config, folder = TrainConfig(data=DataConfig(image_size=32)), RunFolder(str(tmp_path / "runs"))
    training = TrainingStep(config, num_classes=7, schedule=Schedule(config.optim, 3), device=torch.device("cpu"))
    write_step(training, Path(folder.checkpoint(1)), step=1)
    blocked = Path(folder.checkpoint(2))
    blocked.write_text("in the way")
    failures: list[OSError] = []
    checkpointer = Checkpointer(training, digest="d")
    checkpointer.copy(step=2)
    writing = threading.Thread(target=checkpointer.write, args=(str(blocked),), kwargs={"on_failure": failures.append})
    writing.start()
    while not failures:
        time.sleep(0.05)
    blocked.unlink()
    writing.join(PATIENCE)
    assert not writing.is_alive()
    assert folder.newest_checkpoint() == (str(blocked), 2)


@pytest.mark.slow
def test_mlflow_that_is_away_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is logged while the server is down is there once it is up again, even if the run ended in between."""
    # Below those that the system gives to others while the server is down.
    port = next(port for port in range(20_000, 32_000) if not listens(port))
    store = f"sqlite:///{tmp_path}/server.db"

    server = start_mlflow(store, port=port, folder=tmp_path)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        tracker = Tracker(None, storage_root=str(tmp_path))
        data = Manifest("/data", "sop", source="/raw", digest="d", splits={}, undecodable=[], shards=[])
        tracker.start(TrainConfig(run_name="away"), data, cluster="1 node", git_commit=None)
        tracker.log({"loss": 3.0}, step=1)
        stop_mlflow(server)
        for step in (2, 3, 4):
            tracker.log({"loss": float(step)}, step=step)
        server = start_mlflow(store, port=port, folder=tmp_path)
        tracker.log({"loss": 5.0}, step=5)
        tracker.wait()
        client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
        assert [metric.step for metric in client.get_metric_history(tracker.run_id, "loss")] == [1, 2, 3, 4, 5]
        said = capsys.readouterr().out
        assert said.count("does not answer") == 1
        assert "answers again and has all records" in said
        assert list((tmp_path / "unsent").iterdir()) == []

        stop_mlflow(server)
        monkeypatch.setattr("nsl_dist.tracking.tracker.MLFLOW_PATIENCE", 0.0)
        tracker.log({"loss": 6.0}, step=6)
        tracker.log_file("results.json", "{}")
        tracker.finish(status="FINISHED")
        kept = tmp_path / "unsent" / f"{tracker.run_id}.json"
        assert f"3 of its records are kept in {kept}" in capsys.readouterr().out

        with pytest.raises(ValueError, match=r"the tracking URI .* cannot be used"):
            Tracker(f"http://127.0.0.1:{port}", storage_root=str(tmp_path))
        resumed = Tracker(f"http://127.0.0.1:{port}", storage_root=str(tmp_path), may_be_away=True)
        resumed.resume(tracker.run_id)  # by the driver that comes after
        for step in (6, 7):  # one of them once more
            resumed.log({"loss": float(step)}, step=step, once=True)
        server = start_mlflow(store, port=port, folder=tmp_path)
        monkeypatch.setattr("nsl_dist.tracking.tracker.MLFLOW_PATIENCE", PATIENCE)
        resumed.finish(status="FINISHED")
        assert not kept.exists()
        assert [metric.step for metric in client.get_metric_history(tracker.run_id, "loss")] == [1, 2, 3, 4, 5, 6, 7]
        assert client.get_run(tracker.run_id).info.status == "FINISHED"
        assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["results.json"]
    finally:
        stop_mlflow(server)

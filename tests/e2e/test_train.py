"""The main job as its user runs it: raw images in, trained model, results and MLflow run out."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest
import torch

from nsl_dist.config import DataConfig, ModelConfig, TrainConfig
from tests.conftest import write_sop

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    "--optim.epochs=2", "--data.image-size=16", "--model.dim=16", "--data.batch-size=20", "--tracking.every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sop(tmp_path_factory.mktemp("raw"), {"train": [7] * 20, "test": [5] * 8 + [1]})


def job(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "jobs/train_sop.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two workers, half of the classes sampled, evaluated after every epoch."""
    storage = tmp_path_factory.mktemp("storage")
    done = job(
        f"--data.root={root}", f"--storage={storage}", "--run-name=first", "--num-workers=2", *SMALL,
        "--proxies.sample-rate=0.5", "--eval.every=1", "--eval.untrained", "--eval.num-shards=3", "--checkpoint.keep=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return storage, done.stdout


def test_results(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    results = json.loads((storage / "runs" / "first" / "results.json").read_text())
    for result in (results, results["untrained"]):
        for kind in ("float", "binary"):
            shares = [result["recall"][kind][str(k)] for k in (1, 10, 100, 1000)]
            assert all(0 <= a <= b <= 1 for a, b in pairwise(shares))
            assert shares[-1] == 40 / 41  # the class with one image can only miss
    assert (results["num_queries"], results["num_classes"], results["num_singleton_classes"]) == (41, 9, 1)
    assert results["steps"] == 2 * (140 // 20)
    assert set(results["seconds"]) == {"setup", "train", "evaluate"}
    assert results["images_per_second"] > 0
    assert results["train_images_per_second"] > 0


def test_output_says_what_it_does_and_found(finished: tuple[Path, str]) -> None:
    storage, output = finished
    for text in (
        "140 images of 20 classes",
        "41 images of 9 unseen classes, 1 with one image, sure misses",
        "20 x 16, 10 on each worker, 50% of them sampled",
        "4 classes x 5 images = 20, 10 on each worker",
        "step 14/14",
        "images/s  data wait",
        "untrained: float recall@1/10/100/1000",
        "step 7: float recall@1/10/100/1000",
    ):
        assert text in output
    last = output.strip().splitlines()[-2:]
    assert last[0] == f"results: {storage}/runs/first/results.json"
    assert last[1].endswith(f"mlflow ui --backend-store-uri sqlite:///{storage}/mlflow.db")


def test_mlflow_run(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sop").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params["proxies.sample_rate"] == "0.5"
    assert len(run.data.params["data.digest"]) == 64
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 4, 6, 8, 10, 12, 14]
    recalls = client.get_metric_history(run.info.run_id, "recall_at_1_float")
    assert [metric.step for metric in sorted(recalls, key=lambda m: m.step)] == [0, 7, 14]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["results.json"]


def test_checkpoint(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    (directory,) = (storage / "runs" / "first").glob("checkpoint_*")
    run = json.loads((directory / "run.json").read_text())
    assert (run["step"], run["num_classes"], run["config"]["seed"]) == (14, 20, 0)
    model = torch.load(directory / "model.pt", weights_only=True)
    assert model["linear.weight"].shape == (16, 512)


def test_finished_run_is_not_trained_again(finished: tuple[Path, str], root: Path) -> None:
    storage, _ = finished
    done = job(f"--data.root={root}", f"--storage={storage}", "--run-name=first", *SMALL)
    assert done.returncode == 2
    assert "error: run first is finished: see" in done.stderr


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 8}, r"has [45] CPUs, this run needs 9: 8 training workers with 1 CPUs each, 1 to read"),
        ({"device": "cuda"}, r"the cluster has 0 GPUs, this run needs 1"),
        ({"model": ModelConfig(backbone="resnet81")}, r"unknown --model.backbone 'resnet81'"),
        ({"model": ModelConfig(batch_norm="sync")}, r"--model.batch-norm sync needs GPUs"),
        ({"data": "batch"}, r"a batch of 120 images with 5 of each class needs 24 classes, .* has 20"),
        ({"data": "root"}, r"no such folder: .*/missing"),
        ({"storage": "file"}, r"--storage .* cannot be written"),
    ],
)
def test_bad_input_ends_before_training(changes: dict, message: str, root: Path, tmp_path: Path) -> None:
    from nsl_dist.training.run import train

    (tmp_path / "file").write_text("")
    data = {"batch": DataConfig(root=str(root), batch_size=120), "root": DataConfig(root=str(root / "missing"))}
    fields = {"storage": str(tmp_path), "data": DataConfig(root=str(root)), "run_name": "bad"} | changes
    fields["data"] = data.get(changes.get("data"), fields["data"])
    if fields["storage"] == "file":
        fields["storage"] = str(tmp_path / "file" / "below")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(TrainConfig(**fields))
    assert not (tmp_path / "runs" / "bad" / "mlflow_run_id").exists()


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head started by hand on loopback, with a dashboard that takes jobs."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, dashboard = one.getsockname()[1], two.getsockname()[1]
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    flags = [f"--port={port}", "--num-cpus=3", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen([*command, *flags], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(120):
            if process.poll() is not None or _listens(dashboard):
                break
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                continue
        assert process.poll() is None, (tmp_path / "head.log").read_text()
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        process.terminate()
        process.wait(60)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_ray_job_submit(head: tuple[str, dict[str, str]], root: Path, tmp_path: Path) -> None:
    address, environment = head
    ray = str(Path(sys.executable).parent / "ray")
    submit = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable]
    flags = [f"--data.root={root}", f"--storage={tmp_path}/storage", "--run-name=submitted", *SMALL]
    done = subprocess.run(
        [*submit, "jobs/train_sop.py", *flags],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 14/14" in done.stdout
    assert f"results: {tmp_path}/storage/runs/submitted/results.json" in done.stdout
    assert (tmp_path / "storage" / "runs" / "submitted" / "results.json").exists()


def test_real_characters(omniglot: Path, tmp_path: Path) -> None:
    """A fifth of the laptop recipe's epochs lifts recall@1 of unseen characters far above the untrained network's."""
    done = job(f"--data.root={omniglot}", f"--storage={tmp_path}", "--run-name=characters", "--optim.epochs=3")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "runs" / "characters" / "results.json").read_text())
    assert results["num_queries"] == 2120
    assert results["recall"]["float"]["1"] > 0.4
    assert results["recall"]["binary"]["1"] > 0.3

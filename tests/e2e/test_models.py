"""The trained model as others use it: from MLflow's registry, through its command line, without Ray; as ONNX."""

import base64
import dataclasses
import json
import os
import subprocess
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch

from nsl_dist import storage
from nsl_dist.config import DataConfig, ModelConfig, TrainConfig
from nsl_dist.data.images import decode
from nsl_dist.data.shards import Manifest
from nsl_dist.data.transforms import eval_transform
from nsl_dist.embedder import Embedder, describe, load_embedder, weights_of
from nsl_dist.model import build_model
from nsl_dist.retrieval.vector_files import pack_codes
from nsl_dist.run import DESCRIPTION_FILE, MLFLOW_ID_FILE, MODEL_FILE, RUN_FILE, CheckpointRecord
from nsl_dist.tracking.tracker import Tracker
from tests.support.images import write_folders
from tests.support.processes import BIN, job

CONFIG = TrainConfig(model=ModelConfig(dim=20), data=DataConfig(image_size=32), run_name="mine")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("models")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sorted(str(path) for path in write_folders(tmp_path_factory.mktemp("images"), [3, 4]).rglob("*.png"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with the best model of a run, which MLflow knows."""
    root = tmp_path_factory.mktemp("storage")
    tracker = Tracker(f"sqlite:///{root}/mlflow.db", storage_root=str(root))
    data = Manifest("/data", "sop", source="/raw", digest="d" * 64, splits={}, undecodable=[], shards=[])
    tracker.start(CONFIG, data, cluster="1 node", git_commit=None)
    model = build_model(CONFIG.model, seed=3, pretrained=False)
    run_dir = root / "runs" / "mine"
    for name, content in (
        (f"best/{MODEL_FILE}", weights_of(model.state_dict())),
        (f"best/{DESCRIPTION_FILE}", describe(CONFIG)),
        (f"best/{RUN_FILE}", CheckpointRecord(7, 10, 1, "d" * 64, dataclasses.asdict(CONFIG)).to_json()),
        (MLFLOW_ID_FILE, tracker.run_id.encode()),
    ):
        storage.write_bytes(str(run_dir / name), content)
    return root


@pytest.fixture(scope="module")
def embedder(root: Path) -> Embedder:
    return load_embedder(str(root / "runs" / "mine" / "best"))


@pytest.fixture(scope="module")
def registry(root: Path) -> str:
    """URI of MLflow's store, in which the model is registered as "shop"."""
    uri = f"sqlite:///{root}/mlflow.db"
    with pytest.MonkeyPatch.context() as patched:
        # Before MLflow sets it: what is there afterwards would stay for the tests to come.
        patched.setenv("MLFLOW_TRACKING_URI", uri)
        job(patched, "export", f"--checkpoint={root}/runs/mine", "--register=shop")
    return uri


@pytest.fixture
def registered(registry: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of the model in the registry; MLflow is told where that is."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    mlflow.set_tracking_uri(registry)
    return "models:/shop/1"


@pytest.mark.parametrize("count", [1, 5])
def test_registered_model_gives_the_same_embeddings(
    count: int, registered: str, embedder: Embedder, images: list[str]
) -> None:
    model = mlflow.pyfunc.load_model(registered)
    expected = embedder(images[:count])
    paths, encoded = images[:count], [Path(path).read_bytes() for path in images[:count]]
    for given in (pd.DataFrame({"path": paths}), pd.DataFrame({"image": encoded})):
        found = model.predict(given)
        assert (found.dtype, found.shape) == (np.float32, (count, 20))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        codes = model.predict(given, params={"binary": True})
        np.testing.assert_array_equal(codes, pack_codes(expected))
        assert codes.shape == (count, 3)


def test_registered_model_says_what_it_wants(registered: str, images: list[str]) -> None:
    model = mlflow.pyfunc.load_model(registered)
    with pytest.raises(ValueError, match=r"give a column 'image' .* or 'path'"):
        model.predict(pd.DataFrame({"path": [images[0], None]}))
    with pytest.raises(ValueError, match="bytes: not an image in one of the formats"):
        model.predict(pd.DataFrame({"image": [b"no image"]}))
    (version,) = mlflow.MlflowClient().search_model_versions("name='shop'")
    logged = mlflow.get_logged_model(model.metadata.model_id)
    assert (version.run_id, logged.source_run_id) == (logged.source_run_id, version.run_id)
    assert mlflow.get_run(version.run_id).info.run_name == "mine"
    assert mlflow.get_run(version.run_id).info.experiment_id == logged.experiment_id


def test_torch_flavour_is_the_network(registered: str, embedder: Embedder) -> None:
    found, expected = mlflow.pytorch.load_model(registered).state_dict(), embedder.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_mlflow_predicts_from_its_command_line(
    registered: str, embedder: Embedder, images: list[str], tmp_path: Path
) -> None:
    encoded = [base64.b64encode(Path(path).read_bytes()).decode() for path in images[:2]]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"dataframe_split": {"columns": ["image"], "data": [[each] for each in encoded]}}))
    command = [f"{BIN}/mlflow", "models", "predict", "-m", registered, "-i", str(asked), "--env-manager=local"]
    done = subprocess.run([*command, "-o", str(tmp_path / "found.json")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["predictions"]
    np.testing.assert_allclose(found, embedder(images[:2]), atol=1e-5)


def test_registered_model_loads_with_its_own_requirements_alone(
    registered: str, embedder: Embedder, images: list[str], tmp_path: Path
) -> None:
    requirements = mlflow.pyfunc.get_model_dependencies(registered)
    commands: list[list[str]] = [["venv", "--quiet", str(tmp_path)], ["pip", "install", "--quiet", "-r", requirements]]
    for command in commands:
        environment = os.environ | {"VIRTUAL_ENV": str(tmp_path)}
        done = subprocess.run([BIN / "uv", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    code = (
        "import importlib.util, json, sys, mlflow, pandas\n"
        "assert not any(importlib.util.find_spec(name) for name in ('ray', 'faiss', 'nsl_dist'))\n"
        f"model = mlflow.pyfunc.load_model({registered!r})\n"
        "json.dump(model.predict(pandas.DataFrame({'path': sys.argv[1:]})).tolist(), open('found.json', 'w'))\n"
    )
    done = subprocess.run(
        [tmp_path / "bin" / "python", "-c", code, *images], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads((tmp_path / "found.json").read_text()), embedder(images), atol=1e-5)


def test_onnx_does_what_torch_does(
    root: Path,
    embedder: Embedder,
    images: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "new" / "model.onnx"
    job(monkeypatch, "export", f"--checkpoint={root}/runs/mine/best", f"--onnx={file}")
    assert "MiB; differs from torch by" in capsys.readouterr().out
    data = DataConfig(image_size=32, crop_ratio=CONFIG.data.crop_ratio)
    pixels = np.stack([eval_transform(decode(Path(path).read_bytes()), data).numpy() for path in images])
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(["embeddings"], {"images": pixels})
    np.testing.assert_allclose(found, embedder(images), atol=1e-5)


def test_export_says_what_is_wrong(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        ([f"--checkpoint={root}/runs/mine/best"], "nothing to do: give --register NAME, --onnx FILE or both"),
        ([f"--checkpoint={root}/runs", "--onnx=x.onnx"], f"no model in {root}/runs; give a run that was evaluated"),
        (
            [f"--checkpoint={root}/runs/mine", "--register=a/b"],
            f"MLflow sqlite:///{root}/mlflow.db cannot register a/b: Invalid model name 'a/b'",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            job(monkeypatch, "export", *flags)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

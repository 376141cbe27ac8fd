"""From raw images to an evaluated model, by the jobs; every layout evaluated; what can go wrong in an evaluation."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from selenium import webdriver

from nsl_dist.config import EvalConfig, EvaluateConfig, EvaluateDataConfig, config_from_dict
from nsl_dist.data.shards import load_manifest
from nsl_dist.retrieval import report
from nsl_dist.retrieval.batch_inference import embed
from nsl_dist.retrieval.evaluation import run
from nsl_dist.retrieval.faiss_index import check_index
from nsl_dist.retrieval.results import EvaluationResults
from nsl_dist.retrieval.vector_files import load_index
from nsl_dist.run import MODEL_FILE, find_checkpoint
from tests.support.browser import prefer, resize
from tests.support.images import write_cars196, write_cub200, write_folders, write_inshop
from tests.support.mlflow_server import started_mlflow
from tests.support.processes import JOBS, free_ports, job, user_environment, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
SMALL = [
    "--recipe=laptop_scratch", "--optim.epochs=1", "--data.image-size=16", "--model.dim=16", "--data.batch-size=8",
    "--data.images-per-class=2", "--model.batch-norm=frozen",
]  # fmt: skip


def inshop(root: Path) -> Path:
    return write_inshop(root, train=[4] * 5, query=[2, 1, 1], gallery=[2, 3, 0])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cars196(tmp_path_factory.mktemp("raw"), [4] * 5 + [3, 3, 2, 1, 2])


@pytest.fixture(scope="module")
def shards(root: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """Made by the job that makes them."""
    shards = tmp_path_factory.mktemp("shards") / "cars196"
    with pytest.MonkeyPatch.context() as patched:
        job(patched, "prepare_shards", f"--root={root}", f"--out={shards}", "--layout=cars196")
    return shards


@pytest.fixture(scope="module")
def storage(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a training on the shards."""
    storage = tmp_path_factory.mktemp("storage")
    with pytest.MonkeyPatch.context() as patched:
        # Before MLflow sets it: what is there afterwards would stay for the tests to come.
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")
        flags = [f"--data.root={shards}", f"--storage={storage}", "--run-name=cars196", "--tracking.register=shop"]
        job(patched, "train_cars196", *flags, *SMALL)
    return storage


@pytest.fixture
def config(storage: Path) -> Iterator[EvaluateConfig]:
    """An evaluation of the newest checkpoint, of which nothing is left for the next test."""
    checkpoint = find_checkpoint(str(storage / "runs" / "cars196"))
    yield EvaluateConfig(checkpoint=checkpoint, storage=str(storage), eval=EvalConfig(nmi=False))
    shutil.rmtree(storage / "evaluations", ignore_errors=True)


def results_of_evaluation(storage: Path) -> dict[str, Any]:
    """Return those of the only one there."""
    (results,) = (storage / "evaluations").glob("*/results.json")
    content: dict[str, Any] = json.loads(results.read_text())
    assert "<h2" in results.with_name("report.html").read_text()
    return content


@pytest.mark.parametrize("layout", ["inshop", "cub200", "cars196"])
def test_the_job_of_each_data_set_asks_for_its_folder(
    layout: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, f"train_{layout}")
    assert ended.value.code == 2
    assert f"error: set --data.root to the folder of the data set (layout {layout})" in capsys.readouterr().err


def test_prepare_train_evaluate(
    config: EvaluateConfig,
    root: Path,
    shards: Path,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = storage / "runs" / "cars196"
    assert load_manifest(str(shards)).layout == "cars196"
    trained = json.loads((run_dir / "results.json").read_text())

    raw = [f"--checkpoint={run_dir}", f"--data.root={root}", "--layout=cars196"]
    run_id = (run_dir / "mlflow_run_id").read_text()
    job(monkeypatch, "evaluate", *raw, f"--storage={storage}", f"--run-id={run_id}", "--eval.intervals")
    assert "embeddings: all there in" in capsys.readouterr().out  # those of the training's own evaluation
    results = results_of_evaluation(storage)
    for metric in ("recall", "r_precision", "map_at_r"):
        assert results[metric] == trained[metric]
    assert list(results["recall"]["float"]) == ["1", "2", "4", "8"]
    assert results["bytes_per_vector"] == {"float": 64, "binary": 2}
    assert (results["num_queries"], results["num_queries_without_match"]) == (11, 1)
    assert results["recall"]["binary"]["8"] <= 10 / 11
    low, high = results["intervals"]["float"]["map_at_r"]
    assert low <= results["map_at_r"]["float"] <= high
    assert 0 <= results["nmi"]["float"] <= 1
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    of_experiment = [client.get_experiment_by_name(root.name).experiment_id]
    (child,) = client.search_runs(of_experiment, f"tags.mlflow.parentRunId = '{run_id}'")
    assert child.data.metrics["map_at_r_binary"] == results["map_at_r"]["binary"]
    assert child.data.params["eval.intervals"] == "True"
    assert child.inputs.dataset_inputs[0].dataset.digest == results["data"]["digest"][:36]
    assert [each.info.status for each in (child, client.get_run(run_id))] == ["FINISHED"] * 2
    for each in (child.info.run_id, run_id):
        assert [file.path for file in client.list_artifacts(each)] == ["figures", "report.html", "results.json"]
    assert [figure.stem for figure in sorted((run_dir / "figures").iterdir())] == [
        "class_sizes", "loss", "map", "recall", "similarities"
    ]  # fmt: skip


def test_mlflow_shows_the_run(storage: Path, root: Path, browser: webdriver.Chrome, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with started_mlflow(f"sqlite:///{storage}/mlflow.db", port=port, folder=tmp_path) as address:
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name(root.name).experiment_id
        run_id = (storage / "runs" / "cars196" / "mlflow_run_id").read_text()
        page = f"{address}/#/experiments/{experiment}/runs/{run_id}"
        for tab, texts in (("", ("cars196", "recall_at_1_float", "shop")), ("/artifacts", ("results.json",))):
            browser.get(page + tab)

            def shown() -> str:
                return str(browser.execute_script("return document.body.innerText"))

            for text in texts:
                wait_until(lambda text=text: text in shown(), why=shown)  # type: ignore[misc]


def test_the_report_shows_the_neighbours_that_there_are(config: EvaluateConfig, shards: Path) -> None:
    run_dir = Path(config.checkpoint).parent
    vectors = load_index(json.loads((run_dir / "results.json").read_text())["embeddings"])["test"]
    similarities = vectors.read_all("vector", range(11)).astype(np.float64)
    similarities = similarities @ similarities.T
    np.fill_diagonal(similarities, -2)
    labels = vectors.read_all("label", range(11))
    order = np.argsort(-similarities, axis=1)
    matches = labels[order[:, :10]] == labels[:, None]
    ranks = [int(found.argmax()) + 1 for found in matches if found.any()]
    report = (run_dir / "report.html").read_text()
    found = [int(place) for place in re.findall(r"first match in place (\d+)", report)]
    assert found == sorted((rank for rank in ranks if rank > 1), reverse=True)
    paths = vectors.paths().to_pylist()
    with (run_dir / "failures.csv").open(newline="") as file:
        failures = list(csv.DictReader(file))
    # recall@8 is the last that is measured, so more than 8 neighbours were not looked at.
    assert [each["place_of_match"] for each in failures] == [str(place) if place <= 8 else "" for place in found]
    classes = load_manifest(str(shards)).class_ids("test").to_pylist()
    for each in failures:
        query = paths.index(each["path"])
        nearest = order[query, 0]
        assert each["class"] == classes[labels[query]]
        assert (each["nearest_path"], each["nearest_class"]) == (paths[nearest], classes[labels[nearest]])
    names = re.findall(r'alt="(query|same class|other class): (\S+) of class', report)
    assert len(names) == 9 * (len(found) + min(6, ranks.count(1)))
    for start in range(0, len(names), 9):
        (_, query), *neighbours = [(kind, paths.index(path)) for kind, path in names[start : start + 9]]
        assert [place for _, place in neighbours] == order[query, :8].tolist()
        assert [kind == "same class" for kind, _ in neighbours] == matches[query, :8].tolist()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_fits_desks_and_phones_by_day_and_by_night(
    width: int, scheme: str, browser: webdriver.Chrome, config: EvaluateConfig
) -> None:
    resize(browser, width)
    prefer(browser, scheme)
    browser.get((Path(config.checkpoint).parent / "report.html").as_uri())
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.images.length") > 9
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    page, text, axes = browser.execute_script(
        "const style = selector => getComputedStyle(document.querySelector(selector));"
        "return [style('body').backgroundColor, style('body').color, style('.chart text').fill]"
    )
    assert text == axes  # figures follow
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (page, text)]
    assert (lightness[0] > lightness[1]) == (scheme == "light")
    assert abs(lightness[0] - lightness[1]) > 500
    assert not browser.get_log("browser")


@pytest.mark.parametrize(
    ("layout", "write", "ks"),
    [
        ("inshop", inshop, ["1", "10", "20", "30", "40", "50"]),
        ("cub200", lambda root: write_cub200(root, [4] * 5 + [3, 3, 2, 1, 2]), ["1", "2", "4", "8"]),
    ],
)
def test_other_layouts_are_evaluated(
    layout: str,
    write: Callable[[Path], Path],
    ks: list[str],
    config: EvaluateConfig,
    storage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = [f"--data.root={write(tmp_path / 'raw')}", f"--layout={layout}", "--data.unrelated"]
    job(monkeypatch, "evaluate", f"--checkpoint={config.checkpoint}", f"--storage={storage}", *raw, "--eval.no-nmi")
    results = results_of_evaluation(storage)
    assert list(results["recall"]["float"]) == ks
    assert results["bytes_per_vector"] == {"float": 64, "binary": 2}
    if layout == "inshop":
        assert (results["num_queries"], results["num_gallery"], results["num_queries_without_match"]) == (4, 5, 1)
        assert results["recall"]["float"]["50"] == 3 / 4  # all but the query whose class the gallery lacks
    else:
        assert (results["num_queries"], results["num_queries_without_match"]) == (11, 1)
        assert results["recall"]["binary"][ks[-1]] <= 10 / 11


def test_other_data_is_refused_unless_asked_for(config: EvaluateConfig, tmp_path: Path) -> None:
    other = EvaluateDataConfig(root=str(write_folders(tmp_path, [2, 2, 3, 2])))
    prepared = set(Path(str(config.storage)).glob("shards/*"))
    with pytest.raises(ValueError, match=r"trained on data of digest .* test classes may have been trained on"):
        run(dataclasses.replace(config, data=other))
    assert set(Path(str(config.storage)).glob("shards/*")) == prepared  # refused before it was sharded
    results = run(dataclasses.replace(config, data=dataclasses.replace(other, unrelated=True)))
    assert (results.num_queries, list(results.recall["float"])) == (5, [1, 10, 100])
    assert results.recall["float"][100] == 1


def test_an_interrupted_embedding_goes_on(config: EvaluateConfig, shards: Path, tmp_path: Path) -> None:
    settings = config_from_dict(
        json.loads((Path(config.checkpoint) / "run.json").read_text())["config"], location="run.json"
    )
    weights = (Path(config.checkpoint) / MODEL_FILE).read_bytes()
    manifest, out = load_manifest(str(shards)), tmp_path / "embeddings"
    first = embed(weights, settings, manifest, out=str(out), num_gpus=0)["test"]
    (out / "embeddings.json").unlink()
    missing = first.files[1]
    (out / missing).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = embed(weights, settings, manifest, out=str(out), num_gpus=0)["test"]
    assert again == first
    assert kept == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name in kept}
    ids = pq.read_table([out / name for name in first.files], columns=["id"])["id"].to_pylist()
    assert ids == list(range(11))
    norms = np.linalg.norm(again.read_all("vector", range(11)), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "nan",
            r"embeddings that are zero or not finite, the first for image \d+ of class \d+ of the test split",
        ),
        ("dim", r"embedder.safetensors: the weights do not match the model description: .*size mismatch"),
    ],
)
def test_a_bad_checkpoint_is_refused(
    damage: str, message: str, config: EvaluateConfig, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(config.checkpoint, tmp_path / "bad")
    state = load_file(tmp_path / "bad" / MODEL_FILE)
    state["linear.weight"] = state["linear.weight"] * torch.nan if damage == "nan" else torch.ones(8, 512)
    save_file(state, tmp_path / "bad" / MODEL_FILE)
    bad = dataclasses.replace(config, checkpoint=str(tmp_path / "bad"), data=EvaluateDataConfig(root=str(root)))
    with pytest.raises(ValueError, match=message):
        run(bad)


def test_a_job_ends_when_its_evaluation_fails(config: EvaluateConfig, root: Path, tmp_path: Path) -> None:
    """Ray Data would go on in a thread of its own, and even start another Ray."""
    shutil.copytree(config.checkpoint, tmp_path / "bad")
    state = load_file(tmp_path / "bad" / MODEL_FILE)
    save_file(state | {"linear.weight": state["linear.weight"] * torch.nan}, tmp_path / "bad" / MODEL_FILE)
    flags = [f"--checkpoint={tmp_path}/bad", f"--data.root={root}", f"--storage={tmp_path}", "--eval.batch-size=2"]
    done = subprocess.run(
        [sys.executable, str(JOBS / "evaluate.py"), *flags, "--no-track"],
        capture_output=True, text=True, env=user_environment(tmp_path), timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "embeddings that are zero or not finite" in done.stderr


def test_a_missing_checkpoint_and_an_impossible_index(config: EvaluateConfig, root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
        run(dataclasses.replace(config, checkpoint=str(tmp_path / "nowhere")))
    data, index = EvaluateDataConfig(root=str(root)), EvalConfig(index="IVF4096,Flat", nmi=False)
    with pytest.raises(ValueError, match=r"faiss cannot build --eval.index IVF4096,Flat .* over 11 vectors"):
        run(dataclasses.replace(config, data=data, eval=index))
    for index in (EvalConfig(index="IVF,Fat"), EvalConfig(index="HNSW8", index_parameters="nprobes=4")):
        with pytest.raises(ValueError, match=r"faiss cannot build --eval.index .*, for vectors of 16 dimensions"):
            check_index(index, 16)


def test_an_approximate_index_says_what_it_finds(config: EvaluateConfig, root: Path) -> None:
    index = EvalConfig(index="HNSW8", index_parameters="efSearch=64", nmi=False)
    results = run(dataclasses.replace(config, data=EvaluateDataConfig(root=str(root)), eval=index))
    exact = run(dataclasses.replace(config, data=EvaluateDataConfig(root=str(root))))
    assert results.index is not None
    assert results.index.recall_of_exact[1] > 0.9
    assert results.recall["binary"] == exact.recall["binary"]
    assert abs(results.recall["float"][1] - exact.recall["float"][1]) <= 1 / 11


def test_results_or_report_that_cannot_be_written(
    config: EvaluateConfig,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without results its run in MLflow has failed; without a report it is finished."""
    client = mlflow.MlflowClient(f"sqlite:///{config.storage}/mlflow.db")
    run_id = (Path(config.checkpoint).parent / "mlflow_run_id").read_text()
    experiment_id = client.get_run(run_id).info.experiment_id

    def newest_child() -> mlflow.entities.Run:
        return client.search_runs([experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")[0]

    evaluations = tmp_path / "storage" / "evaluations"
    tracked = dataclasses.replace(
        config,
        storage=str(tmp_path / "storage"),
        run_id=run_id,
        tracking_uri=f"sqlite:///{config.storage}/mlflow.db",
        data=EvaluateDataConfig(root=str(root)),
    )
    evaluations.parent.mkdir()
    evaluations.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="evaluations"):
        run(tracked)
    failed = newest_child()
    assert failed.info.status == "FAILED"
    assert client.list_artifacts(failed.info.run_id) == []

    evaluations.unlink()
    monkeypatch.setattr(report, "draw", lambda _: 1 / 0)
    capsys.readouterr()
    results = run(tracked)
    (folder,) = evaluations.iterdir()
    assert {path.name for path in folder.iterdir()} == {"results.json", "failures.csv"}
    assert EvaluationResults.from_json(json.loads((folder / "results.json").read_text())) == results
    output = capsys.readouterr().out
    assert f"no report: {folder}/report.html was not written: ZeroDivisionError: division by zero" in output
    assert "report:  " not in output
    finished = newest_child()
    assert finished.info.run_id != failed.info.run_id
    assert finished.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(finished.info.run_id)] == ["results.json"]

"""A study on a real cluster, and what is left of it when it is called again."""

import json
from pathlib import Path

import mlflow
import pytest

from tests.support.processes import job


@pytest.mark.slow
@pytest.mark.own_process  # the Ray of the other tests has no room for two trainings
def test_a_study_trains_each_setting_once(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "layer-norm", "--seeds", "0", f"--data.root={raw}", f"--storage={tmp_path}", "--run-name=study",
        "--recipe=laptop_scratch", "--model.backbone=timm/test_resnet", "--model.dim=16", "--data.image-size=32",
        "--data.batch-size=20",
        "--optim.epochs=1", "--tracking.every=2", "--eval.no-nmi",
    ]  # fmt: skip
    job(monkeypatch, "ablate", *flags)
    output = capsys.readouterr().out
    assert "2 settings x 1 seeds = 2, 2 at a time" in output
    assert "2/2  study-with" in output
    folder, runs = tmp_path / "studies" / "study", tmp_path / "runs"
    study = json.loads((folder / "results.json").read_text())
    assert [outcome["arm"] for outcome in study["outcomes"]] == ["with", "without"]
    for outcome in study["outcomes"]:
        results = json.loads((runs / outcome["run_name"] / "results.json").read_text())
        assert outcome["recall"] == {kind: 100 * by_k["1"] for kind, by_k in results["recall"].items()}
        assert [epoch for epoch, _ in outcome["history"]["recall"]] == [1]
        assert len(outcome["history"]["loss"]) == 1
        assert results["config"]["model"]["neck"] == {"with": "layer_norm", "without": None}[outcome["arm"]]
        assert not (runs / outcome["run_name"] / "report.html").exists()
    assert "LayerNorm raises recall@1: " in (folder / "summary.md").read_text()
    assert (folder / "figure.svg").read_text().rstrip().endswith("</svg>")

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.search_runs([client.get_experiment_by_name(raw.name).experiment_id])
    (parent,) = (run for run in tracked if run.info.run_name == "study")
    assert {run.data.tags.get("mlflow.parentRunId") for run in tracked} == {None, parent.info.run_id}
    assert len(tracked) == 3
    files = [file.path for file in client.list_artifacts(parent.info.run_id)]
    assert files == ["figure.svg", "results.json", "summary.md"]

    kept = {path: path.stat().st_mtime_ns for path in runs.glob("*/results.json")}
    job(monkeypatch, "ablate", *flags)
    assert "2 at a time; 2 are finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/results.json")} == kept
    assert json.loads((folder / "results.json").read_text())["findings"] == study["findings"]
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "ablate", *flags, "--optim.lr=0.5")
    assert ended.value.code == 2
    assert "run study-with-seed-0 was started with other options: --optim.lr" in capsys.readouterr().err

"""From a folder of one's own photos to a search in it, with the commands of the README as they are written there."""

import csv
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from nsl_dist.data.shards import load_manifest
from nsl_dist.run import RunFolder
from tests.support import own_photos
from tests.support.processes import JOBS, ROOT, job, user_environment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@dataclass(frozen=True)
class Mine:
    """A finished run on photos."""

    home: Path
    output: str

    @property
    def photos(self) -> Path:
        return self.home / "photos"

    @property
    def storage(self) -> Path:
        return self.home / "nsl_dist"

    @property
    def run(self) -> Path:
        return self.storage / "runs" / "mine"


def arguments_of(job: str, home: Path, *, with_flag: str = "") -> list[str]:
    """Return the arguments of the README's command for a job, for a user whose home is `home`."""
    (line,) = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(f".venv/bin/python jobs/{job}.py") and with_flag in line
    )
    _, _, *arguments = shlex.split(line, comments=True)
    return [re.sub("^~", str(home), argument) for argument in arguments]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Mine:
    """What the first command of the README leaves in the home of a user."""
    home = tmp_path_factory.mktemp("home")
    own_photos.write_own_photos(home / "photos")
    command = [sys.executable, str(JOBS / "train.py"), *arguments_of("train", home)]
    assert command[2:] == ["--data.root", f"{home}/photos", "--run-name", "mine"]
    done = subprocess.run(
        command, env=user_environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return Mine(home, done.stdout)


def test_every_file_is_accounted_for(mine: Mine) -> None:
    (shards,) = (mine.storage / "shards").iterdir()
    manifest = load_manifest(str(shards))
    assert sum(split["num_images"] for split in manifest.splits.values()) == own_photos.USED
    assert {image["path"] for image in manifest.undecodable} == own_photos.UNDECODABLE
    assert [same["paths"] for same in manifest.duplicates] == own_photos.DUPLICATES
    assert manifest.unused == own_photos.UNUSED
    assert manifest.empty_folders == own_photos.EMPTY_FOLDERS
    classes = {name for split in ("train", "test") for name in manifest.class_ids(split).to_pylist()}
    assert classes == set(own_photos.CLASSES)
    for line in (
        r"undecodable  2: Bread/IMG 00.jpg \(.+\); Bread/IMG 01.jpg \(not an image in one of the formats .*\)",
        r"other files  .db 1, .jpg 1, .txt 1, broken links 1",
        r"empty folders  1: Empty",
        r"duplicates  3: Bread/IMG 02.jpg = Bread/IMG 03.jpg; Cheese/IMG 05.jpg = Rice/IMG 05.jpg; Tea/IMG 00.jpg = ",
    ):
        assert re.search(line, mine.output), line


def test_the_first_run_says_what_it_changes_and_ends_with_a_table(mine: Mine) -> None:
    assert "6 training classes are few: 50 or more are advised" in mine.output
    assert "batch 80 -> 30: 6 training classes x 5" in mine.output
    train, test = (re.search(rf"{name}  \d+ images of 6 .*classes: (.*)", mine.output) for name in ("train", "test"))
    assert train is not None
    assert test is not None
    assert sorted([*train[1].split(", "), *test[1].split(", ")]) == sorted(own_photos.CLASSES)
    assert re.search(r"^float +\d+\.\d\d", mine.output, flags=re.MULTILINE)
    results = json.loads((mine.run / "results.json").read_text())
    with (mine.run / "failures.csv").open(newline="") as file:
        failures = list(csv.DictReader(file))
    share = 1 - results["recall"]["float"]["1"]
    assert len(failures) == round(share * results["num_queries"])
    assert all((mine.photos / each["path"]).exists() for each in failures)


def test_mlflow_shows_the_run_by_the_name_of_its_folder(mine: Mine) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{mine.storage}/mlflow.db")
    experiment = client.get_experiment_by_name(mine.photos.name)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    (run,) = client.search_runs([experiment.experiment_id])
    note = run.data.tags["mlflow.note.content"]
    assert "\n\ntimm/tf_efficientnet_lite0, 512 dimensions, 160 pixels, trained on " in note
    assert f"train.py --data.root {mine.photos}" in note
    assert re.match(r"Finished .*: float recall@1/10/100 .*the best model is in .*/best", note)


def test_a_finished_run_says_how_to_train_longer(
    mine: Mine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--data.root={mine.photos}", f"--storage={mine.storage}", f"--run-name={mine.run.name}", "--epochs=40"]
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "train", *flags)
    assert ended.value.code == 2
    remedy = f"to train longer, start from it: --init-from {mine.run} with another --run-name"
    assert remedy in capsys.readouterr().err


def test_evaluation_and_registry_find_everything_in_the_run(
    mine: Mine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mine.home)
    job(monkeypatch, "evaluate", *arguments_of("evaluate", mine.home))
    output = capsys.readouterr().out
    parent = RunFolder(str(mine.run)).mlflow_run_id()
    assert f"a child of {parent}" in output
    (results,) = (mine.storage / "evaluations").glob("*/results.json")
    expected = json.loads((mine.run / "results.json").read_text())
    assert json.loads(results.read_text())["recall"] == expected["recall"]
    assert results.with_name("failures.csv").read_text() == (mine.run / "failures.csv").read_text()
    job(monkeypatch, "export", *arguments_of("export", mine.home))
    output = capsys.readouterr().out
    file, registered = output.splitlines()[-2:]
    assert re.fullmatch(r"photos.onnx: .* MiB; differs from torch by .*", file)
    assert registered == f"sqlite:///{mine.storage}/mlflow.db: models:/photos/1"


def test_search_says_path_class_and_score(
    mine: Mine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    query = mine.home / "photo.jpg"
    query.write_bytes((mine.photos / "Äpfel" / "IMG 05.heic").read_bytes())
    monkeypatch.chdir(mine.home)
    job(monkeypatch, "search", *arguments_of("search", mine.home, with_flag="--query"))
    output = capsys.readouterr().out
    found = own_photos.USED + 1  # in a gallery the one in the root is of a class too
    assert f"photo.jpg among {found} images of {mine.photos}, cosine similarity, 1 is the same" in output
    assert f"photo.jpg among {found} images of {mine.photos}, Hamming distance in bits of 512, 0 is the same" in output
    assert len(re.findall(r"^ +1 +1\.0000  Äpfel +Äpfel/IMG 05.heic$", output, flags=re.MULTILINE)) == 1
    # Codes of others may be equal, and a coordinate near zero may change its sign with the batch.
    nearest = re.findall(r"^ +1 +(\d+)  \S", output, flags=re.MULTILINE)
    assert [int(distance) <= 12 for distance in nearest] == [True]

"""A run that goes on with other classes, as its user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nsl_dist.embedder import load_embedder
from nsl_dist.run import RunFolder
from tests.support.images import write_sop
from tests.support.processes import JOBS, user_environment
from tests.support.trained_run import SMALL, TrainedRun

VANISHED = {3, 4}  # of the 20 classes that the first run has trained; ten are new


@pytest.fixture(scope="module")
def grown(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    home = tmp_path_factory.mktemp("grown")
    raw = write_sop(home / "raw", {"train": [7] * 30, "test": [5] * 8})
    table = raw / "Ebay_train.txt"
    lines = [line for line in table.read_text().splitlines() if line.split()[1] not in map(str, VANISHED)]
    table.write_text("\n".join(lines) + "\n")
    flags = [f"--data.root={raw}", f"--storage={home}", "--run-name=first", f"--init-from={trained.folder}", *SMALL]
    flags += ["--checkpoint.keep=9", "--num-workers=1", "--eval.untrained"]
    command = [sys.executable, str(JOBS / "train_sop.py"), *flags]
    done = subprocess.run(
        command, cwd=home, env=user_environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return TrainedRun(raw, home, done.stdout)


def test_output_results_and_report_count_the_classes(grown: TrainedRun, trained: TrainedRun) -> None:
    source = trained.folder / "checkpoint_000000014"
    sentence = f"18 known classes, 10 new, 2 vanished; from {source}"
    assert f"classes: {sentence}" in grown.output
    assert f"({trained.folder})" in grown.output  # what the model starts from
    results = json.loads((grown.folder / "results.json").read_text())
    assert results["growth"] == {"source": str(source), "known": 18, "new": 10, "vanished": 2}
    assert sentence in (grown.folder / "report.html").read_text()


def test_known_classes_keep_their_proxies_and_new_ones_are_where_their_images_are(
    grown: TrainedRun, trained: TrainedRun
) -> None:
    source, start = trained.folder / "checkpoint_000000014", grown.folder / "checkpoint_000000000"
    before = [load_file(source / f"proxies-0000{rank}-of-00002.safetensors") for rank in (0, 1)]
    weight, velocity = (np.concatenate([each[name] for each in before]) for name in ("weight", "velocity"))
    old, new = (RunFolder(str(each.folder)).classes()["class_id"].to_pylist() for each in (trained, grown))
    rows = load_file(start / "proxies-00000-of-00001.safetensors")
    assert len(rows["weight"]) == len(new) == 28
    embedder, records = load_embedder(str(source)), np.loadtxt(grown.raw / "Ebay_train.txt", dtype=str, skiprows=1)
    for place, class_id in enumerate(new):
        if class_id in old:
            assert np.array_equal(rows["weight"][place], weight[old.index(class_id)])
            assert np.array_equal(rows["velocity"][place], velocity[old.index(class_id)])
            continue
        paths = [str(grown.raw / record[3]) for record in records if record[1] == class_id]
        mean = embedder(paths).mean(axis=0)
        expected = mean / np.linalg.norm(mean) * 3**-0.5
        np.testing.assert_allclose(rows["weight"][place], expected, atol=1e-4)
        assert not rows["velocity"][place].any()


def test_training_goes_on_from_there(grown: TrainedRun, trained: TrainedRun) -> None:
    assert Path(grown.folder / "best" / "embedder.safetensors").exists()
    before, after = (json.loads((each.folder / "results.json").read_text()) for each in (trained, grown))
    assert after["steps"] == 2 * (28 * 7 // 20)
    assert after["untrained"]["num_queries"] == 40
    assert before["config"]["init_from"] is None
    assert after["config"]["init_from"] == str(trained.folder)

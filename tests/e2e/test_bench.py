"""The benchmarks run and say what they promise."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nsl_dist.data.shards import Manifest
from tests.support.processes import JOBS


def bench(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / "bench" / f"{job}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.slow
def test_bench_proxies(tmp_path: Path) -> None:
    grid = ["--classes", "3000", "--dim", "32", "--num-sampled", "200", "--batch", "16", "--workers", "1", "2"]
    report = tmp_path / "report.md"
    result = bench("proxies", *grid, "--turns", "1", "--json", f"--report={report}")
    assert result.returncode == 0, result.stderr
    title, _, header, _, *rows = report.read_text().splitlines()
    assert title.startswith("# 6 contestants on ")
    assert {line.count("|") for line in (header, *rows)} == {12}
    assert [row.split()[1] for row in rows] == ["ours", "gather_fp32", "dense", "pml", "ours", "gather_fp32"]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["implementation"], line["workers"], line["num_sampled"]) for line in lines] == [
        ("ours", 1, 200),
        ("gather_fp32", 1, 200),
        ("dense", 1, 3000),
        ("pml", 1, 3000),
        ("ours", 2, 200),
        ("gather_fp32", 2, 200),
    ]
    for line in lines:
        assert (line["num_classes"], line["dim"]) == (3000, 32)
        assert line["step_ms"] >= line["step_ms_min"] > 0
        assert line["bytes_floor_ms"] > 0
        assert line["products_floor_ms"] > 0
        assert isinstance(line["peak_extra_mb"], float)
        assert line["device"] in ("cpu", "cuda")


def test_bad_grids_are_refused() -> None:
    result = bench("proxies", "--batch", "15", "--workers", "2")
    assert result.returncode == 2
    assert "--batch 15 is not divisible by 2 workers" in result.stderr
    result = bench("proxies", "--implementations", "ours", "liger", "--device", "cpu")
    assert (result.returncode, result.stderr) == (2, "error: --implementations liger needs a GPU\n")
    result = bench("train", "--steps", "5", "--warm-up", "5")
    assert result.returncode == 2
    assert "--warm-up 5 leaves nothing of --steps 5" in result.stderr


@pytest.mark.slow
def test_bench_search() -> None:
    grid = ["--num-vectors", "600", "--num-queries", "100", "--dim", "16", "--k", "10", "--pml-queries", "50"]
    result = bench("search", *grid, "--turns", "1", "--json")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["implementation"] for line in lines] == [
        "ours_float", "faiss_flat", "ours_binary", "faiss_binary", "pml",
    ]  # fmt: skip
    for line in lines:
        assert (line["num_vectors"], line["num_queries"], line["dim"], line["k"]) == (600, 100, 16, 10)
        assert line["seconds"] >= line["seconds_min"] > 0
        assert line["peak_mb"] > 0


@pytest.mark.slow
def test_bench_train(shards: Manifest, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    flags = [
        f"--data.root={shards.root}", f"--storage={storage}", "--data.image-size=32",
        "--recipe=laptop_scratch", "--model.backbone=timm/test_resnet", "--model.dim=16", "--data.batch-size=20",
        "--proxies.sample-rate=1",
        "--tracking.every=2", "--device=cpu",
    ]  # fmt: skip
    parts = ["--parts", "stages", "training", "--workers", "1"]
    result = bench("train", *parts, "--turns", "1", "--steps", "14", "--warm-up", "4", *flags, "--json")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["part"], line["device"]) for line in lines] == [
        ("stages", "cpu"), ("training", "cpu"),
    ]  # fmt: skip
    stages, training = (line["rows"] for line in lines)
    assert [row["stage"] for row in stages] == [
        "read", "decode", "resize", "augment", "batch", "transfer", "forward", "loss", "backward", "optimiser", "step",
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["share"] > 0 for row in stages)
    assert stages[-1]["share"] == 1
    ours, twin = training
    assert [(row["implementation"], row["workers"]) for row in training] == [("ours", 1), ("twin", 1)]
    assert math.isclose(ours["first_loss"], twin["first_loss"], rel_tol=1e-3)
    assert ours["ratio_to_twin"] == ours["images_per_second"] / twin["images_per_second"] > 0
    assert all(0 <= row["data_wait_share"] <= 1 for row in training)
    assert not [*storage.glob("bench_train_*")]

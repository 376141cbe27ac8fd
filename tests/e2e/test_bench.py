"""The benchmarks run and say what they promise."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "bench_proxies.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_bench_proxies() -> None:
    grid = ["--classes", "3000", "--dim", "32", "--num-sampled", "200", "--batch", "16", "--workers", "1", "2"]
    result = bench(*grid, "--turns", "1", "--json")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["implementation"], line["workers"], line["num_sampled"]) for line in lines] == [
        ("ours", 1, 200),
        ("autograd_gather", 1, 200),
        ("dense", 1, 3000),
        ("pml", 1, 3000),
        ("ours", 2, 200),
        ("autograd_gather", 2, 200),
    ]
    for line in lines:
        assert (line["num_classes"], line["dim"]) == (3000, 32)
        assert line["step_ms"] >= line["step_ms_min"] > 0
        assert line["floor_ms"] > 0
        assert isinstance(line["peak_extra_mb"], float)
        assert line["device"] in ("cpu", "cuda")


def test_bad_grids_are_refused() -> None:
    result = bench("--batch", "15", "--workers", "2")
    assert result.returncode == 2
    assert "--batch 15 is not divisible by 2 workers" in result.stderr

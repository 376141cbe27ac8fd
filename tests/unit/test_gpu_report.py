"""The report of the GPU benchmarks: its rows, the outcome of tests, and parts that fail."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from gpu_report import (
    TINY,
    Machine,
    Part,
    Row,
    Sizes,
    decoding,
    measure,
    outcome_of_tests,
    proxies_on_device,
    proxies_on_host,
    row,
    searching,
    steps,
    written,
)

ROOT = Path(__file__).parents[2]
MACHINE = Machine("cpu", copy=1e9, products={"float32": 1e9}, bfloat16_peak=None, to_device=None)
TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.fixture
def broken(): raise OSError("gone")
def test_broken(broken): pass
def test_skipped(): pytest.skip("no CUDA device")
"""


def good(machine: Machine, sizes: Sizes) -> list[Row]:
    return [row("work", [0.5], on=machine.device, count=sizes.batch, unit="images")]


def bad(machine: Machine, sizes: Sizes) -> list[Row]:
    raise RuntimeError(f"no kernel for {machine.device}")


def endless(machine: Machine, sizes: Sizes) -> list[Row]:
    time.sleep(3600)
    return []


def leaves_a_process(machine: Machine, sizes: Sizes) -> list[Row]:
    return [row("process", [1.0], on="cpu", count=subprocess.Popen(["sleep", "3600"]).pid, unit="pid")]


def killed(machine: Machine, sizes: Sizes) -> list[Row]:
    os.abort()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "bench" / "gpu_report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_row_has_the_median_the_floor_and_the_rate() -> None:
    found = row("step", [0.4, 0.1, 0.2], on="cuda", count=8, unit="images", bytes_floor=0.02, products_floor=0.05)
    assert found == Row("step", "cuda", 200.0, 100.0, 400.0, 50.0, "products", 40.0, "images")
    found = row("step", [0.4, 0.1], on="cuda", count=8, unit="images", bytes_floor=0.08, products_floor=0.05)
    assert (found.ms, found.floor_ms, found.floor_of) == (250.0, 80.0, "bytes")
    assert row("step", [0.1], on="cuda", count=8, unit="images").floor_of is None


def test_outcome_of_tests(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), f"--junit-xml={junit}", str(tmp_path)]
    assert subprocess.run(command, check=False, capture_output=True, cwd=tmp_path).returncode == 1
    outcome = outcome_of_tests(str(junit))
    assert outcome.pop("seconds") > 0
    assert outcome == {
        "passed": 1, "failed": 2, "skipped": 1, "failures": ["test_some::test_bad", "test_some::test_broken"],
        "skipped_because": ["no CUDA device"],
    }  # fmt: skip
    junit.write_text(junit.read_text()[:100])
    for missing in (junit, tmp_path / "none.xml"):
        assert "the tests did not come to an end" in outcome_of_tests(str(missing))["error"]


def test_the_table_has_all_rows_and_what_failed() -> None:
    rows = [asdict(each) for each in good(MACHINE, TINY)]
    report = {
        "date": "today", "tests": {"passed": 3, "failed": 1}, "rows": rows, "failed_parts": {"steps": "out of memory"},
        "rates": {},
    }  # fmt: skip
    lines = written(report).splitlines()
    assert lines[0] == "date today"
    assert lines[3].split() == ["work", "cpu", "500.000", "500.000", "500.000", "-", "-", "20.000", "images"]
    assert lines[4:] == ["failed: steps: out of memory", "", "tests: passed 3, failed 1"]
    assert written(report | {"rows": [], "tests": None}).splitlines()[-1] == "failed: steps: out of memory"


@pytest.mark.slow
def test_a_part_that_fails_is_reported() -> None:
    assert measure(good, MACHINE, TINY, limit=None) == good(MACHINE, TINY)
    assert measure(bad, MACHINE, TINY, limit=None) == "RuntimeError: no kernel for cpu"
    assert measure(killed, MACHINE, TINY, limit=None) == "ended with exit code -6"
    assert measure(endless, MACHINE, TINY, limit=1) == "took longer than 1 s"
    rows = measure(leaves_a_process, MACHINE, TINY, limit=None)
    assert not isinstance(rows, str)
    while is_running(int(rows[0].per_second)):
        time.sleep(0.1)  # it is being killed


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            proxies_on_device,
            [f"proxy step, {sampled} of 2,000 x 16, device, float32" for sampled in ("200", "2,000")],
        ),
        (proxies_on_host, ["proxy step, 200 of 2,000 x 16, host, float32"]),
        (
            steps,
            [
                f"resnet18 step, batch 10, {each}"
                for each in (
                    "plain bf16 nhwc",
                    "ours bf16 nhwc",
                    "ours many classes",
                    "without loss",
                )
            ],
        ),
        (decoding, ["decode, one core, 4 JPEGs of 64 px"]),
        (searching, ["search, 20 nearest of 500 x 16"]),
    ],
)
def test_parts_on_cpus(part: Part, expected: list[str]) -> None:
    rows = part(MACHINE, TINY)
    assert [each.what for each in rows] == expected
    for each in rows:
        assert 0 < each.ms_min <= each.ms <= each.ms_max
        assert each.per_second > 0


@pytest.mark.slow
def test_the_job_on_cpus(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = job("--tiny", "--json", "--parts", "decoding", f"--report={report}", "--commit=abc", "--tests=none.xml")
    assert result.returncode == 1, result.stderr  # there are no tests
    content = json.loads(report.read_text())
    assert json.loads(result.stdout) == content
    assert content["failed_parts"] == {}
    assert "did not come to an end" in content["tests"]["error"]
    assert (content["commit"], content["rates"]["device"]) == ("abc", "cpu")
    assert [each["what"] for each in content["rows"]] == ["decode, one core, 4 JPEGs of 64 px"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_job_says_so(tmp_path: Path) -> None:
    result = job(f"--report={tmp_path / 'report.json'}")
    assert (result.returncode, result.stderr) == (2, "error: no CUDA device here; --tiny tries the job out on CPUs\n")
    assert not list(tmp_path.iterdir())

"""What tests share, each made once and only if a test asks for it; how tests are ordered, grouped and summed up."""

import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nsl_dist.ray_internals import LOCAL_ENVIRONMENT
from tests.support.images import write_sop
from tests.support.processes import PATIENT_RAY, ROOT

os.environ |= LOCAL_ENVIRONMENT  # of every Ray that a test starts itself; Ray reads it when it is imported

if TYPE_CHECKING:
    from selenium import webdriver

    from nsl_dist.data.shards import Manifest
    from tests.support.local_cluster import LocalCluster
    from tests.support.ranks import Ranks
    from tests.support.search_service import Service
    from tests.support.trained_run import TrainedRun

# By fixture, the group of tests that one worker of pytest-xdist runs, so that only that one makes the fixture.
GROUPS = {"trained": "trained", "service": "service", "local": "local", "cluster": "cluster"}
INSIDE = "NSL_TEST_IN_OWN_PROCESS"
# Threads of torch wait for each other by spinning: on a busy machine most of the time goes there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= PATIENT_RAY  # read when Ray is imported

import tests.support.interpreter  # noqa: E402, F401  # before any test imports what imports Triton


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reverse", action="store_true", help="run the last test first")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--reverse"):
        items.reverse()
    for item in items:
        groups = [group for fixture, group in GROUPS.items() if fixture in getattr(item, "fixturenames", ())]
        if groups:
            item.add_marker(pytest.mark.xdist_group(groups[0]))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test with a Ray of its own in a process of its own: Ray Data cannot go from one Ray to another in one."""
    if pyfuncitem.get_closest_marker("own_process") is None or INSIDE in os.environ:
        return None
    test = f"{pyfuncitem.path}::{pyfuncitem.name}"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider", test]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment | {INSIDE: "1"}, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if done.returncode:
        pytest.fail(f"in its own process: {done.stdout[-20_000:]}", pytrace=False)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    skipped = [f"{count} ({reason})" for reason, count in reasons.items()]
    left_out = ["the slow ones (make test-rest)"] if config.getoption("-m") == "not slow" else []
    if skipped or left_out:
        terminalreporter.write_line(f"not run: {'; '.join([*skipped, *left_out])}")


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images in the layout of Stanford Online Products."""
    folder = Path(os.environ.get("NSL_TEST_IMAGES") or ROOT.parent / "shared" / "data")
    archive = folder / "omniglot_sop.zip"
    if not archive.exists():
        pytest.skip("no omniglot_sop.zip in the folder NSL_TEST_IMAGES")
    root = tmp_path_factory.mktemp("omniglot")
    zipfile.ZipFile(archive).extractall(root)
    return next(root.rglob("Ebay_train.txt")).parent


@pytest.fixture(autouse=True)
def tracking_uri_of_the_environment() -> Iterator[None]:
    """Kept as it was: `mlflow.set_tracking_uri` sets it for all that comes."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real Ray of this process, on loopback, with at least 4 CPUs and no GPU."""
    import ray

    from nsl_dist.cluster import connect

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        connect(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """140 images of 20 classes to train on, 41 of 9 others, one of which has one image alone."""
    return write_sop(tmp_path_factory.mktemp("raw"), {"train": [7] * 20, "test": [5] * 8 + [1]})


@pytest.fixture(scope="session")
def shards(raw: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> "Manifest":
    """`raw` in shards; a test that damages them takes a copy."""
    from nsl_dist.data.shards import find_data, open_data

    storage = tmp_path_factory.mktemp("shards")
    return open_data(find_data(str(raw), layout="sop"), storage_root=str(storage), max_undecodable=0)


@pytest.fixture(scope="session")
def trained(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> "TrainedRun":
    """The main job on a Ray of its own: two workers, half of the classes sampled, evaluated after every epoch."""
    from tests.support.trained_run import train

    return train(raw, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")  # idle, it would slow down the tests to come
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator["LocalCluster"]:
    """The cluster of cluster/local.py: a head without CPUs and up to 2 nodes that its autoscaler adds."""
    from tests.support.local_cluster import started_local

    with started_local(tmp_path_factory.mktemp("home")) as started:
        yield started


@pytest.fixture(scope="module")  # idle, it would slow down the tests to come
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Service"]:
    """The search service over 37 images, on a Ray of its own."""
    from tests.support.search_service import started_service

    with started_service(tmp_path_factory.mktemp("service")) as started:
        yield started


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    from tests.support.browser import opened_browser

    with opened_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def browser(chromium: "webdriver.Chrome") -> "webdriver.Chrome":
    """A real browser without a screen, with nothing of the test before."""
    chromium.get("about:blank")
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.get_log("browser")
    return chromium


@pytest.fixture(scope="session")
def ranks() -> Iterator["Ranks"]:
    """Processes for gloo ranks."""
    from tests.support.ranks import Ranks

    started = Ranks()
    yield started
    started.close()

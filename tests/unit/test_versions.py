"""The version of this package, and those of what its results depend on."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from nsl_dist import __version__
from nsl_dist.tracking.tracker import installed_versions

ROOT = Path(__file__).parents[2]


def test_installed_and_released_version_are_this_one() -> None:
    assert importlib.metadata.version("nsl_dist") == __version__
    released = re.findall(r"^## \[?(\d\S+?)\]? - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == __version__


@pytest.mark.parametrize("distribution", ["faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"])
def test_versions_name_the_faiss_that_is_installed(
    distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / f"{distribution.replace('-', '_')}-1.2.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_versions() == {distribution: "1.2.3"}

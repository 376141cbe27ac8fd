"""Storage that fails for a while; files that appear complete or not at all."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nsl_dist import storage
from nsl_dist.tracking.tracker import Tracker


def failing(*errors: OSError) -> Callable[[], str]:
    left = list(errors)

    def work() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


def test_what_storage_fails_at_is_done_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert storage.patiently(failing(OSError("away"), OSError("away"))) == "done"
    assert pauses == [1.0, 2.0]
    assert capsys.readouterr().out.count("storage fails: away; trying again") == 2
    with pytest.raises(FileNotFoundError):
        storage.patiently(failing(FileNotFoundError("gone")))
    monkeypatch.setattr(storage, "PATIENCE", -1)
    with pytest.raises(OSError, match="for long"):
        storage.patiently(failing(OSError("for long")))
    assert len(pauses) == 2


def write_half(location: str) -> None:
    with storage.open_output(location) as stream:
        stream.write(b"half of what comes a")
        raise RuntimeError("cut off")


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    storage.write_bytes(str(path), b"before")
    with pytest.raises(RuntimeError, match="cut off"):
        write_half(str(path))
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]
    location = "memory://folder/file"  # as in an object store
    with pytest.raises(RuntimeError, match="cut off"):
        write_half(location)
    assert not storage.exists(location)


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIA:se/cret@bucket/shards", "abfs://:secret@account/shards", "postgresql://me:secret@host:5432/mlflow"],
)
def test_passwords_in_uris_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ValueError, match=r"://\*\*\*@\w+.* holds a password.*environment") as refused:
        storage.resolve(uri)
    assert not re.search(r"se/?cret", str(refused.value))
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI") as refused:
        Tracker(uri, storage_root="memory://")
    assert not re.search(r"se/?cret", str(refused.value))


def test_what_is_no_password() -> None:
    for uri in ("s3://bucket/a:b/c@d", "abfs://container@account/x", "hdfs://host:8020/me@home", "sftp://me@host/x"):
        storage.refuse_password(uri, instead="the environment")
        assert storage.without_password(f"cannot open {uri}") == f"cannot open {uri}"


def test_a_tracking_uri_of_the_environment_keeps_its_password_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    with pytest.raises(ValueError, match=r"http://\*\*\*@127.0.0.1:1 cannot be used") as refused:
        Tracker(None, storage_root="memory://")
    assert "secret" not in str(refused.value)

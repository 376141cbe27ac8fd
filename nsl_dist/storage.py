"""Where files live: local paths and URIs, resolved the same way everywhere."""

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

PATIENCE = 15 * 60  # seconds that storage may fail before the work does
Result = TypeVar("Result")
_PASSWORD = re.compile(r"://[^/@\s]*:(?!\d+/)[^@\s]*@")  # a secret key may have slashes; hdfs://host:8020/ is none


def absolute(location: str) -> str:
    """Return a URI unchanged and a local path made absolute, `~` expanded."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


@functools.lru_cache(maxsize=1024)  # a new client of an object store at each call would connect anew
def resolve(location: str) -> tuple[Any, str]:
    """Return `(pyarrow filesystem, path within it)` of a local path or of any URI that pyarrow or fsspec knows.

    Credentials of object stores come from the environment, as each store's own client reads them.

    Raises:
        ValueError: the URI's scheme is unknown, or its fsspec client is not installed, or it holds a password.

    """
    location = absolute(location)
    refuse_password(location, instead="the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if "://" not in location:
        return fs.LocalFileSystem(), location
    try:
        return fs.FileSystem.from_uri(location)
    except (pa.ArrowInvalid, NotImplementedError) as pyarrow_error:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(location)
        except (ValueError, ImportError) as error:
            raise ValueError(f"cannot open {location}: {error}; pyarrow says: {pyarrow_error}") from error
        return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def refuse_password(uri: str, *, instead: str) -> None:
    """Refuse a password or secret key in a URI, which logs, results and the dashboard would show.

    Raises:
        ValueError: there is one; the message does not hold it.

    """
    if _PASSWORD.search(uri):
        raise ValueError(f"{without_password(uri)} holds a password, which logs would show; give it in {instead}")


def without_password(text: str) -> str:
    """Return a text with `***` for what stands before the host of a URI that holds a password."""
    return _PASSWORD.sub("://***@", text)


def join(location: str, *parts: str) -> str:
    """Join path components onto a local path or URI."""
    return "/".join([location.rstrip("/"), *parts])


def exists(location: str) -> bool:
    """Tell whether a file or folder is there."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(location: str) -> bytes:
    """Read one whole file.

    Raises:
        FileNotFoundError: there is none.

    """
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(location: str, content: bytes) -> None:
    """Write one whole file (see `open_output`)."""
    with open_output(location) as stream:
        stream.write(content)


def delete(location: str) -> None:
    """Delete a file."""
    filesystem, path = resolve(location)
    filesystem.delete_file(path)


@contextmanager
def open_output(location: str) -> Iterator[Any]:
    """Open a file for writing, its folders made as needed; it appears complete or not at all."""
    filesystem, path = resolve(location)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if not isinstance(filesystem, fs.LocalFileSystem):  # object stores show an object once it is closed
        opened = False
        try:
            with filesystem.open_output_stream(path) as stream:
                opened = True
                yield stream
        except BaseException:
            if opened:  # and closed, with half of its content
                with suppress(OSError):  # the first error is the one to tell
                    filesystem.delete_file(path)
            raise
        return
    partial = Path(f"{path}.partial-{os.getpid()}")
    try:
        with filesystem.open_output_stream(str(partial)) as stream:
            yield stream
        with partial.open("rb") as file:
            os.fsync(file)  # or a power cut may leave the name without the content
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.rename(path)


def _say(error: OSError) -> None:
    print(f"storage fails: {error}; trying again", flush=True)


def patiently(work: Callable[[], Result], *, on_failure: Callable[[OSError], None] = _say) -> Result:
    """Do some work with storage, again for a quarter of an hour where storage fails.

    Args:
        work: may be done more than once.
        on_failure: called each time that storage fails.

    Returns:
        What `work` does.

    Raises:
        FileNotFoundError: at once; storage that says so has not failed.
        OSError: it fails for longer.

    """
    failing_since: float | None = None
    pause = 1.0
    while True:
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            failing_since = failing_since or time.monotonic()
            if time.monotonic() - failing_since > PATIENCE:
                raise
            on_failure(error)
            time.sleep(pause)
            pause = min(2 * pause, 60.0)


def check_writable(location: str) -> None:
    """Write and delete a small file in a folder, made if it is missing.

    Raises:
        ValueError: the folder cannot be written.

    """
    probe = join(location, f".writable-{os.getpid()}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        raise ValueError(f"--storage {location} cannot be written: {error}; give a writable folder or URI") from error

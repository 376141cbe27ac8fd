"""Where files live: local paths and URIs, resolved the same way everywhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs


def absolute(location: str) -> str:
    """Return a URI unchanged and a local path made absolute, `~` expanded."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


def resolve(location: str) -> tuple[Any, str]:
    """Return `(pyarrow filesystem, path within it)` of a local path or of any URI that pyarrow or fsspec knows.

    Credentials of object stores come from the environment, as each store's own client reads them.

    Raises:
        ValueError: the URI's scheme is unknown, or its fsspec client is not installed.

    """
    location = absolute(location)
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
    """Open a file for writing, its folders made as needed; it appears complete or, on a local disk, not at all."""
    filesystem, path = resolve(location)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    partial = f"{path}.partial-{os.getpid()}" if isinstance(filesystem, fs.LocalFileSystem) else path
    try:
        with filesystem.open_output_stream(partial) as stream:
            yield stream
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            filesystem.delete_file(partial)
        raise
    if partial != path:
        filesystem.move(partial, path)


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

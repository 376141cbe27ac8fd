"""File access by local path or URI, resolved the same way everywhere."""

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

PATIENCE = 15 * 60  # seconds to keep retrying failing storage
Result = TypeVar("Result")
_PASSWORD = re.compile(r"://[^/@\s]*:(?!\d+/)[^@\s]*@")  # a secret key may contain slashes; :8020/ is a port


def absolute(location: str) -> str:
    """Make a local path absolute and expand `~`; URIs are returned unchanged."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


@functools.lru_cache(maxsize=1024)  # a new object-store client would have to reconnect on each call
def resolve(location: str) -> tuple[Any, str]:
    """Return `(pyarrow filesystem, path within it)` for a local path or any URI that pyarrow or fsspec supports.

    Object-store credentials come from the environment, as read by each store's own client.

    Raises:
        ValueError: the URI's scheme is unknown, its fsspec client is not installed, or it contains a password.

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
    """Reject URIs with a password or secret key, which would appear in logs, results and the dashboard.

    Raises:
        ValueError: the URI contains one; the message does not repeat it.

    """
    if _PASSWORD.search(uri):
        raise ValueError(f"{without_password(uri)} holds a password, which logs would show; give it in {instead}")


def without_password(text: str) -> str:
    """Replace the credentials in URIs that contain a password by `***`."""
    return _PASSWORD.sub("://***@", text)


def join(location: str, *parts: str) -> str:
    """Join path components onto a local path or URI."""
    return "/".join([location.rstrip("/"), *parts])


def exists(location: str) -> bool:
    """Return whether a file or folder exists."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


@dataclass(frozen=True)
class Tree:
    """What lies below a folder, by path relative to it.

    Attributes:
        sizes: of the files, in bytes.
        folders: at any depth.
        broken_links: symbolic links to nothing.

    """

    sizes: dict[str, int]
    folders: list[str]
    broken_links: list[str]


def has_folders(root: str) -> bool:
    """Return whether a folder holds others."""
    filesystem, path = resolve(root)
    return any(info.type == fs.FileType.Directory for info in filesystem.get_file_info(fs.FileSelector(path)))


def list_tree(root: str) -> Tree:
    """List a folder with everything below it; symbolic links are followed.

    Raises:
        ValueError: a link leads to a folder that it lies in, or a folder or name cannot be read.

    """
    filesystem, top = resolve(root)
    if isinstance(filesystem, fs.LocalFileSystem):
        return _list_local_tree(top)
    tree, prefix = Tree({}, [], []), len(top.rstrip("/")) + 1
    for info in filesystem.get_file_info(fs.FileSelector(top, recursive=True)):
        if info.type == fs.FileType.File:
            tree.sizes[info.path[prefix:]] = info.size
        elif info.type == fs.FileType.Directory:
            tree.folders.append(info.path[prefix:])
    return tree


def _list_local_tree(top: str) -> Tree:
    """List a local folder; pyarrow would go round in loops of links, and leave out broken ones without a word."""
    tree = Tree({}, [], [])
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(top),))]  # with the real folders above
    while waiting:
        folder, above = waiting.pop()
        for entry in _scan(os.path.join(top, folder)):
            path = os.path.join(folder, entry.name)
            if entry.is_symlink() and not os.path.exists(entry.path):
                tree.broken_links.append(path)
            elif entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real in above:
                    raise ValueError(f"{entry.path} is a link to a folder that it lies in; remove it")
                tree.folders.append(path)
                waiting.append((path, (*above, real)))
            elif entry.is_file():
                tree.sizes[path] = entry.stat().st_size
    return tree


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        raise ValueError(f"{folder} cannot be read: give yourself the permission, or move it elsewhere") from None
    for entry in entries:
        if any("\udc80" <= letter <= "\udcff" for letter in entry.name):  # bytes that Python could not decode
            raise ValueError(f"{folder} holds {os.fsencode(entry.name)!r}, whose name is not in UTF-8; rename it")
    return entries


def read_bytes(location: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: the file does not exist.

    """
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(location: str, content: bytes) -> None:
    """Write a whole file (see `open_output`)."""
    with open_output(location) as stream:
        stream.write(content)


def delete(location: str) -> None:
    """Delete a file."""
    filesystem, path = resolve(location)
    filesystem.delete_file(path)


@contextmanager
def open_output(location: str) -> Iterator[Any]:
    """Open a file for writing, creating its folders as needed; it appears complete or not at all."""
    filesystem, path = resolve(location)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if not isinstance(filesystem, fs.LocalFileSystem):  # in object stores an object becomes visible on close
        opened = False
        try:
            with filesystem.open_output_stream(path) as stream:
                opened = True
                yield stream
        except BaseException:
            if opened:  # now closed, so it is visible with partial content
                with suppress(OSError):  # report the original error instead
                    filesystem.delete_file(path)
            raise
        return
    partial = Path(f"{path}.partial-{os.getpid()}")
    try:
        with filesystem.open_output_stream(str(partial)) as stream:
            yield stream
        with partial.open("rb") as file:
            os.fsync(file)  # otherwise a power cut may leave an empty file under the final name
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.rename(path)


def _say(error: OSError) -> None:
    print(f"storage fails: {error}; trying again", flush=True)


def patiently(work: Callable[[], Result], *, on_failure: Callable[[OSError], None] = _say) -> Result:
    """Return the result of `work`, retrying for `PATIENCE` seconds while storage fails.

    Args:
        work: may be called more than once.
        on_failure: called after each failure.

    Raises:
        FileNotFoundError: immediately, since a missing file is not a storage failure.
        OSError: storage kept failing for longer.

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
    """Check that a folder is writable by writing and deleting a small file; the folder is created if missing.

    Raises:
        ValueError: the folder is not writable.

    """
    probe = join(location, f".writable-{os.getpid()}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        raise ValueError(f"--storage {location} cannot be written: {error}; give a writable folder or URI") from error

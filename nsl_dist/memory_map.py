"""Memory-mapped files for what is larger than memory."""

import mmap
import os
import tempfile


def map_file(num_bytes: int, *, directory: str | None, what: str, remedy: str) -> mmap.mmap:
    """Return a file without a name, of zeros, that vanishes with the process.

    Args:
        num_bytes: at least 1.
        directory: of the file; None: the system's for temporary files.
        what: is kept in it: "class proxies".
        remedy: what a user can do where there is no room for it.

    Raises:
        ValueError: the directory does not exist or its disk has no room.

    """
    directory = directory or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            # All of it now: a disk that is full later would end the process with a bus error.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise ValueError(
            f"cannot keep {num_bytes / 2**30:.1f} GiB of {what} in {directory}: {error.strerror}; {remedy}"
        ) from error

"""Memory-mapped files for data that does not fit in memory."""

import mmap
import os
import tempfile


def map_file(num_bytes: int, *, directory: str | None, what: str, remedy: str) -> mmap.mmap:
    """Map an unnamed file of zeros, which disappears with the process.

    Args:
        num_bytes: at least 1.
        directory: folder for the file; None for the system's temporary folder.
        what: contents, for the error message: "class proxies".
        remedy: advice for the error message.

    Raises:
        ValueError: the directory does not exist or its disk is full.

    """
    directory = directory or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            # Allocate everything now: a disk that fills up later would end the process with a bus error.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise ValueError(
            f"cannot keep {num_bytes / 2**30:.1f} GiB of {what} in {directory}: {error.strerror}; {remedy}"
        ) from error

"""Rows of large matrices in safetensors files: written as a stream, read by range.

A file holds the rows `start` to `stop - 1` of some matrices of equally many rows. The safetensors package reads and
writes whole files; rows of a class-proxy matrix may be larger than memory, and another number of workers wants others.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nsl_dist import storage

BYTES_AT_ONCE = 16 * 2**20
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}


def write_rows(location: str, tensors: Mapping[str, Tensor], *, start: int) -> None:
    """Write matrices, or vectors, of equally many rows.

    Args:
        location: file or URI; it appears complete or not at all.
        tensors: contiguous, in memory or memory-mapped.
        start: the place of their first row in the whole matrix.

    """
    (num_rows,) = {len(tensor) for tensor in tensors.values()}
    header: dict[str, Any] = {"__metadata__": {"start": str(start), "stop": str(start + num_rows)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with storage.open_output(location) as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            for part in _in_parts(tensor):
                stream.write(_bytes_of(part))


class RowFile:
    """A file of `write_rows`, open for reading; a context manager.

    Attributes:
        start: the place of its first row in the whole matrix.
        stop: one past its last row.
        bytes_read: so far.

    """

    def __init__(self, location: str) -> None:
        """Read the header.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was cut off, or is of another format.

        """
        self._location = location
        filesystem, path = storage.resolve(location)
        self._file = filesystem.open_input_file(path)
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            self._header = json.loads(self._file.read(length))
            self._first_byte = 8 + length
            metadata = self._header.pop("__metadata__")
            self.start, self.stop = int(metadata["start"]), int(metadata["stop"])
            num_bytes = self._first_byte + max(tensor["data_offsets"][1] for tensor in self._header.values())
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(f"{location} is no file of rows of a checkpoint: {error}") from error
        if self._file.size() != num_bytes:
            raise ValueError(f"{location} has {self._file.size()} bytes, its header says {num_bytes}: it was cut off")
        self.bytes_read = self._first_byte

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read_into(self, name: str, target: Tensor, *, first_row: int) -> None:
        """Read the rows from `first_row` of the whole matrix into all of `target`, whatever device it lies on.

        Raises:
            ValueError: the matrix is not in the file, or has another shape or type.

        """
        entry = self._header.get(name)
        if entry is None or entry["dtype"] != _NAMES[target.dtype] or entry["shape"][1:] != list(target.shape[1:]):
            raise ValueError(
                f"{self._location} has {name} as {entry and (entry['dtype'], entry['shape'])}, not as "
                f"{_NAMES[target.dtype]} of shape {['rows', *target.shape[1:]]}: it was saved with other --proxies or "
                "--model.dim"
            )
        row_bytes = target[:1].nbytes
        offset = self._first_byte + entry["data_offsets"][0] + (first_row - self.start) * row_bytes
        assert self.start <= first_row
        assert first_row + len(target) <= self.stop
        self._file.seek(offset)
        for part in _in_parts(target):
            content = bytearray(part.nbytes)
            if self._file.readinto(content) != part.nbytes:
                raise ValueError(f"{self._location} ended while it was read")
            part.copy_(torch.frombuffer(content, dtype=target.dtype).view(part.shape))
        self.bytes_read += target.nbytes


def _in_parts(tensor: Tensor) -> Iterator[Tensor]:
    if len(tensor) == 0:
        return
    rows = max(1, BYTES_AT_ONCE // tensor[:1].nbytes)
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().reshape(-1).data)

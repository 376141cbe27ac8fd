"""Rows of large matrices in safetensors files: written as a stream, read by range.

A file holds the rows `start` to `stop - 1` of one or more matrices. The safetensors package only reads and writes whole
files, but the rows of a class-proxy matrix may exceed memory, and resuming with another number of workers needs ranges.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nsl_dist import storage

BYTES_AT_ONCE = 16 * 2**20
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}


def write_rows(location: str, tensors: Mapping[str, Tensor], *, start: int) -> None:
    """Write matrices or vectors with the same number of rows.

    Args:
        location: file or URI, written atomically.
        tensors: contiguous tensors by name, in memory or memory-mapped.
        start: index of their first row in the whole matrix.

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


def read_rows(location: str, targets: Mapping[str, Tensor], *, first_row: int) -> int:
    """Read ranges of rows from a file written by `write_rows`; return the number of bytes read.

    Args:
        location: file or URI.
        targets: tensors to fill by name, on any device.
        first_row: index of their first row in the whole matrix.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated or has another format; a matrix is missing or has another shape or type.

    """
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file:
        header, start, first_byte = _read_header(file, location)
        num_bytes = first_byte
        for name, target in targets.items():
            entry = header.get(name)
            if entry is None or entry["dtype"] != _NAMES[target.dtype] or entry["shape"][1:] != list(target.shape[1:]):
                raise ValueError(
                    f"{location} has {name} as {entry and (entry['dtype'], entry['shape'])}, not as "
                    f"{_NAMES[target.dtype]} of shape {['rows', *target.shape[1:]]}: it was saved with other "
                    "--proxies or --model.dim"
                )
            assert start <= first_row
            assert first_row + len(target) <= start + entry["shape"][0]
            file.seek(first_byte + entry["data_offsets"][0] + (first_row - start) * target[:1].nbytes)
            for part in _in_parts(target):
                content = bytearray(part.nbytes)
                if file.readinto(content) != part.nbytes:
                    raise ValueError(f"{location} ended unexpectedly")
                part.copy_(torch.frombuffer(content, dtype=target.dtype).view(part.shape))
            num_bytes += target.nbytes
    return num_bytes


def _read_header(file: Any, location: str) -> tuple[dict[str, Any], int, int]:
    """Return the header entries, the index of the first row in the whole matrix, and the offset of the data."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        start = int(header.pop("__metadata__")["start"])
        num_bytes = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        if file.size() != num_bytes:
            raise ValueError(f"it has {file.size()} bytes, its header says {num_bytes}: it was cut off")
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{location} is not a valid file of checkpoint rows: {error}") from error
    return header, start, 8 + length


def _in_parts(tensor: Tensor) -> Iterator[Tensor]:
    if len(tensor) == 0:
        return
    rows = max(1, BYTES_AT_ONCE // tensor[:1].nbytes)
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().reshape(-1).data)

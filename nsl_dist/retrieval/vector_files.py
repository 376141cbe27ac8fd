"""Embeddings on disk: Parquet files of consecutive ids, float vectors and binary codes, readable by range.

A folder holds the embeddings of one model on one data set: files of about equal size for each split, and
`embeddings.json`, which lists them and is written last.
"""

import functools
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nsl_dist import storage

_READING = threading.Lock()  # two threads that read from one open file crash the process
ROW_GROUP_BYTES = 4 * 2**20  # memory that a reader of a range needs beside the range


@dataclass(frozen=True)
class EmbeddingSet:
    """The embeddings of one split, ids from 0 in the order of its classes.

    Attributes:
        location: folder or URI.
        split: name of the split.
        dim: dimensions of a vector.
        files: names, in order of id.
        counts: vectors in each file.

    """

    location: str
    split: str
    dim: int
    files: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def num_vectors(self) -> int:
        """Vectors in all files."""
        return sum(self.counts)

    @property
    def code_bytes(self) -> int:
        """Bytes of a binary code."""
        return -(-self.dim // 8)

    def read(self, column: str, ids: range) -> Iterator[tuple[int, NDArray[Any]]]:
        """Read a range of one column, a row group at a time.

        Args:
            column: "id", "label", "vector" or "code".
            ids: rows, in steps of 1.

        Yields:
            The id of the first row and the rows: int64 `[n]`, float32 `[n, dim]` or uint8 `[n, code_bytes]`.

        """
        first = 0
        for name, count in zip(self.files, self.counts, strict=True):
            if first < ids.stop and first + count > ids.start:
                file = _open(storage.join(self.location, name))
                group_first = first
                for group in range(file.num_row_groups):
                    group_count = file.metadata.row_group(group).num_rows
                    start, stop = max(ids.start, group_first), min(ids.stop, group_first + group_count)
                    if start < stop:
                        with _READING:
                            rows = file.read_row_group(group, columns=[column])[column].combine_chunks()
                        yield start, _as_numpy(rows)[start - group_first : stop - group_first]
                    group_first += group_count
            first += count

    def paths(self) -> pa.ChunkedArray:
        """Read the paths of all images in the raw data set, by id."""
        with _READING:
            read = [_open(storage.join(self.location, name)).read(columns=["path"])["path"] for name in self.files]
        return pa.chunked_array([chunk for column in read for chunk in column.chunks], pa.string())

    def read_all(self, column: str, ids: range) -> NDArray[Any]:
        """Read a range of one column into one array (see `read`)."""
        return np.concatenate([rows for _, rows in self.read(column, ids)])


def pack_codes(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return binary embeddings, the sign of each coordinate (paper, section 3.4), 8 to a byte, padded with zeros."""
    return np.packbits(vectors > 0, axis=1)


def write_file(
    location: str,
    *,
    split: str,
    ids: NDArray[np.int64],
    paths: list[str],
    labels: NDArray[np.int64],
    vectors: NDArray[np.float32],
) -> None:
    """Write one file of embeddings and their codes; it appears complete or not at all.

    Args:
        location: file or URI.
        split: name of the split.
        ids: consecutive.
        paths: of the images in the raw data set, in the order of the ids.
        labels: classes, in the order of the ids.
        vectors: `[len(ids), dim]`.

    """
    dim = vectors.shape[1]
    codes = pack_codes(vectors)
    columns = {
        "id": pa.array(ids),
        "path": pa.array(paths, pa.string()),
        "label": pa.array(labels),
        "split": pa.array([split] * len(ids)).dictionary_encode(),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
        "code": pa.Array.from_buffers(pa.binary(codes.shape[1]), len(ids), [None, pa.py_buffer(codes)]),
    }
    content = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        content,
        row_group_size=max(1, ROW_GROUP_BYTES // (4 * dim)),
        compression="none",  # embeddings hardly compress
        use_dictionary=["split"],
        write_statistics=["id"],
    )
    storage.write_bytes(location, content.getvalue())


def write_index(location: str, sets: list[EmbeddingSet]) -> None:
    """Write `embeddings.json`, which marks a folder as complete."""
    content = {each.split: {name: value for name, value in asdict(each).items() if name != "location"} for each in sets}
    storage.write_bytes(storage.join(location, "embeddings.json"), json.dumps(content, indent=1).encode())


def load_index(location: str) -> dict[str, EmbeddingSet]:
    """Return the embeddings in a complete folder, by split.

    Raises:
        FileNotFoundError: the folder is not complete.

    """
    content = json.loads(storage.read_bytes(storage.join(location, "embeddings.json")))
    return {
        split: EmbeddingSet(
            location=location,
            split=split,
            dim=fields["dim"],
            files=tuple(fields["files"]),
            counts=tuple(fields["counts"]),
        )
        for split, fields in content.items()
    }


@functools.lru_cache(maxsize=64)
def _open(location: str) -> pq.ParquetFile:
    filesystem, path = storage.resolve(location)
    return pq.ParquetFile(path, filesystem=filesystem)


def _as_numpy(column: pa.Array) -> NDArray[Any]:
    """Return a view; pyarrow's own `to_numpy` would import pandas, which takes seconds in every process."""
    if pa.types.is_fixed_size_list(column.type):
        return np.from_dlpack(column.flatten()).reshape(len(column), column.type.list_size)
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        content = np.frombuffer(column.buffers()[1], dtype=np.uint8)
        return content[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)
    return np.from_dlpack(column)

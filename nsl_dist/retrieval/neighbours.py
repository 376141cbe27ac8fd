"""Neighbours as sortable keys: distance and id in one int64, so that sorting breaks ties by id. Pure numpy.

A distance is the negative float32 similarity or the int32 Hamming distance. The upper half of a key holds the distance,
as bits in the same order as the distances; the lower half holds the id.

Letters of array names: Q queries of a block, K neighbours, G vectors of a part of the gallery.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 4
SAMPLE_EVERY = 8
MOST_IDS = 2**31
NO_NEIGHBOUR = np.int64(2**63 - 1)  # sorts last; its id is -1


def to_keys(distances: NDArray[Any], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return keys that sort by distance, float32 or int32, then by id; the id -1 means no neighbour."""
    keys = _flip_negative_floats(distances).astype(np.int64)
    keys <<= 32
    keys |= ids
    keys[ids < 0] = NO_NEIGHBOUR
    return keys


def ids_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids of keys, -1 where there is no neighbour."""
    return (keys << 32) >> 32


def distances_of(keys: NDArray[np.int64], dtype: Any) -> NDArray[Any]:
    """Return the distances of keys, in the type that they had."""
    bits = (keys >> 32).astype(np.int32)
    return _flip_negative_floats(bits.view(dtype)).view(dtype)


def _flip_negative_floats(distances: NDArray[Any]) -> NDArray[np.int32]:
    """Return bits in the order of the distances, or turn such bits back; those of int32 are in order already."""
    bits = distances.view(np.int32)
    return bits if distances.dtype == np.int32 else bits ^ ((bits >> 31) & np.int32(2**31 - 1))


def smallest(keys: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return the `k` smallest along the last axis, reordering `keys`; if there are k, the largest of them is last."""
    if keys.shape[-1] >= k:
        keys.partition(k - 1, axis=-1)
    return keys[..., :k]


class Nearest:
    """The `k` nearest neighbours of each query, collected over the parts of a gallery."""

    def __init__(self, num_queries: int, k: int) -> None:
        self._k = k
        self._kept_QK = np.empty((num_queries, 0), dtype=np.int64)

    def add(self, distances_QG: NDArray[Any], first_id: int) -> None:
        """Add a part of the gallery, whose ids are higher than all before.

        Args:
            distances_QG: float32 or int32.
            first_id: id of the first column.

        """
        # A few rows at a time stay in the cache; with single rows, threads would wait for Python's lock.
        starts = range(0, len(distances_QG), ROWS_AT_ONCE)
        parts = [slice(start, start + ROWS_AT_ONCE) for start in starts]
        self._kept_QK = np.concatenate(
            [self._nearer(self._kept_QK[part], distances_QG[part], first_id) for part in parts]
        )

    def _nearer(self, kept: NDArray[np.int64], distances: NDArray[Any], first_id: int) -> NDArray[np.int64]:
        num_rows, num_columns = distances.shape
        if kept.shape[1] == self._k:
            # One comparison rules out most of the part, in a fraction of the time of a selection.
            places = np.flatnonzero(distances < distances_of(kept[:, -1:], distances.dtype))
        elif num_columns > self._k:
            places = _about_the_nearest(distances, self._k)
        else:
            places = np.arange(distances.size)
        rows, columns = np.divmod(places, num_columns)
        counts = np.bincount(rows, minlength=num_rows)
        keys = np.full((num_rows, counts.max()), NO_NEIGHBOUR)
        keys[np.arange(keys.shape[1]) < counts[:, None]] = to_keys(distances.ravel()[places], columns + first_id)
        return smallest(np.concatenate([kept, keys], axis=1), self._k)

    def sorted(self) -> NDArray[np.int64]:
        """Return the keys, `[Q, K]`, nearest first."""
        return np.sort(self._kept_QK, axis=1)


def _about_the_nearest(distances: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Return positions in the flattened array of the `k` nearest in each row, and of a few more."""
    num_columns = distances.shape[1]
    sample = distances[:, ::SAMPLE_EVERY]
    guess = int(1.3 * k / SAMPLE_EVERY) + 16
    if guess < sample.shape[1]:
        # A threshold from a sample takes a quarter of the time of one from all, and is rarely too low.
        places = np.flatnonzero(distances <= np.partition(sample, guess, axis=1)[:, guess, None])
        if (np.bincount(places // num_columns, minlength=len(distances)) >= k).all():
            return places
    return np.flatnonzero(distances <= np.partition(distances, k - 1, axis=1)[:, k - 1, None])


def merge(parts: list[NDArray[np.int64]], k: int) -> NDArray[np.int64]:
    """Merge sorted keys `[Q, K]` of several shards into the first `k` of all."""
    if len(parts) == 1:
        return parts[0][:, :k]
    return np.sort(smallest(np.concatenate(parts, axis=1), k), axis=1)


def without(own_ids_Q: NDArray[np.int64], keys_QK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Drop each query from its own neighbours, wherever it ranks; drop the last neighbour if it is not among them.

    Args:
        own_ids_Q: ids of the queries in the gallery; -1: not in it.
        keys_QK: keys, or just ids. Returned unchanged if no query is in the gallery.

    """
    if (own_ids_Q < 0).all():
        return keys_QK
    own_QK = ids_of(keys_QK) == own_ids_Q[:, None]
    passed_QK = np.logical_or.accumulate(own_QK, axis=1)[:, :-1]
    return np.where(passed_QK, keys_QK[:, 1:], keys_QK[:, :-1])

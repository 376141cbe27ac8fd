"""Neighbours in the order of their float64 similarities, ties by ascending id: pure numpy.

Float32 similarities come out of matrix products whose last bits depend on the shape of the blocks. Neighbours that
float32 cannot tell apart are compared by their inner products in float64, summed in one fixed order. So the order does
not depend on the number of shards, blocks or threads.

Letters of array names: Q queries of a block, K neighbours, D dimensions, G gallery vectors, P pairs of a query and a
neighbour.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


def inner_products(vectors_GD: NDArray[Any], query_D: NDArray[Any]) -> NDArray[np.float64]:
    """Return the inner products of some vectors with a query in float64, `[G]`.

    Each is summed in the same order, whatever G is, at least up to the 8,192 numbers that numpy looks at together.
    """
    vectors, query = (array.astype(np.float64, copy=False) for array in (vectors_GD, query_D))
    return np.einsum("gd,d->g", vectors, query)


def nearer(
    best: tuple[NDArray[np.float64], NDArray[np.int64]],
    query_D: NDArray[np.float64],
    *,
    gallery_GD: NDArray[np.float64],
    gallery_ids: NDArray[np.int64],
    k: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return similarities and ids of the `k` nearest among those found before and some more, whose ids are higher."""
    similarities = np.concatenate([best[0], inner_products(gallery_GD, query_D)])
    ids = np.concatenate([best[1], gallery_ids])
    if len(similarities) > k:
        kept = similarities >= -np.partition(-similarities, k - 1)[k - 1]
        similarities, ids = similarities[kept], ids[kept]
    order = np.argsort(-similarities, kind="stable")[:k]  # equal similarities are in ascending order of id already
    return similarities[order], ids[order]


class ExactSimilarities(Protocol):
    """The float64 similarities of a block of queries (see `inner_products`)."""

    def of_pairs(self, rows_P: NDArray[np.int64], ids_P: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return those of the queries `rows_P`, ascending, and the neighbours `ids_P`."""
        ...

    def nearest(self, rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Return the ids of the nearest of the queries `rows`, ties by id, `k` of each or more."""
        ...


def tolerance(dim: int) -> float:
    """Return a bound on the error of float32 inner products of unit vectors, as matrix products compute them.

    A sum of `dim` terms errs by about sqrt(dim) roundings of its partial sums (Higham & Mary 2019), which do not exceed
    1, however small the sum. `settle_ties` checks the bound on every pair that it looks at.
    """
    return float(2.0**-24 * (np.sqrt(dim) + 2))


def settle_ties(
    similarities_QK: NDArray[np.float32],
    ids_QK: NDArray[np.int64],
    exact: ExactSimilarities,
    k: int,
    *,
    dim: int,
    complete: bool,
    matches_QK: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Order neighbours by their float64 similarities, ties by id, looking only at those that float32 cannot tell apart.

    Args:
        similarities_QK: in descending order.
        ids_QK: neighbours in the same order; sorted in place.
        exact: the float64 similarities of the same queries.
        k: neighbours wanted, at most K.
        dim: dimensions of the vectors.
        complete: the K neighbours are the whole gallery, so none beyond them can be tied.
        matches_QK: neighbours that must come to their exact places; the order of the others does not matter. None:
            all must.

    Returns:
        `ids_QK`, of which the first `k` are the nearest.

    """
    error = tolerance(dim)
    while True:
        # If the last neighbour found may be as near as the last one wanted, ties reach beyond what was found.
        open_Q = np.zeros(len(ids_QK), dtype=bool)
        if not complete:
            open_Q = similarities_QK[:, -1] >= similarities_QK[:, k - 1] - 2 * error
        close_Q = ~open_Q if matches_QK is None else ~open_Q & _have_close_matches(similarities_QK, matches_QK, error)
        rows = np.flatnonzero(close_Q)
        settled, seen_error = _settle_rows(similarities_QK[rows], ids_QK[rows], rows, exact, k, error)
        if seen_error <= error:
            break
        error = 2 * seen_error
    ids_QK[rows] = settled
    rows = np.flatnonzero(open_Q)
    if len(rows):
        ids_QK[rows, :k] = exact.nearest(rows, k)[:, :k]
    return ids_QK


def _have_close_matches(
    similarities_QK: NDArray[np.float32], matches_QK: NDArray[np.bool_], error: float
) -> NDArray[np.bool_]:
    """Return which queries have a match that may change places with the neighbour before or after it, `[Q]`."""
    rows_P, columns_P = np.nonzero(matches_QK)
    similarities_P = similarities_QK[rows_P, columns_P]
    before_P = similarities_QK[rows_P, np.maximum(columns_P - 1, 0)]
    after_P = similarities_QK[rows_P, np.minimum(columns_P + 1, similarities_QK.shape[1] - 1)]
    close_P = (columns_P > 0) & (before_P - similarities_P <= 2 * error)
    close_P |= (columns_P + 1 < similarities_QK.shape[1]) & (similarities_P - after_P <= 2 * error)
    found_Q = np.zeros(len(similarities_QK), dtype=bool)
    found_Q[rows_P[close_P]] = True
    return found_Q


def _settle_rows(
    similarities_QK: NDArray[np.float32],
    ids_QK: NDArray[np.int64],
    rows_Q: NDArray[np.int64],
    exact: ExactSimilarities,
    k: int,
    error: float,
) -> tuple[NDArray[np.int64], float]:
    """Settle the ties of the queries `rows_Q` of a block; none of their ties reach beyond the K neighbours.

    Returns:
        The ids in their final order, and the largest error among the similarities that were compared.

    """
    close_QK = similarities_QK[:, :-1] - similarities_QK[:, 1:] <= 2 * error  # may change places with the next one
    involved_QK = np.zeros(ids_QK.shape, dtype=bool)
    involved_QK[:, :-1] |= close_QK
    involved_QK[:, 1:] |= close_QK
    # Beyond the last neighbour wanted, only those matter that are tied to it through a chain of close neighbours.
    np.logical_and.accumulate(close_QK[:, k - 1 :], axis=1, out=close_QK[:, k - 1 :])
    involved_QK[:, k:] &= close_QK[:, k - 1 :]
    rows_P, columns_P = np.nonzero(involved_QK)
    if not len(rows_P):
        return ids_QK, 0.0
    ids_P = ids_QK[rows_P, columns_P]
    exact_P = exact.of_pairs(rows_Q[rows_P], ids_P)
    starts_P = np.ones(len(rows_P), dtype=bool)
    starts_P[1:] = (rows_P[1:] != rows_P[:-1]) | ~close_QK[rows_P[1:], columns_P[1:] - 1]
    ids_QK[rows_P, columns_P] = ids_P[np.lexsort((ids_P, -exact_P, np.cumsum(starts_P)))]
    return ids_QK, float(np.abs(exact_P - similarities_QK[rows_P, columns_P]).max())

"""Retrieval metrics from neighbour ids: pure numpy.

Letters of array names: Q queries, K neighbours, best first.
"""

import numpy as np
from numpy.typing import NDArray


def first_match(
    neighbour_ids_QK: NDArray[np.int64],
    query_labels_Q: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return for each query the rank, from 0, of its first neighbour of the same class; K where there is none.

    Args:
        neighbour_ids_QK: places in the gallery, the query itself left out; -1 where there are fewer than K.
        query_labels_Q: classes of the queries.
        gallery_labels: classes of the gallery, by id.

    """
    matches_QK = (gallery_labels[neighbour_ids_QK] == query_labels_Q[:, None]) & (neighbour_ids_QK >= 0)
    return np.where(matches_QK.any(axis=1), matches_QK.argmax(axis=1), neighbour_ids_QK.shape[1])


def recall_at_k(first_match_Q: NDArray[np.int64], k: int) -> float:
    """Return the share of queries with a neighbour of the same class among their first `k`."""
    return float((first_match_Q < k).mean())

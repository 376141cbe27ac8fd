"""Retrieval metrics from neighbour ids: pure numpy.

Letters of array names: Q queries, K neighbours, best first, M metrics.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Ranks:
    """How well each query was answered, one value per query.

    Attributes:
        nearest: id of the first neighbour; -1 if there is none.
        first_match: rank of the first neighbour of the same class, from 0; K if there is none.
        r_precision: share of the first R neighbours that are of the query's class, R being its images in the gallery.
        average_precision_at_r: precision at each match among the first R neighbours, summed and divided by R.

    """

    nearest: NDArray[np.int64]
    first_match: NDArray[np.int64]
    r_precision: NDArray[np.float64]
    average_precision_at_r: NDArray[np.float64]


def rank(
    neighbour_ids_QK: NDArray[np.int64],
    query_labels_Q: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    num_relevant_Q: NDArray[np.int64],
) -> Ranks:
    """Judge the neighbours of queries.

    R-precision and MAP@R are those of "A Metric Learning Reality Check" (Musgrave et al. 2020), section 3.2. A query
    whose class the gallery lacks (R = 0) is a miss in all of them, as in the evaluation of the paper's authors.

    Args:
        neighbour_ids_QK: ids in the gallery, without the query itself; -1 where there are fewer than K.
        query_labels_Q: classes of the queries.
        gallery_labels: classes of the gallery, by id.
        num_relevant_Q: R, the images of the query's class in the gallery, without the query itself.

    """
    matches_QK = (gallery_labels[neighbour_ids_QK] == query_labels_Q[:, None]) & (neighbour_ids_QK >= 0)
    num_neighbours = neighbour_ids_QK.shape[1]
    most = int(num_relevant_Q.max(initial=0))
    assert most <= num_neighbours, f"{num_neighbours} neighbours are too few for classes of {most} images"
    places = np.arange(most)
    within_QR = matches_QK[:, :most] & (places < num_relevant_Q[:, None])
    precision_QR = np.cumsum(within_QR, axis=1) / (places + 1)
    at_least_one_Q = np.maximum(num_relevant_Q, 1)
    return Ranks(
        nearest=neighbour_ids_QK[:, 0],
        first_match=np.where(matches_QK.any(axis=1), matches_QK.argmax(axis=1), num_neighbours),
        r_precision=within_QR.sum(axis=1) / at_least_one_Q,
        average_precision_at_r=(precision_QR * within_QR).sum(axis=1) / at_least_one_Q,
    )


@dataclass(frozen=True)
class Classes:
    """Labels of all queries, and of the gallery by id."""

    queries: NDArray[np.int64]
    gallery: NDArray[np.int64]


@dataclass(frozen=True)
class Judge:
    """Turns the neighbours of a block of queries into ranks, which are small enough to send.

    Attributes:
        classes: of all queries and of the gallery.
        num_relevant: images of each query's class in the gallery, without the query itself.

    """

    classes: Classes
    num_relevant: NDArray[np.int64]

    def __call__(self, ids: range, neighbour_ids_QK: NDArray[np.int64]) -> Ranks:
        """Judge the neighbours of the queries `ids` (see `rank`)."""
        part = slice(ids.start, ids.stop)
        return rank(neighbour_ids_QK, self.classes.queries[part], self.classes.gallery, self.num_relevant[part])


def join(parts: list[Ranks]) -> Ranks:
    """Concatenate the ranks of blocks."""
    return Ranks(
        nearest=np.concatenate([part.nearest for part in parts]),
        first_match=np.concatenate([part.first_match for part in parts]),
        r_precision=np.concatenate([part.r_precision for part in parts]),
        average_precision_at_r=np.concatenate([part.average_precision_at_r for part in parts]),
    )


def recall_at_k(first_match_Q: NDArray[np.int64], k: int) -> float:
    """Return the share of queries with a neighbour of the same class among their first `k`."""
    return float((first_match_Q < k).mean())


def bootstrap_intervals(values_QM: NDArray[np.float64], labels_Q: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return 95% percentile intervals of the means of metrics, `[M, 2]`.

    Classes are resampled, not queries: queries of a class are each other's matches, so their metrics are correlated.

    Args:
        values_QM: metrics of each query.
        labels_Q: classes of the queries.

    Raises:
        ValueError: there are fewer than two classes.

    """
    from scipy.stats import bootstrap

    _, classes_Q = np.unique(labels_Q, return_inverse=True)
    sizes = np.bincount(classes_Q).astype(float)
    if len(sizes) < 2:
        raise ValueError("--eval.intervals needs two test classes or more to resample")

    def mean_of_resampled(sums: NDArray[np.float64], sizes: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(sums.sum(axis=axis) / sizes.sum(axis=axis))

    intervals = []
    for values_Q in values_QM.T:
        sums = np.bincount(classes_Q, weights=values_Q)
        result = bootstrap(
            (sums, sizes), mean_of_resampled, paired=True, vectorized=True, n_resamples=NUM_RESAMPLES, batch=50,
            method="percentile", rng=np.random.default_rng(0),
        )  # fmt: skip
        intervals.append([result.confidence_interval.low, result.confidence_interval.high])
    return np.array(intervals)

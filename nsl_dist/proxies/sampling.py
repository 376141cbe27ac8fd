"""Sampling of the classes for one iteration."""

import math

import numpy as np
from numpy.typing import NDArray


def draw_distinct(size: int, num_values: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a uniformly random set of `size` distinct integers from [0, num_values), ascending, in O(size log size)."""
    if size > num_values // 2:
        keep = np.ones(num_values, dtype=bool)
        keep[draw_distinct(num_values - size, num_values, rng)] = False
        return np.flatnonzero(keep)
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < size:
        # About as many draws with replacement as yield the missing number of distinct values. The result does not
        # depend on their order, so all sets of len(drawn) values are equally likely, and so are all their subsets.
        missing = size - len(drawn)
        num_draws = math.ceil(-(num_values - len(drawn)) * math.log1p(-missing / (num_values - len(drawn)))) + 16
        drawn = np.concatenate([drawn, rng.integers(num_values, size=num_draws)])
        drawn.sort()  # far faster than np.unique, which hashes
        drawn = drawn[np.diff(drawn, prepend=-1) > 0]
    surplus = rng.choice(len(drawn), len(drawn) - size, replace=False)
    return np.delete(drawn, surplus)


def sample_rows(
    positives: NDArray[np.int64], *, num_rows: int, num_sampled: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Sample the rows of one worker's partition for one iteration.

    All classes of the batch are included; other classes, drawn without replacement, fill the budget (paper, class
    sampling). The cost depends on the budget, not on the number of classes.

    Args:
        positives: rows of this partition that have an image in the global batch, ascending and distinct.
        num_rows: rows of this partition.
        num_sampled: the budget, at most `num_rows`.
        rng: generator seeded by (seed, step, rank).

    Returns:
        max(num_sampled, number of positives) rows, ascending and distinct.

    """
    if num_sampled == num_rows:
        return np.arange(num_rows)
    num_negatives = num_sampled - len(positives)
    if num_negatives <= 0:
        return positives
    # The i-th row that is not a positive is i plus the number of positives before it.
    drawn = draw_distinct(num_negatives, num_rows - len(positives), rng)
    negatives = drawn + np.searchsorted(positives - np.arange(len(positives)), drawn, side="right")
    return np.insert(negatives, np.searchsorted(negatives, positives), positives)

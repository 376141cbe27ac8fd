"""Which classes take part in this iteration."""

import math

import numpy as np
from numpy.typing import NDArray


def sample_rows(
    positives: NDArray[np.int64], *, num_rows: int, sample_rate: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw the rows of one worker's partition that take part in one iteration.

    The classes of the batch are always kept; classes drawn without replacement from the others fill the budget of
    `ceil(sample_rate * num_rows)` rows (paper, class sampling).

    Args:
        positives: rows of this partition that have an image in the global batch; repeats are allowed.
        num_rows: rows of this partition.
        sample_rate: share of the rows to keep, in (0, 1]; 1 keeps all.
        rng: seeded by (seed, step, rank).

    Returns:
        The rows, ascending and distinct: max(budget, number of distinct positives) of them.

    """
    if sample_rate == 1.0:
        return np.arange(num_rows)
    kept = np.unique(positives)
    num_negatives = math.ceil(sample_rate * num_rows) - len(kept)
    if num_negatives <= 0:
        return kept
    # The i-th row that is no positive is i plus the number of positives before it.
    drawn = rng.choice(num_rows - len(kept), size=num_negatives, replace=False, shuffle=False)
    negatives = drawn + np.searchsorted(kept - np.arange(len(kept)), drawn, side="right")
    return np.sort(np.concatenate([kept, negatives]))

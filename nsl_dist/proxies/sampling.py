"""Sampling of the classes for one iteration, the same on every device."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nsl_dist.proxies.counter_random import random_integers
from nsl_dist.proxies.partition import Partition

NUM_ROUNDS = 6


def draw_distinct(
    size: int, num_values: int, keys: NDArray[np.uint32], *, bits: int | None = None
) -> NDArray[np.int64]:
    """Draw `size` distinct integers from [0, num_values), in random order.

    The i-th is where a random permutation takes i, so that a GPU draws each one on its own. The permutation is a
    Feistel network over the next power of two, applied until the result is below `num_values` (Black & Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002): 2^bits / num_values times on average.

    Args:
        size: at most `num_values`.
        num_values: size of the range.
        keys: `NUM_ROUNDS` random numbers that select the permutation.
        bits: see `bits_of`; None: as few as possible.

    """
    bits = bits or bits_of(num_values)
    drawn = np.arange(size, dtype=np.int64)
    outside = np.arange(size)
    while len(outside) > 0:
        drawn[outside] = _permute(drawn[outside], bits, keys)
        outside = np.flatnonzero(drawn >= num_values)
    return drawn


def bits_of(num_values: int) -> int:
    """Return the number of bits that the permutation works on. With fewer than 6 it would not be random enough."""
    return max(6, (num_values - 1).bit_length())


def _permute(values: NDArray[np.int64], bits: int, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
    width, other_width = bits - bits // 2, bits // 2  # of the right half, and of the left one
    left, right = (values >> width).astype(np.uint32), (values & (1 << width) - 1).astype(np.uint32)
    for key in keys:
        mixed = _scramble(right + key)
        mixed &= np.uint32((1 << other_width) - 1)
        mixed ^= left
        left, right = right, mixed
        width, other_width = other_width, width
    return left.astype(np.int64) << width | right


def _scramble(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Mix 32-bit integers in place: the finaliser of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers ^= numbers >> np.uint32(shift)
        numbers *= np.uint32(factor)
    numbers ^= numbers >> np.uint32(16)
    return numbers


@dataclass(frozen=True)
class Draw:
    """The classes that one worker samples in one iteration: those of the batch in order, then others.

    If it samples all, they are in the order of the classes.
    """

    positives: NDArray[np.int64]
    """This worker's classes that have an image in the global batch, ascending; empty if all are sampled."""
    columns_B: NDArray[np.int64]
    """Place of each image's class among the sampled ones; negative if another worker owns it."""
    num_sampled: int
    num_rows: int
    """Classes of this worker."""
    multiplicity: float
    """Number of classes that each sampled class without an image represents in the normaliser."""
    keys: NDArray[np.uint32]
    """Select the permutation that draws the others."""

    @property
    def everything(self) -> bool:
        """All classes are sampled."""
        return self.num_sampled == self.num_rows

    @property
    def bits(self) -> int:
        """Bits of the permutation, which are the same in every iteration."""
        return bits_of(self.num_rows)

    def rows(self, *, ascending: bool, per_class: int = 1) -> NDArray[np.int64]:
        """Return the rows of the sampled classes, `per_class` for each.

        `ascending` sorts those without an image, which a CPU reads faster.
        """
        num_others = self.num_rows - len(self.positives)
        others = draw_distinct(self.num_sampled - len(self.positives), num_others, self.keys, bits=self.bits)
        if ascending:
            others.sort()
        # The i-th row that is not a positive is i plus the number of positives before it.
        before = np.searchsorted(self.positives - np.arange(len(self.positives)), others, side="right")
        first = np.concatenate([self.positives, others + before]) * per_class
        return (first[:, None] + np.arange(per_class)).reshape(-1)


def draw_classes(
    labels_B: NDArray[np.int64],
    partition: Partition,
    *,
    num_sampled: int,
    correct: bool = False,
    seed: tuple[int, ...],
) -> Draw:
    """Draw the classes of one worker for one iteration.

    All its classes of the batch are included; others, drawn without replacement, fill the budget (paper, class
    sampling). The cost depends on the budget, not on the number of classes.

    Args:
        labels_B: classes of the global batch.
        partition: classes of this worker.
        num_sampled: the budget, at most `partition.num_rows`.
        correct: let the sampled classes without an image stand for all such classes; at least one is sampled then.
        seed: differs between iterations and workers.

    """
    rows_B = labels_B - partition.start
    mine_B = (rows_B >= 0) & (rows_B < partition.num_rows)
    ascending = np.sort(rows_B[mine_B])  # faster than np.unique, which hashes
    positives = ascending[np.diff(ascending, prepend=-1) > 0]
    num_others = partition.num_rows - len(positives)
    num_sampled = max(num_sampled, len(positives) + (min(1, num_others) if correct else 0))
    keys = np.array(random_integers(NUM_ROUNDS, *seed), dtype=np.uint32)
    if num_sampled == partition.num_rows:
        columns_B = np.where(mine_B, rows_B, -1)
        return Draw(positives[:0], columns_B, num_sampled, partition.num_rows, 1.0, keys)
    columns_B = np.where(mine_B, np.searchsorted(positives, rows_B), -1)
    multiplicity = num_others / (num_sampled - len(positives)) if correct else 1.0
    return Draw(positives, columns_B, num_sampled, partition.num_rows, multiplicity, keys)

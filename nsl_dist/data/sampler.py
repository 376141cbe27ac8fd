"""The class-balanced plan: a pure function from (seed, step) to the classes and images of a batch."""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PlannedBatch:
    """The images of a batch or of one worker's part: the class of each image and its index within the class."""

    labels: NDArray[np.int64]
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class ClassBalancedPlan:
    """Batches of distinct classes with several images each (paper, section 4.1), independent of the number of workers.

    Attributes:
        class_sizes: number of images of each class, `[num_classes]`.
        batch_size: images in a global batch.
        images_per_class: images of each class in a batch, drawn with replacement; None for distinct images.
        seed: determines all batches.
        left_out: labels excluded from all batches, ascending.

    """

    class_sizes: NDArray[np.int64]
    batch_size: int
    images_per_class: int | None
    seed: int
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.images_per_class and self.num_classes - len(self.left_out) < self.classes_per_batch:
            raise ValueError(
                f"a batch of {self.batch_size} images with {self.images_per_class} of each class needs "
                f"{self.classes_per_batch} classes, but the training split has "
                f"{self.num_classes - len(self.left_out)}; lower --data.batch-size or raise --data.images-per-class"
            )
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"a batch of {self.batch_size} images is larger than the training split of "
                f"{int(self.class_sizes.sum())}; lower --data.batch-size"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, including those left out."""
        return len(self.class_sizes)

    @property
    def classes_per_batch(self) -> int:
        """Maximum number of distinct classes in a global batch."""
        return self.batch_size // (self.images_per_class or 1)

    @property
    def steps_per_epoch(self) -> int:
        """Iterations per epoch: floor(images / batch)."""
        return int(self.class_sizes.sum()) // self.batch_size

    @functools.cached_property
    def _ends(self) -> NDArray[np.int64]:
        """One past the last image of each class, in a common numbering of all images that are not left out."""
        sizes = self.class_sizes.copy()
        sizes[list(self.left_out)] = 0
        return np.cumsum(sizes)

    def batch(self, step: int) -> PlannedBatch:
        """Draw the global batch of a step."""
        rng = np.random.default_rng((self.seed, step))
        if self.images_per_class is None:
            ends = self._ends
            images = rng.choice(ends[-1], size=self.batch_size, replace=False)
            labels = np.searchsorted(ends, images, side="right")
            return PlannedBatch(labels=labels, indices=images - ends[labels] + self.class_sizes[labels])
        classes = rng.choice(self.num_classes - len(self.left_out), size=self.classes_per_batch, replace=False)
        # Skip classes left out: shift each drawn number by how many of them precede it.
        kept_before = np.array(self.left_out, dtype=np.int64) - np.arange(len(self.left_out))
        classes += np.searchsorted(kept_before, classes, side="right")
        labels = np.repeat(classes, self.images_per_class)
        return PlannedBatch(labels=labels, indices=rng.integers(self.class_sizes[labels]))

    def part(self, step: int, *, rank: int, world_size: int) -> PlannedBatch:
        """Return one worker's part of a step's batch: a contiguous range of equal size for every worker."""
        assert self.batch_size % world_size == 0, f"{self.batch_size} % {world_size} != 0"
        part_size = self.batch_size // world_size
        part = slice(rank * part_size, (rank + 1) * part_size)
        batch = self.batch(step)
        return PlannedBatch(labels=batch.labels[part], indices=batch.indices[part])

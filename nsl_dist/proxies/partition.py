"""Assignment of classes to workers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Partition:
    """The contiguous range of classes, `start <= label < stop`, that one worker owns.

    Every worker owns `rows_per_rank = ceil(num_classes / world_size)` classes, the last ones fewer or none. This
    is the layout of `torch.distributed.tensor.Shard(0)`; checkpoints can be resharded to any number of workers.
    """

    num_classes: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_classes < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"need num_classes >= 1 and 0 <= rank < world_size, got num_classes={self.num_classes}, "
                f"rank={self.rank}, world_size={self.world_size}"
            )

    @property
    def rows_per_rank(self) -> int:
        """Classes per worker, except for the last workers."""
        return -(-self.num_classes // self.world_size)

    @property
    def start(self) -> int:
        """First class of this worker."""
        return min(self.rank * self.rows_per_rank, self.num_classes)

    @property
    def stop(self) -> int:
        """One past the last class of this worker."""
        return min(self.start + self.rows_per_rank, self.num_classes)

    @property
    def num_rows(self) -> int:
        """Classes that this worker owns."""
        return self.stop - self.start

    def rows(self, per_class: int) -> range:
        """Return this worker's rows of a matrix with `per_class` rows for each class, one class after the other."""
        return range(self.start * per_class, self.stop * per_class)

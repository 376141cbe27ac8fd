"""Execute the sampling plan on Ray Data: read, decode and augment class bags on any free CPU in the cluster."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from nsl_dist import cluster, ray_internals
from nsl_dist.config import DataConfig
from nsl_dist.data.sampler import ClassBalancedPlan, PlannedBatch
from nsl_dist.data.shards import DamagedShardError, Split

if TYPE_CHECKING:
    from torch import Tensor

# torch takes seconds to import, so only the decoding tasks import it, not the split coordinator.

BLOCKS_AHEAD = 16  # per worker, maximum number waiting in the object store
MOST_STEPS = 32  # per block
FIRST_STEPS = 2  # in the first block of each worker, for the whole of which its first step has to wait
BLOCK_BYTES = 24 * 2**20  # maximum; small batches share a block, since each task costs time to schedule
TASK_CPUS = 0.5  # two tasks share a core: one works while the other finishes or waits for input
COMPLETION_SECONDS = 0.03  # how quickly Ray Data notices finished tasks
IDLE_SECONDS = 0.25  # how long Ray Data sleeps while batches wait for the trainers
DATA_NICENESS = 10


def _yield_to_training() -> None:
    """Lower this thread's priority so that training goes first when both compete for a core."""
    if os.getpriority(os.PRIO_PROCESS, 0) < DATA_NICENESS:
        os.setpriority(os.PRIO_PROCESS, 0, DATA_NICENESS)


@dataclass(frozen=True)
class _Blocks:
    """How a stream is split into blocks: one worker's parts of a few consecutive batches, made by one task.

    Attributes:
        last_step: one past the last step of the stream.
        num_steps: batches per block; the first has `FIRST_STEPS` at most, and the last may have fewer.
        part_size: images per worker and batch.

    """

    world_size: int
    first_step: int
    last_step: int
    num_steps: int
    part_size: int
    image_bytes: int

    @classmethod
    def of(cls, plan: ClassBalancedPlan, config: DataConfig, *, steps: range, world_size: int) -> "_Blocks":
        part_size, image_bytes = plan.batch_size // world_size, 3 * config.image_size**2
        num_steps = min(max(1, BLOCK_BYTES // (part_size * image_bytes)), MOST_STEPS)
        return cls(world_size, steps.start, steps.stop, num_steps, part_size, image_bytes)

    @property
    def count(self) -> int:
        """Number of blocks, over all workers."""
        return (1 + math.ceil(max(0, self.last_step - self._second) / self.num_steps)) * self.world_size

    @property
    def num_bytes(self) -> int:
        """Size of a full block in bytes."""
        return self.num_steps * self.part_size * self.image_bytes

    def place(self, turn: int) -> tuple[range, int]:
        """Return the steps and the rank of a block; blocks are ordered by (steps, rank)."""
        turn, rank = divmod(turn, self.world_size)
        if turn == 0:
            return range(self.first_step, self._second), rank
        begin = self._second + (turn - 1) * self.num_steps
        return range(begin, min(begin + self.num_steps, self.last_step)), rank

    @property
    def _second(self) -> int:
        """First step of the second block."""
        return min(self.first_step + min(FIRST_STEPS, self.num_steps), self.last_step)


def planned_batches(
    plan: ClassBalancedPlan,
    split: Split,
    config: DataConfig,
    *,
    first_step: int,
    last_step: int,
    world_size: int,
    spare_cpus: bool = True,
) -> list[ray.data.DataIterator]:
    """Stream every worker's part of the batches `first_step` to `last_step - 1`.

    Since order is preserved and blocks have equal size, the split assigns blocks to the workers in turn. Each row
    carries its step and rank, which the worker checks.

    Args:
        plan: decides the images of each batch.
        split: the images that the plan draws from.
        config: how images are decoded and augmented.
        first_step: first step of the stream.
        last_step: one past the last step of the stream.
        world_size: number of workers.
        spare_cpus: whether the cluster has CPUs that no worker reserves. If not, as many processes as workers decode on
            the workers' CPUs, since tasks would wait for a free CPU forever.

    Returns:
        For each rank, an iterator of rows `image` (uint8 `[3, image_size, image_size]`), `step`, `rank`.

    """
    cluster.quiet_ray_data()
    blocks = _Blocks.of(plan, config, steps=range(first_step, last_step), world_size=world_size)
    context = _execution_context(blocks)
    turns = ray_internals.dataset_of_rows(pa.table({"turn": np.arange(blocks.count)}), context)
    shared = ray.put((plan, split))

    def make_block(rows: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
        (turn,) = rows["turn"].tolist()
        plan, split = ray.get(shared)
        return _make_block(turn, blocks, plan, split, config)

    class MakeBlock:
        def __call__(self, rows: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
            return make_block(rows)

    if spare_cpus:
        dataset = turns.map_batches(make_block, batch_size=None, num_cpus=TASK_CPUS, **cluster.prefer_cpu_nodes())
    else:
        dataset = turns.map_batches(MakeBlock, batch_size=None, **_actors_on_all_nodes(world_size))
    return dataset.streaming_split(world_size, equal=True)


def _execution_context(blocks: _Blocks) -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 2 * blocks.num_bytes + 2**20  # a split block would break the turn order
    context.memory_usage_poll_interval_s = None  # polling each second takes a quarter of a task's time
    context.raise_original_map_exception = True  # otherwise a damaged shard shows only in Ray's error text
    pace = ray_internals.pace(_yield_to_training, completion_seconds=COMPLETION_SECONDS, idle_seconds=IDLE_SECONDS)
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, pace]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=BLOCKS_AHEAD * blocks.world_size * blocks.num_bytes
    )
    return context


def _actors_on_all_nodes(count: int) -> dict[str, Any]:
    """Return options for actors that decode when there are no spare CPUs.

    Ray stops task processes in excess of a node's CPUs after each task, but not actor processes. Ray Data assigns no
    more work to actors on draining nodes, so the actors are spread over all nodes: Ray places actors that reserve a
    resource round-robin, but those that reserve nothing at random.
    """
    nodes = [node["NodeID"] for node in cluster.live_nodes() if node["Resources"].get("CPU")]
    return {
        "num_cpus": 0,
        "memory": 1,
        "compute": ray.data.ActorPoolStrategy(size=count),
        "label_selector": {"ray.io/node-id": f"in({','.join(nodes)})"},
    }


def _make_block(
    turn: int, blocks: _Blocks, plan: ClassBalancedPlan, split: Split, config: DataConfig
) -> dict[str, Any]:
    """Read, decode and augment the images of one block."""
    cluster.import_whole("nsl_dist.data.transforms")
    import torch

    from nsl_dist.data.transforms import augment, crop_draws

    _yield_to_training()
    steps, rank = blocks.place(turn)
    positions = range(rank * blocks.part_size, (rank + 1) * blocks.part_size)
    images = torch.empty(len(steps), blocks.part_size, 3, config.image_size, config.image_size, dtype=torch.uint8)
    for place, step in enumerate(steps):
        part = plan.part(step, rank=rank, world_size=blocks.world_size)
        fetched = fetch(part, split, config, crop_draws(positions, config, seed=plan.seed, step=step))
        images[place] = augment(fetched, positions, config, seed=plan.seed, step=step)
    return {
        "image": images.flatten(0, 1).numpy(),
        "step": np.repeat(steps, blocks.part_size),
        "rank": np.full(len(steps) * blocks.part_size, rank),
    }


def fetch(part: PlannedBatch, split: Split, config: DataConfig, crops_B4: "Tensor | None" = None) -> "Tensor":
    """Read, decode and resize the images of a planned batch.

    Args:
        part: the images, by class and index.
        split: the images that the plan draws from.
        config: how images are decoded and resized.
        crops_B4: random crops to take, from `crop_draws`; None resizes whole images.

    Returns:
        uint8 `[len(part.labels), 3, resized_edge, resized_edge]`; with crops, both edges are `image_size`.

    Raises:
        DamagedShardError: a shard cannot be read, or one of its images cannot be decoded.

    """
    import torch

    from nsl_dist.data.images import decode
    from nsl_dist.data.transforms import least_pixels, random_crop, resize

    edge = config.resized_edge if crops_B4 is None else config.image_size
    images = torch.empty(len(part.labels), 3, edge, edge, dtype=torch.uint8)
    for label in np.unique(part.labels).tolist():
        bag = split.read_bag(label, ["image"])["image"]
        # Images drawn more than once are decoded only once.
        places_of: dict[int, list[int]] = {}
        for place in np.flatnonzero(part.labels == label).tolist():
            places_of.setdefault(int(part.indices[place]), []).append(place)
        for index, places in places_of.items():
            least = least_pixels(config, None if crops_B4 is None else crops_B4[places])
            try:
                image = decode(bag[index].as_py(), least=least)
            except ValueError as error:  # all images could be decoded when the shards were written
                name = split.shard_names[split.shards[label]]
                where = f"{split.root}/{name}: image {index} of class {label}"
                raise DamagedShardError(name, f"{where}: {error}") from error
            if crops_B4 is None:
                whole = resize(image, edge)
                for place in places:
                    images[place] = whole
            else:
                for place in places:
                    images[place] = random_crop(image, crops_B4[place], config)
    return images

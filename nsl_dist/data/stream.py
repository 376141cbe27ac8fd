"""The plan executed by Ray Data: class bags read, decoded and augmented wherever the cluster has CPUs."""

import math
import os
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

# torch takes seconds to import: only the tasks that decode do, not the coordinator of the split.

BLOCKS_AHEAD = 16  # that may wait in the object store, for each worker
MOST_STEPS = 32  # of a block, all of which the first step waits for
BLOCK_BYTES = 24 * 2**20  # of a worker's parts of small batches, made by one task: each costs time to schedule
TASK_CPUS = 0.5  # two share a core: one has work for it while the other ends, or waits to be given the next
COMPLETION_SECONDS = 0.03  # in which Ray Data sees that a task is done
IDLE_SECONDS = 0.25  # in which it looks again where batches wait for the trainers
DATA_NICENESS = 10


def _yield_to_training() -> None:
    """Lower this thread's priority: on a core that both want, training goes first and batches wait ahead of it."""
    if os.getpriority(os.PRIO_PROCESS, 0) < DATA_NICENESS:
        os.setpriority(os.PRIO_PROCESS, 0, DATA_NICENESS)


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

    A block is one worker's part of a step, or of several where they are small, in the order (step, rank); with order
    preserved and whole blocks of equal size, the split hands them to the workers in turn. Every row carries its step
    and rank, for the worker to check.

    Args:
        plan: of the run.
        split: that it draws from.
        config: how images are made.
        first_step: of the stream.
        last_step: one past its last.
        world_size: workers.
        spare_cpus: whether the cluster has CPUs that no worker reserves. Without, as many processes as workers decode
            on theirs: tasks would wait for a CPU for ever.

    Returns:
        For each rank an iterator of rows `image` (uint8 `[3, image_size, image_size]`), `step`, `rank`.

    """
    shared = ray.put((plan, split))
    part_size = plan.batch_size // world_size
    part_bytes = part_size * 3 * config.image_size**2
    num_steps = min(max(1, BLOCK_BYTES // part_bytes), MOST_STEPS)  # of a block, but for the last

    def make_block(rows: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
        cluster.import_whole("nsl_dist.data.transforms")
        import torch

        from nsl_dist.data.transforms import augment, crop_draws

        _yield_to_training()
        plan, split = ray.get(shared)
        (turn,) = rows["turn"].tolist()
        begin, rank = first_step + turn // world_size * num_steps, turn % world_size
        steps = range(begin, min(begin + num_steps, last_step))
        positions = range(rank * part_size, (rank + 1) * part_size)
        images = torch.empty(len(steps), part_size, 3, config.image_size, config.image_size, dtype=torch.uint8)
        for place, step in enumerate(steps):
            part = plan.part(step, rank=rank, world_size=world_size)
            fetched = fetch(part, split, config, crop_draws(positions, config, seed=plan.seed, step=step))
            images[place] = augment(fetched, positions, config, seed=plan.seed, step=step)
        return {
            "image": images.flatten(0, 1).numpy(),
            "step": np.repeat(steps, part_size),
            "rank": np.full(len(steps) * part_size, rank),
        }

    class MakeBlock:
        def __call__(self, rows: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
            return make_block(rows)

    cluster.quiet_ray_data()
    context = ray.data.DataContext.get_current().copy()
    num_blocks = math.ceil((last_step - first_step) / num_steps) * world_size
    turns = ray_internals.dataset_of_rows(pa.table({"turn": np.arange(num_blocks)}), context)
    if spare_cpus:
        work = {"fn": make_block, "num_cpus": TASK_CPUS, **cluster.prefer_cpu_nodes()}
    else:
        # Ray ends processes beyond a node's CPUs after each task, but not an actor's. To those on a node that is about
        # to be taken away Ray Data gives nothing more to do: so they are on all nodes. Ray deals actors out to nodes in
        # turn, but those that reserve nothing at random.
        nodes = [node["NodeID"] for node in cluster.live_nodes() if node["Resources"].get("CPU")]
        work = {
            "fn": MakeBlock,
            "num_cpus": 0,
            "memory": 1,
            "compute": ray.data.ActorPoolStrategy(size=world_size),
            "label_selector": {"ray.io/node-id": f"in({','.join(nodes)})"},
        }
    dataset = turns.map_batches(batch_size=None, **work)
    block_bytes = num_steps * part_bytes
    context.target_max_block_size = 2 * block_bytes + 2**20  # a split block would break the turn
    context.memory_usage_poll_interval_s = None  # asking the kernel each second takes a quarter of a task's time
    context.raise_original_map_exception = True  # else a damaged shard would be known by Ray's text alone
    pace = ray_internals.pace(_yield_to_training, completion_seconds=COMPLETION_SECONDS, idle_seconds=IDLE_SECONDS)
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, pace]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=BLOCKS_AHEAD * world_size * block_bytes
    )
    return dataset.streaming_split(world_size, equal=True)


def fetch(part: PlannedBatch, split: Split, config: DataConfig, crops_B4: "Tensor | None" = None) -> "Tensor":
    """Read, decode and resize the images of a planned batch.

    Args:
        part: of the plan.
        split: that it draws from.
        config: how images are made.
        crops_B4: of `crop_draws`.

    Returns:
        uint8 `[len(part.labels), 3, resized_edge, resized_edge]`; crops are `image_size` square.

    Raises:
        DamagedShardError: a shard cannot be read, or an image of it decoded.

    """
    import torch

    from nsl_dist.data.transforms import decode, random_crop, resize

    edge = config.resized_edge if crops_B4 is None else config.image_size
    images = torch.empty(len(part.labels), 3, edge, edge, dtype=torch.uint8)
    for label in np.unique(part.labels).tolist():
        bag = split.read_bag(label, ["image"])["image"]
        # An image drawn twice is decoded once.
        places_of: dict[int, list[int]] = {}
        for place in np.flatnonzero(part.labels == label).tolist():
            places_of.setdefault(int(part.indices[place]), []).append(place)
        for index, places in places_of.items():
            try:
                image = decode(bag[index].as_py())
            except ValueError as error:  # they were all decoded when the shards were written
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

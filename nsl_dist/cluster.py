"""Connecting to Ray: the cluster that a job was submitted to, or one of this machine alone."""

import math
import os
from typing import Any

import ray

OBJECT_STORE_BYTES = 2 * 2**30  # of a local cluster; batches wait there


def connect(*, num_cpus: int) -> None:
    """Connect to the cluster of `ray job submit` or RAY_ADDRESS; without one start Ray on this machine, on loopback.

    Args:
        num_cpus: logical CPUs that the work needs; a local Ray gets as many even on a machine with fewer cores, which
            then share them.

    """
    hide_progress_bars()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning")
        return
    ray.init(
        address="local",
        num_cpus=max(num_cpus, os.cpu_count() or 1),
        include_dashboard=True,  # Ray Train's clean-up after a lost driver asks it for the state of actors
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level="warning",
    )


def hide_progress_bars() -> None:
    """Switch those of Ray Data off in this process: the jobs print their progress as plain lines."""
    import ray.data  # takes seconds, which an actor that reads nothing need not spend

    ray.data.DataContext.get_current().enable_progress_bars = False


def get(references: Any) -> Any:
    """Return what `ray.get` does; a user's mistake found in a task is raised as itself, without the task's stack."""
    # One by one: of several errors that nobody asked for Ray prints the stacks.
    outcomes = [_outcome(reference) for reference in (references if isinstance(references, list) else [references])]
    for error in outcomes:
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, (ValueError, FileNotFoundError)):
            raise error.cause from None
        if isinstance(error, ray.exceptions.RayError):
            raise error
    return outcomes if isinstance(references, list) else outcomes[0]


def _outcome(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return error


def live_nodes() -> list[dict[str, Any]]:
    """Return what Ray says of the nodes that are alive, without those that are about to be taken away."""
    draining = ray._private.state.state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def require(*, cpus: float, gpus: float, why: str) -> None:
    """Refuse a cluster that cannot run the plan, which would otherwise wait for ever without a word.

    The nodes that an autoscaler may add count too.

    Raises:
        ValueError: CPUs or GPUs are lacking.

    """
    available = ray.cluster_resources()
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        most = max(available.get(name, 0), limits.get(name, 0))
        if most < needed:
            raise ValueError(
                f"the cluster has {most:g} {name}s, this run needs {math.ceil(needed)}: {why}; lower --num-workers or "
                "--cpus-per-worker, or add nodes"
            )

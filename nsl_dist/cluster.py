"""Connecting to Ray: the cluster that a job was submitted to, or one of this machine alone."""

import importlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from nsl_dist import ray_internals
from nsl_dist.progress import duration

OBJECT_STORE_BYTES = 2 * 2**30  # of a local cluster; batches wait there
START_ATTEMPTS = 4  # of a local Ray
ROOM_SECONDS = 5.0  # in which Ray finds room that is there
POLL_SECONDS = 0.5
SHOW_SECONDS = 10.0


def connect(*, num_cpus: int, show_workers: bool = True) -> None:
    """Connect to the cluster of `ray job submit` or RAY_ADDRESS; without one start Ray on this machine, on loopback.

    Args:
        num_cpus: logical CPUs that the work needs; a local Ray gets as many even on a machine with fewer cores, which
            then share them.
        show_workers: show what is printed by processes other than this one.

    """
    quiet_ray_data()
    ray_internals.drop_noise()
    if ray.is_initialized():
        return
    settings = {"logging_level": "warning", "log_to_driver": show_workers}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # The environment of its processes is the cluster's. Some of Ray Train's look for one, and may find another.
        ray.init(runtime_env={"env_vars": ray_internals.DATA_ENVIRONMENT | {"RAY_ADDRESS": address}}, **settings)
    else:
        _start_local(
            num_cpus=max(num_cpus, os.cpu_count() or 1),
            include_dashboard=True,  # Ray Train's clean-up after a lost driver asks it for the state of actors
            object_store_memory=OBJECT_STORE_BYTES,
            **settings,
        )
    ray_internals.spend_actor_warning()


def _start_local(**settings: Any) -> None:
    """Start Ray on this machine; again where a busy machine does not start it within the 30 s that Ray allows."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with ray_internals.local_ray_environment():
                ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray has no class for it
            if "timed out" not in str(error) or attempt == START_ATTEMPTS:
                raise
            print(f"Ray did not start in time on this busy machine; trying again ({error})", flush=True)
            ray.shutdown()


def quiet_ray_data() -> None:
    """Leave progress, in this process, to the plain lines of the jobs, and warnings to what a user can fix."""
    import ray.data  # takes seconds, which an actor that reads nothing need not spend

    ray.data.DataContext.get_current().enable_progress_bars = False
    # Ray Data reads the variable when it is imported, and then only in its own processes.
    level = (ray_internals.DATA_ENVIRONMENT | os.environ)["RAY_DATA_LOG_LEVEL"]
    logging.getLogger("ray.data").setLevel(level)


def prefer_cpu_nodes() -> dict[str, Any]:
    """Return options that keep Ray Data's tasks away from the present nodes with GPUs while others have room."""
    nodes = [node for node in live_nodes() if node["Resources"].get("CPU")]
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU")]
    if not with_gpus or len(with_gpus) == len(nodes):
        return {}
    # Not by ray.io/accelerator-type: no selector matches nodes that lack it, as those do whose GPUs Ray is told of.
    return {
        "label_selector": {"ray.io/node-id": f"!in({','.join(with_gpus)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def import_whole(module: str) -> None:
    """Import what a task needs of torch, even if the task is cancelled meanwhile.

    Ray cancels a task by a KeyboardInterrupt in the main thread of its process, which is given other tasks then; torch
    of which a part is imported fails them all.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(importlib.import_module, module).result()


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


def job_metadata() -> dict[str, str]:
    """Return what `ray job submit` says of this job, with its --metadata-json; nothing where it was not submitted."""
    return dict(json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}))


def submitted_at() -> float | None:
    """Return when this job was submitted, seconds since the epoch; None: by hand, or nobody here knows."""
    job_id = job_metadata().get("job_submission_id")
    if job_id is None:
        return None
    from ray.job_submission import JobSubmissionClient  # with aiohttp, a third of a second for every process

    try:
        info = JobSubmissionClient().get_job_info(job_id)
    except ConnectionError:  # the driver is not on the head, on whose loopback the dashboard is
        return None
    return float(info.start_time) / 1000  # from milliseconds


def live_nodes() -> list[dict[str, Any]]:
    """Return what Ray says of the nodes that are alive, without those that are about to be taken away."""
    draining = ray_internals.draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def totals() -> tuple[int, int]:
    """Return the CPUs and GPUs of the nodes that are here to stay."""
    resources = [node["Resources"] for node in live_nodes()]
    cpus, gpus = (int(sum(each.get(name, 0) for each in resources)) for name in ("CPU", "GPU"))
    return cpus, gpus


def settle_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return where to work; auto: on GPUs if the cluster has some, or an autoscaler that may add them."""
    if wanted != "auto":
        return wanted
    return "cuda" if totals()[1] > 0 or _can_add({"GPU": 1}) else "cpu"


def _can_add(bundle: dict[str, float]) -> bool:
    """Return whether the autoscaler of a cluster says that it can make room for `bundle`; it may start a node."""
    status = ray_internals.cluster_status()
    if "RAY_ADDRESS" not in os.environ or not status.autoscaling_state.autoscaler_state_version:
        return False  # there is none
    with _reserving([bundle]) as group:
        asked_at = ray_internals.cluster_status().cluster_resource_state.cluster_resource_state_version
        deadline = time.monotonic() + 60
        while not group.wait(POLL_SECONDS):
            state = ray_internals.cluster_status().autoscaling_state
            if state.last_seen_cluster_resource_state_version > asked_at:
                return not _is_refused(group, state)
            if time.monotonic() > deadline:
                raise ValueError("the cluster's autoscaler does not say whether it can add GPUs: give --device")
    return True


def wait_for(bundles: dict[str, tuple[int, dict[str, float]]], *, minutes: float, fix: str) -> None:
    """Wait until the cluster has room for all bundles at once, which asks its autoscaler for the nodes that lack.

    Says what is there, what is asked for and what is being started.

    Args:
        bundles: by what they are for ("training"), how many there are and what one takes: `{"CPU": 1, "GPU": 1}`.
        minutes: to wait at most.
        fix: what the user may do about a cluster without room.

    Raises:
        ValueError: there is no room after `minutes`, or the autoscaler says that it cannot make any.

    """
    asked = ", ".join(
        f"{count} x {what} ({', '.join(f'{amount:g} {name}' for name, amount in bundle.items())})"
        for what, (count, bundle) in bundles.items()
        if count
    )
    flat = [bundle for count, bundle in bundles.values() for _ in range(count)]
    started = shown = time.monotonic()
    free_since: int | None = None  # in Ray's numbers of states of the cluster, of which the autoscaler says what it saw
    with _reserving(flat) as group:
        print(f"   cluster  {described()}; this takes {asked}", flush=True)
        if group.wait(ROOM_SECONDS):
            return
        print(f"   waiting  up to {minutes:g} min for nodes, which its autoscaler is asked for", flush=True)
        while not group.wait(POLL_SECONDS):
            reply = ray_internals.cluster_status()
            state = reply.autoscaling_state
            if free_since is None or _is_busy():  # a cluster that is busy with other work is worth waiting for
                free_since = reply.cluster_resource_state.cluster_resource_state_version
            refused = _is_refused(group, state) and state.last_seen_cluster_resource_state_version > free_since
            # The autoscaler may have looked just as Ray was taking what had become free.
            if refused and not group.wait(ROOM_SECONDS):
                raise ValueError(f"the cluster has {described()} and can add no nodes for {asked}; {fix}")
            now = time.monotonic()
            if now - started > 60 * minutes:
                raise ValueError(
                    f"the cluster has {described()}, without room for {asked}, after {minutes:g} min "
                    f"(--wait-for-nodes); {fix}"
                )
            if now - shown > SHOW_SECONDS:
                shown = now
                coming = Counter(each.ray_node_type_name for each in state.pending_instances)
                failed = state.failed_instance_requests
                coming += Counter({each.ray_node_type_name: each.count for each in state.pending_instance_requests})
                print(
                    f"waiting for nodes: {described()}; coming: "
                    + (", ".join(f"{count} {kind}" for kind, count in coming.items()) or "none")
                    + "".join(f"; failed: {each.ray_node_type_name}, {each.reason}" for each in failed)
                    + f"; {duration(now - started)} of {duration(60 * minutes)}",
                    flush=True,
                )
    print(f"nodes are there after {duration(time.monotonic() - started)}: {described()}", flush=True)


@contextmanager
def _reserving(bundles: list[dict[str, float]]) -> Iterator[PlacementGroup]:
    group = placement_group(bundles)
    try:
        yield group
    finally:
        remove_placement_group(group)


def _is_refused(group: PlacementGroup, state: Any) -> bool:
    return any(group.id.hex() in request.details for request in state.infeasible_gang_resource_requests)


def _is_busy() -> bool:
    available = ray.available_resources()
    return any(available.get(name, 0) < total for name, total in zip(("CPU", "GPU"), totals(), strict=True))


def described() -> str:
    """Return in words how large the cluster is."""
    cpus, gpus = totals()
    nodes = len(live_nodes())
    return f"{cpus} CPUs and {gpus} GPUs on {nodes} node{'' if nodes == 1 else 's'}"

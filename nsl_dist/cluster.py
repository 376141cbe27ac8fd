"""Connect to Ray: to the cluster a job was submitted to, or to a local Ray on this machine."""

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
from nsl_dist.progress import counted, duration

OBJECT_STORE_BYTES = 2 * 2**30  # for a local Ray; holds the batches waiting for training
START_ATTEMPTS = 4  # for a local Ray
ROOM_SECONDS = 5.0  # Ray finds available room within this time
POLL_SECONDS = 0.5
SHOW_SECONDS = 5.0
# Environment of processes that compute on CPUs: glibc keeps freed memory for the next batch. Having the kernel zero new
# pages takes a twentieth of a training step, and half the time of an embedding by EfficientNet-Lite0.
KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def connect(*, num_cpus: int, show_workers: bool = True) -> None:
    """Connect to the cluster of `ray job submit` or RAY_ADDRESS; otherwise start a local Ray that listens on loopback.

    Args:
        num_cpus: logical CPUs needed; a local Ray gets at least this many, even on a machine with fewer cores.
        show_workers: also show the output of other processes.

    """
    quiet_ray_data()
    ray_internals.drop_noise()
    if ray.is_initialized():
        return
    settings = {"logging_level": "warning", "log_to_driver": show_workers}
    address = os.environ.get("RAY_ADDRESS")
    with ray_internals.keep_sigterm_handler():
        if address:
            # The cluster's processes do not inherit our environment. Without the address, some of Ray Train's look for
            # a cluster and may find another one.
            ray.init(runtime_env={"env_vars": ray_internals.DATA_ENVIRONMENT | {"RAY_ADDRESS": address}}, **settings)
        else:
            _start_local(
                num_cpus=max(num_cpus, os.cpu_count() or 1),
                include_dashboard=True,  # Ray Train queries it for actor states when it cleans up after a lost driver
                object_store_memory=OBJECT_STORE_BYTES,
                **settings,
            )
    ray_internals.spend_actor_warning()
    ray_internals.keep_ray_data_statistics_here()


def _start_local(**settings: Any) -> None:
    """Start Ray on this machine, retrying if a busy machine exceeds the 30 s that Ray allows for it."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with ray_internals.local_ray_environment():
                ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray has no specific class for this error
            if "timed out" not in str(error) or attempt == START_ATTEMPTS:
                raise
            print(f"Ray did not start in time on this busy machine; trying again ({error})", flush=True)
            ray.shutdown()


def quiet_ray_data() -> None:
    """In this process, turn off Ray Data's progress bars and the warnings that users cannot act on."""
    import ray.data  # takes seconds; actors that read no data skip it

    ray.data.DataContext.get_current().enable_progress_bars = False
    # Ray Data reads the variable only on import, and only in its own processes.
    level = (ray_internals.DATA_ENVIRONMENT | os.environ)["RAY_DATA_LOG_LEVEL"]
    logging.getLogger("ray.data").setLevel(level)


def prefer_cpu_nodes() -> dict[str, Any]:
    """Return options that keep Ray Data's tasks off the current GPU nodes as long as other nodes have room."""
    nodes = [node for node in live_nodes() if node["Resources"].get("CPU")]
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU")]
    if not with_gpus or len(with_gpus) == len(nodes):
        return {}
    # Not ray.io/accelerator-type: it is missing where Ray was told the number of GPUs, and selectors never match that.
    return {
        "label_selector": {"ray.io/node-id": f"!in({','.join(with_gpus)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def import_whole(module: str) -> None:
    """Import a module that needs torch, completely even if the task is cancelled meanwhile.

    Ray cancels a task with a KeyboardInterrupt in the main thread of a process that it then reuses. A partly imported
    torch would make all later tasks in that process fail.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(importlib.import_module, module).result()


def get(references: Any) -> Any:
    """Call `ray.get`; user errors found in a task are raised as themselves, without the task's stack trace."""
    # One by one, since Ray prints the stack traces of errors that are never retrieved.
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
    """Return this job's metadata from `ray job submit`, including --metadata-json; empty if it was not submitted."""
    return dict(json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}))


def submitted_at() -> float | None:
    """Return when this job was submitted, in seconds since the epoch; None if it was not, or if that is unknown."""
    job_id = job_metadata().get("job_submission_id")
    if job_id is None:
        return None
    from ray.job_submission import JobSubmissionClient  # imports aiohttp, which takes a third of a second

    try:
        info = JobSubmissionClient().get_job_info(job_id)
    except ConnectionError:  # the dashboard listens on the head's loopback interface, and this is another node
        return None
    return float(info.start_time) / 1000  # milliseconds to seconds


def live_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of each live node, except draining ones."""
    draining = ray_internals.draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def totals() -> tuple[int, int]:
    """Return the total CPUs and GPUs of the live nodes that are not draining."""
    resources = [node["Resources"] for node in live_nodes()]
    cpus, gpus = (int(sum(each.get(name, 0) for each in resources)) for name in ("CPU", "GPU"))
    return cpus, gpus


def cores() -> int:
    """Return the CPUs that compute at a time: a local Ray has more than its machine where a job reserves more."""
    cpus = totals()[0]
    return max(1, min(cpus, os.cpu_count() or 1) if len(live_nodes()) == 1 else cpus)


def settle_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Resolve the device; "auto" means CUDA if the cluster has GPUs or its autoscaler can add some."""
    if wanted != "auto":
        return wanted
    return "cuda" if totals()[1] > 0 or _can_add({"GPU": 1}) else "cpu"


def _can_add(bundle: dict[str, float]) -> bool:
    """Return whether the autoscaler reports that it can make room for `bundle`; asking may start a node."""
    status = ray_internals.cluster_status()
    if "RAY_ADDRESS" not in os.environ or not status.autoscaling_state.autoscaler_state_version:
        return False  # there is no autoscaler
    with _reserving([bundle]) as group:
        asked_at = ray_internals.cluster_status().cluster_resource_state.cluster_resource_state_version
        deadline = time.monotonic() + 60
        while not group.wait(POLL_SECONDS):
            state = ray_internals.cluster_status().autoscaling_state
            if state.last_seen_cluster_resource_state_version > asked_at:
                return not _is_refused(group, state)
            if time.monotonic() > deadline:
                raise ValueError("the cluster's autoscaler did not report whether it can add GPUs: give --device")
    return True


def wait_for(bundles: dict[str, tuple[int, dict[str, float]]], *, minutes: float, fix: str) -> None:
    """Wait until the cluster has room for all bundles at once; missing nodes are requested from the autoscaler.

    Prints which resources exist, which are requested and which nodes are starting.

    Args:
        bundles: maps a purpose ("training") to the number of bundles and the resources of each, such as
            `{"CPU": 1, "GPU": 1}`.
        minutes: maximum time to wait.
        fix: advice to the user if there is no room.

    Raises:
        ValueError: there is no room after `minutes`, or the autoscaler reports that it cannot make any.

    """
    asked = ", ".join(
        f"{count} x {what} ({', '.join(f'{amount:g} {name}' for name, amount in bundle.items())})"
        for what, (count, bundle) in bundles.items()
        if count
    )
    flat = [bundle for count, bundle in bundles.values() for _ in range(count)]
    started = shown = time.monotonic()
    free_since: int | None = None  # a version of the cluster state; the autoscaler reports the last one it saw
    with _reserving(flat) as group:
        print(f"   cluster  {described()}; this takes {asked}", flush=True)
        if group.wait(ROOM_SECONDS):
            return
        print(f"   waiting  up to {minutes:g} min for nodes, which its autoscaler is asked for", flush=True)
        while not group.wait(POLL_SECONDS):
            reply = ray_internals.cluster_status()
            state = reply.autoscaling_state
            if free_since is None or _is_busy():  # other work may finish and free its resources
                free_since = reply.cluster_resource_state.cluster_resource_state_version
            refused = _is_refused(group, state) and state.last_seen_cluster_resource_state_version > free_since
            # The autoscaler may have looked just before Ray reserved freed resources.
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
    """Return the size of the cluster in words."""
    cpus, gpus = totals()
    return f"{cpus} CPUs and {gpus} GPUs on {counted(len(live_nodes()), 'node')}"

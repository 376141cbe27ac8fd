"""Everything that this project uses of Ray without Ray promising it: nothing else here imports a private part of Ray.

Each function says what it does, why nothing public does it, and when it can go. tests/unit/test_ray_internals.py has a
contract test for each, which fails with that text when Ray changes. Ray is imported where it is used: few callers need
more than one part of it.
"""

import functools
import logging
import os
import random
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import pyarrow as pa

GCS_PORTS = range(20_000, 32_000)  # below those that the system gives to clients
# What Ray prints for those who run Ray, in the words that identify a line.
NOISE = re.compile(
    "There are tasks with infeasible resource requests"  # whenever tasks wait for a CPU and no node can be added
    "|has constructor arguments in the object store and max_restarts"  # of actors of Ray Train and Ray Data
    "|worker processes have been started on node"  # of the tasks with a part of a CPU, and of idle actors
    "|^Progress bars disabled"  # we disabled them
)
NOISY_LOGGERS = {
    "ray.data._internal.progress": "Progress bars",
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
}
NO_NODE = "0" * 55 + "1"
DATA_ENVIRONMENT = {"RAY_DATA_LOG_LEVEL": "WARNING"}
# Of a Ray on this machine alone.
LOCAL_ENVIRONMENT = DATA_ENVIRONMENT | {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback alone: named after the systems on which that is the default
    "RAY_worker_niceness": "0",  # it is not starved by what else runs there
    "RAY_enable_autoscaler_v2": "1",  # which says what this machine cannot give
    # Nobody reads its statistics; each of its two dozen processes would keep them.
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
}


@contextmanager
def local_ray_environment() -> Iterator[None]:
    """Give a Ray that `ray.init` starts in this context its environment, so that it stays on loopback and finds itself.

    Ray reads whether it may listen beyond loopback when it is imported, which a host process may have done long before;
    no argument of `ray.init` says so, `_node_ip_address="127.0.0.1"` included. Its processes that look for their own
    cluster fail where another one runs on the machine; they look at RAY_ADDRESS first, for which the port of the
    cluster must be known before it starts. Variables that are set already are kept; afterwards all are as they were.

    Can go when `ray.init` takes an address to listen on, and the processes of Ray Train look for no other cluster.
    """
    from ray._private import ray_constants

    port = os.environ.get("RAY_GCS_SERVER_PORT") or str(_free_port())
    ours = LOCAL_ENVIRONMENT | {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    added = {name: value for name, value in ours.items() if name not in os.environ}
    beyond_loopback = ray_constants.ENABLE_RAY_CLUSTER and "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in added
    os.environ |= added
    try:
        with patch.object(ray_constants, "ENABLE_RAY_CLUSTER", beyond_loopback):
            yield
    finally:
        for name in added:
            del os.environ[name]


def _free_port() -> int:
    while True:
        port = random.SystemRandom().choice(GCS_PORTS)
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)) != 0:
                return port


def drop_noise() -> None:
    """Drop single lines of Ray's own from what this process prints: see `NOISE`; events of the autoscaler, too.

    Ray prints what other processes wrote by a function of its own; its public settings show all of that or nothing
    (`log_to_driver`), or change how it looks. The loggers are those of single modules.

    Can go when these lines do: ray-project/ray#53727 for the actors, `RAY_enable_infeasible_task_early_exit` as the
    default for the infeasible requests.
    """
    from ray._private import worker

    show = worker.print_worker_logs
    if show.__module__ != __name__:

        def show_without_noise(data: dict[str, Any], *arguments: Any, **settings: Any) -> None:
            lines = [line for line in data.get("lines", ()) if not NOISE.search(line)]
            if lines and data.get("pid") != "autoscaler":
                show(data | {"lines": lines}, *arguments, **settings)

        worker.print_worker_logs = show_without_noise
    for name, start in NOISY_LOGGERS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(start))


class _Without(logging.Filter):
    """Leaves out records that start with a text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.name)


def spend_actor_warning() -> None:
    """Have Ray say once, unheard, what it says once in a process: that an actor's arguments are in the object store.

    Those of Ray Data's actor pools always are. C++ writes the warning to the standard error of the process that creates
    the actor, where Python's logging cannot filter it; RAY_BACKEND_LOG_LEVEL would silence everything else, too. The
    actor created here is bound to a node that does not exist, so that no process is started for it.

    Can go when Ray keeps an actor's arguments as long as the actor (ray-project/ray#53727).
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nowhere = NodeAffinitySchedulingStrategy(NO_NODE, soft=False)
    actor = ray.remote(max_restarts=1, num_cpus=0, scheduling_strategy=nowhere)(_Nothing)
    argument = ray.put(None)
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            actor.remote(argument)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        heard.seek(0)
        for line in heard:  # of other threads too
            if not NOISE.search(line.decode(errors="replace")):
                os.write(2, line)


class _Nothing:
    def __init__(self, argument: None) -> None:
        pass


def draining_nodes() -> dict[str, int]:
    """Return the nodes that are about to be taken away, and when: milliseconds since the epoch, 0 where unknown.

    `ray.nodes()` and the state API call them alive, without a word; `ray.train.get_preemption_info` knows them too, but
    only those of the workers that ask, and within a training alone.

    Can go when `ray.nodes()` or `ray.util.state.list_nodes` say which nodes drain.
    """
    import ray

    return dict(ray._private.state.state.get_draining_nodes())


def cluster_status() -> Any:
    """Return what the cluster and its autoscaler say of themselves: a `GetClusterStatusReply`.

    With it a job is refused at once when the autoscaler has seen what it wants and can add no node for that.
    `ray.autoscaler.sdk` only asks for nodes; `ray status` and the state API leave out what is refused, and which state
    of the cluster the autoscaler has seen.

    Can go when a public function returns the refused requests, each with its placement group.
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status())
    return reply


def dataset_of_rows(table: "pa.Table", context: Any) -> Any:
    """Return a Ray Dataset with a block for each row of `table`, all of them slices of one object.

    A public `Datasource` has a read task for each block, every one of which Ray Data puts into the object store before
    the first begins: for 30,000 of them 25 s of a core, measured with Ray 2.60. `from_arrow` does the same with tables.

    Can go when `ray.data.read_datasource` starts the first of 30,000 read tasks within seconds.
    """
    import ray
    import ray.data
    from ray.data._internal.execution.interfaces import BlockSlice, RefBundle
    from ray.data._internal.execution.interfaces.ref_bundle import BlockEntry
    from ray.data._internal.logical.interfaces import LogicalPlan
    from ray.data._internal.logical.operators import InputData
    from ray.data._internal.stats import DatasetStats
    from ray.data.block import BlockAccessor

    entry = BlockEntry(ray.put(table), BlockAccessor.for_block(table).get_metadata())
    bundles = [
        RefBundle((entry,), schema=table.schema, owns_blocks=False, slices=(BlockSlice(row, row + 1),))
        for row in range(len(table))
    ]
    plan = LogicalPlan(InputData(bundles), context)
    return ray.data.Dataset(plan, context, DatasetStats(metadata={}, parent=None))


def pace(on_step: Callable[[], None], *, completion_seconds: float, idle_seconds: float) -> type:
    """Return a callback class, for a `DataContext`, that fits the pace of Ray Data's scheduling loop to its consumers.

    A step of that loop waits until all tasks that run are done, for 0.1 s at most: so long a core would wait for its
    next one. And it does not wait while finished blocks wait for the consumers, which is the usual case in a training:
    it would spend a core on that, half of a small machine. So it looks often, every `completion_seconds`, and rests for
    `idle_seconds` after a step in which nothing happened, but not where the consumers wait: that would delay the next
    tasks. `on_step` is called in each step. `DataContext.custom_execution_callback_classes` is public; the class of
    the callbacks, the wait, and what the executor knows of its tasks are not.

    Can go when Ray Data's executor waits for events instead of polling.
    """
    from ray.data._internal.execution import streaming_executor_state
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pace(ExecutionCallback):
        def __init__(self) -> None:
            self._progress = -1
            streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = completion_seconds

        def on_execution_step(self, executor: Any) -> None:
            on_step()
            metrics = [operator.metrics for operator in executor._topology]
            progress = sum(each.num_tasks_submitted + each.num_task_outputs_generated for each in metrics)
            if progress == self._progress and not executor._consumer_idling():
                time.sleep(idle_seconds)
            self._progress = progress

    return Pace


def keep_serve_to_loopback() -> None:
    """Let the Ray Serve replica of this process take calls of other deployments on loopback alone.

    Ray Serve opens a port for them on all addresses of the machine and unpickles what arrives there; no setting changes
    that. A service with one deployment needs no such calls.

    Can go when Ray Serve's replicas bind to the node's own address, or take one.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


def node_provider() -> type:
    """Return a provider of nodes that are processes, for Ray's autoscaler: Ray's own, with what they must not share.

    Each unpacks the code of jobs into a folder of its own: in a common one a node that starts deletes what others run.
    The head alone passes on what processes print: each would do so for all. Ray's public `AutoscalingCluster` wants a
    file that the wheel lacks, and stops every other Ray of the machine as it starts.

    Can go when `ray.cluster_utils.AutoscalingCluster` starts from the wheel and leaves other clusters alone.
    """
    from ray._private import parameter
    from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

    class LocalNodes(FakeMultiNodeProvider):
        def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
            with self.lock:  # of Ray, and reentrant
                own = {"runtime_env_dir_name": f"runtime_env_{self._next_node_id + 1}", "include_log_monitor": False}
                with patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, **own)):
                    super()._create_node_with_resources_and_labels(*arguments)

    return LocalNodes


def default_temp_dir() -> str:
    """Return the folder in which Ray keeps its sessions where it is told none, by RAY_TMPDIR or not at all.

    Paths of sockets in it may not be long: so a folder of ours lies beside it. It has no public name.

    Can go when Ray takes a short folder from the system's own settings, or documents this one.
    """
    from ray._common.utils import get_default_ray_temp_dir

    return str(get_default_ray_temp_dir())


def checked_cluster_file(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file for `ray up` with its defaults filled in; raise what `ray up` would say of it.

    `ray up` itself checks as it launches. Used by tests.

    Can go when Ray has a command that only checks.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return dict(config)


def aws_nodes(config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the content of a file for `ray up`, with what AWS adds to it, and the provider of its nodes.

    With them a test launches each kind of node where AWS is played; `ray up` goes on to each by SSH. Used by tests.

    Can go when Ray launches nodes without setting them up.
    """
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(config)
    return config, AWSNodeProvider(config["provider"], config["cluster_name"])


def pack_working_dir(directory: Path, package: Path) -> None:
    """Write what `ray job submit --working-dir` sends of a folder into a zip file.

    It has no other way to say what it would send than to send it. Used by tests.

    Can go when `ray job submit` has a dry run.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(directory), package, include_gitignore=True, excludes=excludes)

"""All uses of undocumented parts of Ray; no other module of this project imports private Ray code.

Each docstring says what the function does, why no public API does it, and when it can go. Each function has a contract
test in tests/unit/test_ray_internals.py, which fails with that docstring when Ray changes. Ray is imported inside the
functions, since few callers need more than one part of it.
"""

import functools
import logging
import os
import random
import re
import signal
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
    import ray

GCS_PORTS = range(20_000, 32_000)  # below the operating system's ephemeral ports
# Matches lines that Ray prints for its operators.
NOISE = re.compile(
    "There are tasks with infeasible resource requests"  # whenever tasks wait for a CPU and no node can be added
    "|has constructor arguments in the object store and max_restarts"  # about actors of Ray Train and Ray Data
    "|worker processes have been started on node"  # about tasks that reserve a fraction of a CPU, and idle actors
    "|^Progress bars disabled"  # we disabled them ourselves
)
NOISY_LOGGERS = {
    "ray.data._internal.progress": "Progress bars",
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
}
NO_NODE = "0" * 55 + "1"
DATA_ENVIRONMENT = {
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # each error is also raised, and shown once by the driver
    "RAY_DATA_USAGE_DISABLED": "1",  # an actor that stays, for usage statistics: see `keep_ray_data_statistics_here`
}
# For a local Ray only.
LOCAL_ENVIRONMENT = DATA_ENVIRONMENT | {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only; named after the systems where that is the default
    "RAY_worker_niceness": "0",  # other processes on the machine must not starve it
    "RAY_enable_autoscaler_v2": "1",  # it reports requests that this machine cannot satisfy
    # Nobody reads these statistics, but each of Ray's two dozen processes would collect them.
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
}


@contextmanager
def local_ray_environment() -> Iterator[None]:
    """Set the environment for a Ray that `ray.init` starts in this context: loopback only, and able to find itself.

    Ray decides on import whether to listen beyond loopback, and the host process may have imported it long before. No
    argument of `ray.init` changes that, not even `_node_ip_address="127.0.0.1"`. Ray's processes look for their own
    cluster and fail if another one runs on the machine. They check RAY_ADDRESS first, but setting it requires a port
    that is known before the start. Variables that are already set are kept; all are restored afterwards.

    Can go when `ray.init` accepts a listen address and Ray Train's processes no longer look for other clusters.
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


@contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM that a job has set, which `ray.init` would replace.

    Ray's own raises SystemExit wherever the process is, and its end may wait a minute for a Ray that is not up yet. The
    one of its C++ part prints a stack. No argument of `ray.init` leaves them out. Without a handler, Ray's are set.

    Can go when `ray.init` keeps handlers.
    """
    from ray._private import utils

    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler):
        yield
        return
    with patch.object(utils, "set_sigterm_handler", lambda _: None):
        yield
    signal.signal(signal.SIGTERM, handler)


def _free_port() -> int:
    while True:
        port = random.SystemRandom().choice(GCS_PORTS)
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)) != 0:
                return port


def drop_noise() -> None:
    """Drop Ray's lines that match `NOISE`, and autoscaler events, from the output of this process.

    Ray prints the output of other processes through a private function. Its public settings show all of that output or
    none (`log_to_driver`), or change its format. `NOISY_LOGGERS` are loggers of individual Ray modules.

    Can go when Ray no longer prints these lines: see ray-project/ray#53727 for the actors; infeasible requests need
    `RAY_enable_infeasible_task_early_exit` as the default.
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
    """Drops records that start with a given text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.name)


def keep_ray_data_statistics_here() -> "ray.actor.ActorHandle":
    """Start the actor of Ray Data's statistics on this node, unless it runs already; return it.

    Ray starts it where a cluster's first pipeline runs. It outlives the job, so the autoscaler never removes that node:
    without this, often a node of a training worker, whose pipeline may be the first. No public API starts it.

    Can go when the autoscaler ignores this actor.
    """
    from ray.data._internal.stats import get_or_create_stats_actor

    return get_or_create_stats_actor()


def spend_actor_warning() -> None:
    """Trigger, with stderr redirected, Ray's once-per-process warning about actor arguments in the object store.

    Ray Data's actor pools always cause it. It is written by C++ to the standard error of the process that creates the
    actor, where Python's logging cannot filter it; RAY_BACKEND_LOG_LEVEL would silence everything else, too. The actor
    created here is bound to a node that does not exist, so no process is started for it.

    Can go when Ray keeps an actor's arguments for as long as the actor lives (ray-project/ray#53727).
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
        for line in heard:  # other threads may have written some
            if not NOISE.search(line.decode(errors="replace")):
                os.write(2, line)


class _Nothing:
    def __init__(self, argument: None) -> None:
        pass


def draining_nodes() -> dict[str, int]:
    """Return the nodes that are about to be taken away, and when: in ms since the epoch, 0 if unknown.

    `ray.nodes()` and the state API list these nodes as alive. `ray.train.get_preemption_info` reports them, but only
    inside a training, and only the nodes of its own workers.

    Can go when `ray.nodes()` or `ray.util.state.list_nodes` report which nodes are draining.
    """
    import ray

    return dict(ray._private.state.state.get_draining_nodes())


def cluster_status() -> Any:
    """Return the status of the cluster and its autoscaler, a `GetClusterStatusReply`.

    It allows a job to fail immediately once the autoscaler has seen its request and cannot add nodes for it.
    `ray.autoscaler.sdk` only requests nodes; `ray status` and the state API omit the infeasible requests and the
    version of the cluster state that the autoscaler has seen.

    Can go when a public function returns the infeasible requests, each with its placement group.
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status())
    return reply


def dataset_of_rows(table: "pa.Table", context: Any) -> Any:
    """Return a Ray Dataset with one block for each row of `table`, all of them slices of one object.

    A public `Datasource` needs one read task per block, and Ray Data puts all of them into the object store before the
    first one starts: 25 s of one core for 30,000 tasks, measured with Ray 2.60. `from_arrow` does the same with tables.

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
    """Return a callback class for a `DataContext` that adapts Ray Data's scheduling loop to the speed of its consumers.

    Each step of the loop waits up to 0.1 s for all running tasks, so a core could be idle that long before its next
    task. While finished blocks wait for consumers, the usual case in training, the loop does not wait at all and keeps
    a core busy, which is half of a small machine. With this callback it polls every `completion_seconds` and sleeps for
    `idle_seconds` after a step without progress, unless consumers are waiting, since that would delay the next tasks.
    `on_step` is called in each step. `DataContext.custom_execution_callback_classes` is public; the callback base
    class, the timeout and the executor's task metrics are not.

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
    """Bind the port on which this process's Ray Serve replica takes calls from other deployments to loopback.

    Ray Serve opens that port on all interfaces and unpickles whatever it receives; no setting changes that. A service
    with a single deployment needs no such calls.

    Can go when Ray Serve's replicas bind to the node's own address or to a configurable one.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


def node_provider() -> type:
    """Return an autoscaler node provider whose nodes are local processes: Ray's own, with less shared between nodes.

    Each node unpacks job code into its own folder, since in a shared one a starting node deletes code that others are
    running. Only the head forwards process output, since otherwise each node would forward everything. Ray's public
    `AutoscalingCluster` requires a file that the wheel lacks, and stops every other Ray on the machine when it starts.

    Can go when `ray.cluster_utils.AutoscalingCluster` starts from the wheel and leaves other clusters alone.
    """
    from ray._private import parameter
    from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

    class LocalNodes(FakeMultiNodeProvider):
        def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
            with self.lock:  # Ray's own lock, which is reentrant
                own = {"runtime_env_dir_name": f"runtime_env_{self._next_node_id + 1}", "include_log_monitor": False}
                with patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, **own)):
                    super()._create_node_with_resources_and_labels(*arguments)

    return LocalNodes


def default_temp_dir() -> str:
    """Return the folder where Ray keeps its sessions by default; RAY_TMPDIR overrides it.

    Socket paths inside it must be short, so our own session folders are created next to it. It has no public name.

    Can go when Ray takes a short folder from the system's own settings, or documents this one.
    """
    from ray._common.utils import get_default_ray_temp_dir

    return str(get_default_ray_temp_dir())


def checked_cluster_file(config: dict[str, Any]) -> dict[str, Any]:
    """Validate a `ray up` configuration as `ray up` would, and return it with defaults filled in.

    `ray up` itself validates only as part of launching. Used by tests.

    Can go when Ray has a command that only validates.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return dict(config)


def aws_nodes(config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return a `ray up` configuration with its AWS settings filled in, and its node provider.

    Tests use them to launch each node type on a simulated AWS; `ray up` would connect to each node by SSH.

    Can go when Ray can launch nodes without setting them up.
    """
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(config)
    return config, AWSNodeProvider(config["provider"], config["cluster_name"])


def pack_working_dir(directory: Path, package: Path) -> None:
    """Write a zip file of what `ray job submit --working-dir` would upload for a folder.

    The command cannot show this without submitting a job. Used by tests.

    Can go when `ray job submit` has a dry run.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(directory), package, include_gitignore=True, excludes=excludes)

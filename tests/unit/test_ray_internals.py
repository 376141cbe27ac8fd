"""A contract for each part of Ray that Ray does not promise: a failure says what it was for and when it can go."""

import ast
import asyncio
import importlib
import inspect
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import grpc
import jsonschema
import psutil
import pyarrow as pa
import pytest
import ray
import ray.data
import yaml
from moto import mock_aws
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nsl_dist import ray_internals

ROOT = Path(__file__).parents[2]
RAY = Path(ray.__file__).parent
WARNING = "has constructor arguments in the object store"


@contextmanager
def contract(internal: Callable[..., Any]) -> Iterator[None]:
    """Fail with what an internal is for if anything in this context fails."""
    try:
        yield
    except Exception as error:
        message = f"Ray {ray.__version__} is not as {internal.__name__} needs it ({type(error).__name__}: {error})"
        pytest.fail(f"{message}\n\n{inspect.getdoc(internal)}")


def test_a_broken_contract_says_what_it_was_for_and_when_it_can_go() -> None:
    with (
        pytest.raises(
            pytest.fail.Exception, match=r"AttributeError: gone(.|\n)*about to be taken away(.|\n)*Can go when"
        ),
        contract(ray_internals.draining_nodes),
    ):
        raise AttributeError("gone")


def test_every_internal_is_explained_and_has_a_contract() -> None:
    defined = {
        name: value
        for name, value in vars(ray_internals).items()
        if inspect.isfunction(value) and value.__module__ == ray_internals.__name__ and not name.startswith("_")
    }
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Call)]
    held = {
        call.args[0].attr
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "contract" and isinstance(call.args[0], ast.Attribute)
    }
    assert held == set(defined)
    for name, internal in defined.items():
        assert "\nCan go when " in str(inspect.getdoc(internal)), name


def private_parts_of_ray(code: str) -> set[str]:
    """Return the names of what some code imports or takes of Ray below a name that Ray keeps to itself."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            root, *parts = name.split(".")
            if root == "ray" and any(part.startswith("_") and not part.endswith("__") for part in parts):
                found.add(name)
            if name.startswith("ray.core.generated"):
                found.add(name)
    return found


@pytest.mark.parametrize(
    ("code", "is_private"),
    [
        ("import ray._private.state", True),
        ("from ray import _raylet", True),
        ("from ray.data._internal.stats import DatasetStats", True),
        ("from ray._common.utils import get_default_ray_temp_dir", True),
        ("from ray.core.generated.autoscaler_pb2 import AutoscalingState", True),
        ("def f():\n    import ray\n    return ray._private.worker.global_worker", True),
        ("import ray.data\nray.data.DataContext.get_current().copy()\nray.__version__", False),
        ("from nsl_dist._private import x", False),
    ],
)
def test_private_parts_of_ray_are_found(code: str, is_private: bool) -> None:
    assert bool(private_parts_of_ray(code)) is is_private


def test_no_other_file_takes_private_parts_of_ray() -> None:
    paths = [path for folder in ("nsl_dist", "jobs", "cluster", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 80
    found = {path: private_parts_of_ray(path.read_text()) for path in paths}
    assert {str(path.relative_to(ROOT)) for path, names in found.items() if names} == {"nsl_dist/ray_internals.py"}


HOST = """
import json, os, signal
received = []
def on_sigterm(number, frame):
    received.append(number)
signal.signal(signal.SIGTERM, on_sigterm)
before = dict(os.environ)
import nsl_dist
nsl_dist.load_embedder
imported = dict(os.environ)
import psutil, ray  # long before this project starts it
from nsl_dist import cluster
cluster.connect(num_cpus=1)
process = psutil.Process()
processes = [process, *process.children(recursive=True)]
sockets = [each for process in processes for each in process.net_connections("tcp") if each.status == "LISTEN"]
listening = {each.laddr.ip.removeprefix("::ffff:") for each in sockets}
added = {name: value for name, value in os.environ.items() if before.get(name) != value}
@ray.remote(max_restarts=1)
class Keeper:
    def __init__(self, argument):
        pass
actor = Keeper.remote(ray.put({}))  # Ray would warn of it
os.kill(os.getpid(), signal.SIGTERM)
of_worker = ray.get(ray.remote(lambda: dict(os.environ)).remote())
print(json.dumps({
    "changed by import": [name for name in before | imported if before.get(name) != imported.get(name)],
    "listening": sorted(listening), "added": added, "of worker": of_worker,
    "address": ray.get_runtime_context().gcs_address,
    "received": received,
}))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of somebody else sees that starts Ray by `connect`, the first time in its user's life."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path_factory.mktemp("home"))
    done = subprocess.run(
        [sys.executable, "-c", HOST], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


def test_importing_changes_nothing_of_the_host_process(host: dict[str, Any]) -> None:
    assert host["changed by import"] == []


def test_a_local_ray_stays_on_loopback_and_finds_itself(host: dict[str, Any]) -> None:
    with contract(ray_internals.local_ray_environment):
        assert len(host["listening"]) >= 1
        assert all(address.startswith("127.") or address == "::1" for address in host["listening"]), host["listening"]
        assert host["of worker"]["RAY_ADDRESS"] == host["address"]
        assert host["of worker"].items() >= ray_internals.LOCAL_ENVIRONMENT.items()
        assert not host["added"].keys() & (ray_internals.LOCAL_ENVIRONMENT.keys() | {"RAY_ADDRESS"})


def test_a_local_ray_keeps_the_handler_of_sigterm(host: dict[str, Any]) -> None:
    with contract(ray_internals.keep_sigterm_handler):
        assert host["received"] == [signal.SIGTERM]
        assert "SIGTERM" not in host["stderr"]


def test_a_local_ray_starts_without_a_word(host: dict[str, Any]) -> None:
    assert host["stderr"] == ""


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("There are tasks with infeasible resource requests", "core/src/ray/gcs/gcs_server"),
        (f"{WARNING} and max_restarts", "_raylet.so"),
        (" worker processes have been started on node", "core/src/ray/raylet/raylet"),
        ("Progress bars disabled", "data/_internal/progress/__init__.py"),
        ("Token authentication is enabled", "_private/authentication/authentication_token_setup.py"),
    ],
)
def test_noise_is_still_made(text: str, file: str) -> None:
    with contract(ray_internals.drop_noise):
        assert ray_internals.NOISE.search(text) or text in ray_internals.NOISY_LOGGERS.values()
        with (RAY / file).open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as found:
            assert found.find(text.encode()) >= 0, f"Ray does not say {text!r} any more"


@pytest.mark.usefixtures("cluster")
def test_noise_is_dropped_line_by_line(capfd: pytest.CaptureFixture[str]) -> None:
    @ray.remote
    def noisy() -> None:
        print("before it\nProgress bars disabled. To enable, set\nafter it", flush=True)

    with contract(ray_internals.drop_noise):
        ray_internals.drop_noise()
        ray.get(noisy.remote())
        output, deadline = "", time.monotonic() + 60
        while "after it" not in output:
            assert time.monotonic() < deadline, output
            time.sleep(0.1)
            output += capfd.readouterr().out
        assert "before it" in output
        assert "Progress bars" not in output


@pytest.mark.usefixtures("cluster")
def test_ray_warns_of_an_actors_arguments_once_in_a_process() -> None:
    class Keeper:
        def __init__(self, argument: dict[str, int]) -> None:
            self.argument = argument

    @ray.remote(num_cpus=0, max_calls=1)  # a process of its own
    def heard(*, is_spent: bool) -> bytes:
        if is_spent:
            ray_internals.spend_actor_warning()
        with tempfile.TemporaryFile() as stderr:
            before = os.dup(2)
            os.dup2(stderr.fileno(), 2)
            nowhere = NodeAffinitySchedulingStrategy(ray_internals.NO_NODE, soft=False)
            ray.remote(max_restarts=1, scheduling_strategy=nowhere)(Keeper).remote(ray.put({}))
            os.dup2(before, 2)
            stderr.seek(0)
            return stderr.read()

    with contract(ray_internals.spend_actor_warning):
        assert WARNING.encode() in ray.get(heard.remote(is_spent=False))
        assert ray.get(heard.remote(is_spent=True)) == b""


@pytest.mark.usefixtures("cluster")
def test_ray_datas_statistics_are_on_the_node_of_the_driver() -> None:
    with contract(ray_internals.keep_ray_data_statistics_here):
        actor = ray_internals.keep_ray_data_statistics_here()
        here = ray.get_runtime_context().get_node_id()
        assert ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == here


DRAIN = """
import subprocess, sys, time
import ray
from ray.cluster_utils import Cluster
from nsl_dist.ray_internals import draining_nodes
nodes = Cluster()
nodes.add_node(num_cpus=0, dashboard_port=None)  # the next free one
node = nodes.add_node(num_cpus=1).node_id
ray.init(address=nodes.address, log_to_driver=False)
ray.remote(lambda: time.sleep(600)).remote()  # an idle node would leave at once
while ray.available_resources().get("CPU"):
    time.sleep(0.1)
assert draining_nodes() == {}
subprocess.run([
    sys.argv[1], "drain-node", "--address", nodes.address, "--node-id", node, "--reason",
    "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "100",
], check=True)
(going, at), = draining_nodes().items()
print(going == node, 0 < at / 1000 - time.time() <= 100)
ray.shutdown()
nodes.shutdown()
"""


def test_nodes_that_are_about_to_go_are_known() -> None:
    command = [sys.executable, "-c", DRAIN, str(Path(sys.executable).parent / "ray")]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    with contract(ray_internals.draining_nodes):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.stdout.endswith("True True\n"), done.stdout + done.stderr


@pytest.mark.usefixtures("cluster")
def test_the_autoscaler_says_what_it_refuses() -> None:
    with contract(ray_internals.cluster_status):
        asked_at = ray_internals.cluster_status().cluster_resource_state.cluster_resource_state_version
        group = placement_group([{"CPU": 10_000}])
        try:
            deadline = time.monotonic() + 60
            while True:
                state = ray_internals.cluster_status().autoscaling_state
                requests = state.infeasible_gang_resource_requests
                if any(group.id.hex() in request.details for request in requests):
                    break
                assert time.monotonic() < deadline, state
                time.sleep(0.2)
        finally:
            remove_placement_group(group)
        assert state.last_seen_cluster_resource_state_version > asked_at
        assert len(state.pending_instances) == len(state.pending_instance_requests) == 0
        assert len(state.failed_instance_requests) == 0


@pytest.mark.usefixtures("cluster")
def test_rows_of_a_table_become_blocks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    put = ray.put
    puts: list[Any] = []

    def counted(value: Any, **options: Any) -> Any:
        puts.append(value)
        return put(value, **options)

    def count(rows: dict[str, Any]) -> dict[str, Any]:
        return {"turn": rows["turn"], "rows": [len(rows["turn"])]}

    with contract(ray_internals.dataset_of_rows):
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        table = pa.table({"turn": range(3_000)})
        monkeypatch.setattr(ray, "put", counted)
        assert ray_internals.dataset_of_rows(table, context).take(1) == [{"turn": 0}]
        assert 1 <= len(puts) < 100  # not one for each row, which of 30,000 would take a minute
        blocks = ray_internals.dataset_of_rows(table.slice(10, 5), context).map_batches(count, batch_size=None)
        assert blocks.take_all() == [{"turn": turn, "rows": 1} for turn in range(10, 15)]


@pytest.mark.usefixtures("cluster")
def test_ray_datas_loop_is_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, progress = [], []

    with contract(ray_internals.pace):
        loop = importlib.import_module("ray.data._internal.execution.streaming_executor_state")
        assert "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S" in inspect.getsource(loop.process_completed_tasks)
        monkeypatch.setattr(loop, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", loop.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S)
        paced = ray_internals.pace(lambda: steps.append(1), completion_seconds=0.07, idle_seconds=0.01)

        class Watched(paced):  # type: ignore[misc, valid-type]
            def on_execution_step(self, executor: Any) -> None:
                super().on_execution_step(executor)
                progress.append(self._progress)

        context = ray.data.DataContext.get_current()
        monkeypatch.setattr(context, "custom_execution_callback_classes", [Watched])
        assert len(ray.data.range(4, override_num_blocks=4).map_batches(lambda rows: rows).take_all()) == 4
        assert len(progress) == len(steps) > 0  # none of them failed
        assert progress[-1] >= 8  # 4 tasks, and what each made
        assert loop.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S == 0.07


def test_serve_replicas_listen_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def bound_port() -> int:
        server = grpc.aio.server()
        port = replica.add_port_to_grpc_server(server, "[::]:0")
        await server.start()
        listening = {
            (each.laddr.ip.removeprefix("::ffff:"), each.laddr.port) for each in psutil.Process().net_connections("tcp")
        }
        await server.stop(None)
        assert {ip for ip, at in listening if at == port} == {"127.0.0.1"}
        return port

    with contract(ray_internals.keep_serve_to_loopback):
        replica = importlib.import_module("ray.serve._private.replica")
        assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)
        monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)
        ray_internals.keep_serve_to_loopback()
        assert asyncio.run(bound_port()) > 0


def test_nodes_that_are_processes_share_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    with contract(ray_internals.node_provider):
        provider = ray_internals.node_provider()
        settings = {"head_node_id": "f" * 56, "gcs_address": "127.0.0.1:1", "launch_multiple": True}
        nodes = provider(settings, "local")
        monkeypatch.setattr("ray._private.node.Node", lambda parameters, **_: started.append(parameters))
        for _ in range(2):
            nodes.create_node_with_resources_and_labels({}, {"ray-user-node-type": "node"}, 1, {"CPU": 2}, {})
        assert [each.runtime_env_dir_name for each in started] == ["runtime_env_1", "runtime_env_2"]
        assert [(each.num_cpus, each.include_log_monitor) for each in started] == [(2, False)] * 2
        assert len(nodes.non_terminated_nodes({})) == 3  # with the head


@pytest.mark.usefixtures("cluster")
def test_ray_keeps_its_sessions_in_its_folder() -> None:
    with contract(ray_internals.default_temp_dir):
        (node,) = ray.nodes()
        assert node["ObjectStoreSocketName"].startswith(f"{ray_internals.default_temp_dir()}/session_")


def test_cluster_files_are_checked() -> None:
    with contract(ray_internals.checked_cluster_file):
        config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
        assert ray_internals.checked_cluster_file(config)["available_node_types"].keys() >= {"head", "data"}
        with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
            ray_internals.checked_cluster_file(config | {"max_wrokers": 3})


def test_aws_starts_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key to ~/.ssh
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    region = config["provider"]["region"]
    with mock_aws():
        ec2 = boto3.client("ec2", region)
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="nodes", Description="nodes", VpcId=vpc)["GroupId"]
        boto3.client("iam", region).create_instance_profile(InstanceProfileName="nodes")
        for kind in config["available_node_types"].values():
            kind["node_config"] |= {"SecurityGroupIds": [group], "IamInstanceProfile": {"Name": "nodes"}}
        with contract(ray_internals.aws_nodes):
            launched, provider = ray_internals.aws_nodes(ray_internals.checked_cluster_file(config))
            node_config = launched["available_node_types"]["data"]["node_config"]
            provider.create_node(node_config, {"ray-node-name": "data"}, 1)
            assert len(provider.non_terminated_nodes({})) == 1


def test_working_dirs_are_packed(tmp_path: Path) -> None:
    (tmp_path / "of" / "__pycache__").mkdir(parents=True)
    for name in ("job.py", "ignored.py", "__pycache__/job.pyc", ".gitignore"):
        (tmp_path / "of" / name).write_text("ignored.py")
    with contract(ray_internals.pack_working_dir):
        ray_internals.pack_working_dir(tmp_path / "of", tmp_path / "package.zip")
        assert [name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if name.endswith("py")] == [
            "job.py"
        ]

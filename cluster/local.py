"""An autoscaling Ray cluster on this machine, to try out what a cloud cluster does before paying for one.

    python cluster/local.py

Ray's own autoscaler starts and stops the nodes, which are processes that share the machine's cores. The cluster
listens on loopback only and accepts jobs only with the token in ~/.ray/auth_token. Press Ctrl-C to stop it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from nsl_dist.ray_internals import default_temp_dir

BIN = Path(sys.executable).parent
HEAD_KIND = "ray.head.default"  # the name in Ray's fake node provider
HEAD_ID = "f" * 51 + "00000"
START_SECONDS = 120
STOP_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Size limits of the cluster."""

    nodes: int = 4
    """Maximum number of worker nodes; the head runs no job tasks."""
    cpus: int = 2
    """Logical CPUs per node; all nodes share the machine's cores."""
    idle_seconds: int = 30
    """Seconds without work after which a node is removed."""
    port: int = 8265
    """Port of the dashboard, which also accepts jobs."""


def main() -> None:
    """Start the head, print how to use the cluster, and show its size until Ctrl-C."""
    config = tyro.cli(LocalConfig, description=__doc__)
    if _listens(config.port):
        sys.exit(f"error: port {config.port} is in use, perhaps by another Ray; give another --port")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    os.environ |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",  # so that jobs find this environment's `python`
        "PYTHONPATH": str(Path(__file__).parent),  # so that the autoscaler finds local_nodes.py
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
        "RAY_worker_niceness": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",  # lets a stopped run write its checkpoint
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], check=True, capture_output=True)
    with tempfile.TemporaryDirectory(prefix="nsl_dist_") as directory:
        _run(config, Path(directory))


def _run(config: LocalConfig, directory: Path) -> None:
    gcs, agent = _free_ports(2)
    file, log = directory / "cluster.yaml", directory / "head.log"
    file.write_text(json.dumps(_cluster_file(config, gcs_address=f"127.0.0.1:{gcs}")))  # JSON is valid YAML
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={config.port}", f"--dashboard-agent-listen-port={agent}",
        f"--autoscaling-config={file}",
        # Ray sends jobs to the newest cluster of a temporary folder, and others may use the default folder.
        f"--temp-dir={default_temp_dir()}_{config.port}",
    ]  # fmt: skip
    names = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    with log.open("w") as output:
        head = subprocess.Popen(command, env=os.environ | names, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (_listens(config.port) and _listens(agent)):
            if head.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: the head did not start\n{log.read_text()}")
            time.sleep(0.2)
        address = f"http://127.0.0.1:{config.port}"
        print(
            f"A Ray cluster is up at {address}: a head, and up to {config.nodes} nodes of {config.cpus} CPUs, which "
            f"start on demand and stop after {config.idle_seconds} s without work. In another terminal:\n\n"
            f'  make submit ADDRESS={address} ARGS="--num-workers 4"\n\nCtrl-C stops it.',
            flush=True,
        )
        _show_nodes(head, address)
        sys.exit(f"error: the head exited\n{log.read_text()}")
    except KeyboardInterrupt:
        print("stopping the cluster", flush=True)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)  # the nodes belong to its process group


def _show_nodes(head: "subprocess.Popen[bytes]", address: str) -> None:
    """Print the number of nodes whenever it changes, until the head exits."""
    from ray.util.state import list_nodes  # reads the environment when it is imported

    shown = 0
    while head.poll() is None:
        beside_head: list[Any] = [("state", "=", "ALIVE"), ("is_head_node", "=", "False")]
        nodes = list_nodes(address=address, filters=beside_head, raise_on_missing_output=False)
        if len(nodes) != shown:
            shown = len(nodes)
            print(f"{time.strftime('%H:%M:%S')}  nodes beside the head: {shown}", flush=True)
        time.sleep(1)


def _cluster_file(config: LocalConfig, *, gcs_address: str) -> dict[str, Any]:
    """Return a `ray up` configuration whose nodes are local processes."""
    return {
        "cluster_name": "local",
        "max_workers": config.nodes,
        "idle_timeout_minutes": config.idle_seconds / 60,
        "upscaling_speed": config.nodes,
        "provider": {
            "type": "external",
            "module": "local_nodes.LocalNodes",
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD_KIND,
        "available_node_types": {
            HEAD_KIND: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": {"resources": {"CPU": config.cpus}, "node_config": {}, "max_workers": config.nodes},
        },
        # Only `ray up` uses these, but the autoscaler requires them.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "cluster_synced_files": [],
    }


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    main()

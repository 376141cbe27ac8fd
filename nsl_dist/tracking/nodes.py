"""CPU, memory, network and GPUs of a cluster's nodes, as MLflow's own monitors measure them."""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nsl_dist import cluster
from nsl_dist.progress import counted

EVERY_SECONDS = 10.0  # as MLflow's own
ANSWER_SECONDS = 5.0  # a node that is slower is asked again the next time


class NodeMetrics:
    """Measures all nodes that are there, from a thread of its own, until it is closed.

    Args:
        log: takes the metrics of one node by MLflow's names, `system/NODE/cpu_utilization_percentage`.

    """

    def __init__(self, log: Callable[[dict[str, float]], None]) -> None:
        self._log = log
        self._monitors: dict[str, Any] = {}  # actors, on all nodes but this one
        self._failures: list[str] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop measuring; say how often it failed."""
        self._closed.set()
        self._thread.join()
        for monitor in self._monitors.values():
            ray.kill(monitor)
        if self._failures:
            times = counted(len(self._failures), "time")
            print(f"warning: the nodes could not be measured {times}; the first: {self._failures[0]}", flush=True)

    def _run(self) -> None:
        this_node, this_monitor = ray.get_runtime_context().get_node_id(), _Monitor()
        while not self._closed.wait(EVERY_SECONDS):
            try:
                self._measure(this_node, this_monitor)
            except Exception as error:  # whatever it is, the next measurement may succeed
                self._failures.append(repr(error))
                if len(self._failures) == 1:
                    print(f"warning: the nodes could not be measured, which is tried again: {error!r}", flush=True)

    def _measure(self, this_node: str, this_monitor: "_Monitor") -> None:
        names = _names(cluster.live_nodes())
        if this_node in names:
            self._tell(names[this_node], this_monitor.read())
        for gone in self._monitors.keys() - names.keys():
            del self._monitors[gone]
        for node in names.keys() - self._monitors.keys() - {this_node}:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            self._monitors[node] = ray.remote(num_cpus=0, scheduling_strategy=there)(_Monitor).remote()
        asked = {monitor.read.remote(): names[node] for node, monitor in self._monitors.items()}
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)[0] if asked else []
        for answer in answered:
            with suppress(ray.exceptions.RayActorError):  # its node has just gone
                self._tell(asked[answer], ray.get(answer))

    def _tell(self, node: str, values: dict[str, float]) -> None:
        self._log({f"system/{node}/{name}": value for name, value in values.items()})


def _names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Return what to call each node, by its id: by its address, where no other has the same."""
    shared = Counter(node["NodeManagerAddress"] for node in nodes)
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        + (f"-{node['NodeID'][:6]}" if shared[node["NodeManagerAddress"]] > 1 else "")
        for node in nodes
    }


class _Monitor:
    """Of one node; on all but the driver's an actor."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), NetworkMonitor()]
        with suppress(RuntimeError):  # there is none
            self._monitors.append(GPUMonitor())
        self.read()  # of a CPU, what it does between two readings

    def read(self) -> dict[str, float]:
        """Return what MLflow's monitors say, by their names."""
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return metrics

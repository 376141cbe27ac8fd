r"""Train while workers, nodes, the driver and the head are killed at random, and prove that nothing was lost.

    python jobs/chaos.py --minutes 30

Several Ray nodes run on this machine, on loopback. The same training is done twice: undisturbed, then killed at random
times until the minutes are over. Batches, sampled classes and random numbers come from seed and step, and a checkpoint
changes nothing of what comes after it: so weights, momentum and proxies of both must be equal to the last bit.
"""

import dataclasses
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from safetensors.numpy import load_file

from nsl_dist.commandline import run_job
from nsl_dist.progress import duration
from nsl_dist.runs import newest_checkpoint

Victim = Literal["worker", "node", "driver", "head", "stop"]
ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
REPOSITORY = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class ChaosConfig:
    """What to train and what to kill."""

    minutes: float = 30.0
    """How long to kill; then the training is left in peace until its end."""
    victims: tuple[Victim, ...] = ("worker", "node", "driver", "head", "stop")
    """What to kill: training workers, nodes, the driver, the head with all; stop tells the driver to leave in order."""
    seconds_between: float = 40.0
    """Seconds from one to the next, on average; they are drawn from an exponential distribution."""
    num_workers: int = 2
    """Training workers; with other numbers in between, sums over them would round otherwise."""
    nodes: int = 2
    """Nodes beside the head. One that is killed is replaced."""
    steps: int = 2000
    """Iterations of the training, about."""
    checkpoint_every: int = 20
    """Iterations between checkpoints."""
    seed: int = 0
    """Of the kills."""
    storage: str | None = None
    """Folder for runs and shards. None: one for temporary files."""


class Nodes:
    """Several Ray nodes on this machine: a head for the driver and the data, and others with a CPU or more each."""

    def __init__(self, count: int, *, head_cpus: int = 1, cpus: int = 1) -> None:
        os.environ |= ENVIRONMENT  # before Ray is imported
        self._count, self._head_cpus, self._cpus = count, head_cpus, cpus
        self.start()

    def start(self) -> None:
        """Start the head and the other nodes."""
        from ray.cluster_utils import Cluster

        memory = 200 * 2**20
        self._next_address = 2
        self._cluster: Any = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,  # which only the main thread can arrange for; `kill_all` does it
            head_node_args={
                "num_cpus": self._head_cpus, "node_ip_address": "127.0.0.1", "object_store_memory": memory,
                "include_dashboard": True, "dashboard_host": "127.0.0.1",
            },
        )  # fmt: skip
        for _ in range(self._count):
            self.add()

    def address(self) -> str:
        """Return that of the head, for RAY_ADDRESS."""
        return str(self._cluster.address)

    def add(self) -> None:
        """Add a node; its own address keeps the driver away from it."""
        self._cluster.add_node(
            num_cpus=self._cpus, node_ip_address=f"127.0.0.{self._next_address}", object_store_memory=100 * 2**20
        )
        self._next_address += 1

    def kill_node(self, rng: random.Random) -> None:
        """Kill all processes of a node at once, of one with a training worker if there is any."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_ip_address))
        node = rng.choice([node for node in nodes if _training_workers(node)] or nodes)
        processes = list(_descendants(_raylet(node)))
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in processes:
            _kill(pid)

    def kill_worker(self, rng: random.Random) -> bool:
        """Kill one training worker; tell whether there was one."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        workers = [pid for node in nodes for pid in _training_workers(node)]
        if workers:
            _kill(rng.choice(workers))
        return bool(workers)

    def kill_all(self) -> None:
        """Kill head and nodes."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        processes = [pid for node in nodes for pid in _descendants(_raylet(node))]
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            self._cluster.remove_node(node, allow_graceful=False)
        for pid in processes:
            _kill(pid)
        self._cluster.shutdown()  # Ray forgets the address, which others on this machine would try


class Driver:
    """A training job in a process of its own, its output in a file."""

    def __init__(self, arguments: list[str], *, address: str, log: Path) -> None:
        self._arguments, self._log = arguments, log
        self.start(address)

    def start(self, address: str) -> None:
        """Start it, or start it again."""
        environment = os.environ | ENVIRONMENT | {"RAY_ADDRESS": address}
        command = [sys.executable, str(REPOSITORY / "jobs" / "train_sop.py"), *self._arguments]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )

    @property
    def output(self) -> str:
        """All that it has said."""
        return self._log.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last iteration that it has shown."""
        return max((int(found) for found in re.findall(r"^step (\d+)/", self.output.replace(",", ""), re.M)), default=0)

    @property
    def attempts(self) -> list[int]:
        """The iterations that its workers have begun with, each time that they were started."""
        return [int(found) for found in re.findall(r"^step (\d+): training", self.output.replace(",", ""), re.M)]

    def wait_for_step(self, step: int) -> None:
        """Wait until it has shown an iteration (see `wait`)."""
        self.wait(lambda: self.step >= step, f"step {step}")

    def wait_for_attempt(self, number: int) -> None:
        """Wait until its workers were started that often (see `wait`)."""
        self.wait(lambda: len(self.attempts) >= number, f"its attempt {number}")

    def wait(self, reached: Callable[[], bool], what: str, *, timeout: float = 300) -> None:
        """Wait until it has reached something.

        Raises:
            RuntimeError: it ended before, or took too long.

        """
        deadline = time.monotonic() + timeout
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the training did not come to {what}:\n{self.output[-4000:]}")
            time.sleep(0.2)


def compare(ours: str, theirs: str) -> float:
    """Return the greatest difference between all tensors of two runs' newest checkpoints, as a share of the greatest.

    Raises:
        ValueError: they do not hold the same tensors.

    """
    first, second = (_tensors(run_dir) for run_dir in (ours, theirs))
    if first.keys() != second.keys():
        raise ValueError(f"{ours} and {theirs} hold different tensors")
    most = 0.0
    for name, tensor in first.items():
        if not np.array_equal(tensor, second[name]):
            scale = float(np.abs(tensor).max())
            most = max(most, float(np.abs(tensor.astype(float) - second[name].astype(float)).max()) / scale)
    return most


def _tensors(run_dir: str) -> dict[str, Any]:
    """Return all tensors of the newest checkpoint, the rows of all workers joined."""
    folder = Path(newest_checkpoint(run_dir) or "")
    rows = [load_file(path) for path in sorted(folder.glob("proxies-*"))]
    tensors = {f"proxies.{name}": np.concatenate([part[name] for part in rows]) for name in rows[0]}
    for name in ("embedder", "optimizer"):
        tensors |= {f"{name}.{key}": tensor for key, tensor in load_file(folder / f"{name}.safetensors").items()}
    return tensors


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _training_workers(node: Any) -> list[int]:
    return [pid for pid in _descendants(_raylet(node)) if "RayTrainWorker" in _title(pid)]


def _descendants(pid: int) -> Iterator[int]:
    """Yield the processes below one, itself left out."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except FileNotFoundError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    """Start the nodes, do it, stop them."""
    config = tyro.cli(ChaosConfig, description=__doc__)
    storage = config.storage or tempfile.mkdtemp(prefix="nsl_dist_chaos_")
    rng = random.Random(config.seed)
    arguments = [
        f"--storage={storage}", f"--num-workers={config.num_workers}", f"--checkpoint.every={config.checkpoint_every}",
        f"--optim.epochs={max(1, config.steps // 15)}", "--data.image-size=32", "--model.dim=32", "--max-failures=-1",
        "--model.backbone=shufflenet_v2_x0_5", "--model.batch-norm=frozen", "--data.batch-size=60",
        "--tracking.every=5",
        "--eval.no-nmi",
    ]  # fmt: skip
    nodes = Nodes(config.nodes)
    try:
        disturb(config, nodes, arguments, storage, rng)
    finally:
        nodes.kill_all()


def disturb(config: ChaosConfig, nodes: Nodes, arguments: list[str], storage: str, rng: random.Random) -> None:
    """Train undisturbed, train disturbed, compare.

    Raises:
        ValueError: the trainings failed or came out otherwise.

    """
    print(f"storage: {storage}", flush=True)
    logs = Path(storage)
    logs.mkdir(parents=True, exist_ok=True)
    driver = Driver([*arguments, "--run-name=undisturbed"], address=nodes.address(), log=logs / "undisturbed.log")
    while driver.process.poll() is None:
        time.sleep(1)
    if driver.process.returncode != 0:
        raise ValueError(f"the undisturbed training failed:\n{driver.output[-4000:]}")
    print("undisturbed training done", flush=True)

    driver = Driver([*arguments, "--run-name=disturbed"], address=nodes.address(), log=logs / "disturbed.log")
    started = time.monotonic()
    kills: list[dict[str, Any]] = []
    next_kill = started + rng.expovariate(1 / config.seconds_between)
    while True:
        time.sleep(0.2)
        now, attempts = time.monotonic(), driver.attempts
        for kill in kills:  # those that the training has come back from
            if kill["recovered"] is None and len(attempts) > kill["attempts"]:
                kill["recovered"] = now - kill["at"]
                kill["again"] = max(0, kill["step"] - attempts[-1] + 1)
        if (status := driver.process.poll()) is not None:
            if status == 0:
                break
            driver.start(nodes.address())
        if now < next_kill or now - started > 60 * config.minutes:
            continue
        next_kill = now + rng.expovariate(1 / config.seconds_between)
        victim = rng.choice(config.victims)
        kill = {"victim": victim, "at": now, "step": driver.step, "attempts": len(attempts), "recovered": None}
        if victim == "worker" and not nodes.kill_worker(rng):
            continue
        if victim == "node":
            nodes.kill_node(rng)
            nodes.add()
        elif victim == "driver":
            driver.process.kill()
            driver.process.wait()
        elif victim == "stop":
            driver.process.terminate()
        elif victim == "head":
            nodes.kill_all()
            driver.process.kill()
            driver.process.wait()
            nodes.start()
        kills.append(kill)
        print(f"{duration(now - started):>12}  step {kill['step']:5,}  kill {len(kills)}: {victim}", flush=True)

    print(f"\n{len(kills)} kills in {duration(time.monotonic() - started)}")
    print(f"{'':8}{'kills':>7}{'s to next step':>16}{'most':>7}{'steps again':>13}{'most':>6}")
    for victim in config.victims:
        those = [kill for kill in kills if kill["victim"] == victim]
        back = [kill["recovered"] for kill in those if kill["recovered"] is not None]
        again = [kill["again"] for kill in those if kill["recovered"] is not None]
        if back:
            print(
                f"{victim:8}{len(those):7}{statistics.median(back):16.1f}{max(back):7.1f}"
                f"{statistics.median(again):13.1f}{max(again):6}"
            )
    difference = compare(f"{storage}/runs/undisturbed", f"{storage}/runs/disturbed")
    print(f"greatest difference of weights, momentum and proxies: {difference:.2g} of the greatest")
    if difference > 0:
        raise ValueError(f"the disturbed training came out otherwise; see {storage}")
    print("nothing was lost")


if __name__ == "__main__":
    run_job(main)

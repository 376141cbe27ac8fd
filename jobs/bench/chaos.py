r"""Train while workers, nodes, the driver and the head are killed at random, and verify that nothing is lost.

    python jobs/bench/chaos.py --minutes 30

Several Ray nodes run on this machine, on loopback. The same training runs twice: undisturbed, then with random kills
for the given number of minutes. Batches, sampled classes and random numbers depend only on seed and step, and writing a
checkpoint does not affect training, so weights, momentum and proxies must be bitwise equal.
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
from nsl_dist.run import RunFolder

Victim = Literal["worker", "node", "driver", "head", "stop"]
ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class ChaosConfig:
    """What to train and what to kill."""

    minutes: float = 30.0
    """How long to keep killing; afterwards the training runs undisturbed to its end."""
    victims: tuple[Victim, ...] = ("worker", "node", "driver", "head", "stop")
    """What to kill: training workers, nodes, the driver or all (head). stop sends SIGTERM to the driver."""
    seconds_between: float = 10.0
    """Average seconds of training between kills. One in five comes before training has resumed."""
    num_workers: int = 2
    """Training workers. Constant, because another number would round sums differently."""
    nodes: int = 2
    """Nodes in addition to the head. Killed nodes are replaced."""
    steps: int = 1000
    """Approximate number of iterations."""
    checkpoint_every: int = 20
    """Iterations between checkpoints."""
    seed: int = 0
    """Seed of the kills."""
    storage: str | None = None
    """Folder for runs and shards; reuses an undisturbed training in it. If None, a temporary folder."""


class Nodes:
    """A Ray cluster on this machine: a head for driver and data, and other nodes, with one CPU each."""

    def __init__(self, count: int) -> None:
        os.environ |= ENVIRONMENT  # before Ray is imported
        self._count = count
        self.start()

    def start(self) -> None:
        """Start the head and the other nodes."""
        from ray.cluster_utils import Cluster

        memory = 200 * 2**20
        self._next_address = 2
        self._cluster: Any = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,  # only the main thread could do it; `kill_all` shuts down
            head_node_args={
                "num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": memory,
                "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": None,  # the next free one
            },
        )  # fmt: skip
        for _ in range(self._count):
            self.add()

    def address(self) -> str:
        """Return the head's address for RAY_ADDRESS."""
        return str(self._cluster.address)

    def add(self) -> None:
        """Add a node with its own address, so that the driver does not connect to it."""
        self._cluster.add_node(
            num_cpus=1, node_ip_address=f"127.0.0.{self._next_address}", object_store_memory=100 * 2**20
        )
        self._next_address += 1

    def kill_node(self, rng: random.Random) -> None:
        """Kill all processes of a random node, preferably one with a training worker."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_ip_address))
        self._kill_node(rng.choice([node for node in nodes if _training_workers(node)] or nodes))

    def _kill_node(self, node: Any) -> None:
        processes = list(_descendants(_raylet(node)))
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in processes:
            _kill(pid)

    def preempt_node(self, seconds: int = 30) -> None:
        """Announce the preemption of a node, wait, and kill all its processes, like a cloud does with spot nodes."""
        node = next(iter(self._cluster.worker_nodes))
        command = [
            str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.address(), "--node-id",
            str(node.node_id), "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", str(seconds),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        time.sleep(seconds)
        self._kill_node(node)

    def kill_worker(self, rng: random.Random) -> bool:
        """Kill one training worker; return whether there was one."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        workers = [pid for node in nodes for pid in _training_workers(node)]
        if workers:
            _kill(rng.choice(workers))
        return bool(workers)

    def kill_all(self) -> None:
        """Kill the head and all nodes."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        processes = [pid for node in nodes for pid in _descendants(_raylet(node))]
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            self._cluster.remove_node(node, allow_graceful=False)
        for pid in processes:
            _kill(pid)
        self._cluster.shutdown()  # removes the address, which other programs on this machine would try


class Driver:
    """A training job in a separate process, with its output in a file."""

    def __init__(self, arguments: list[str], *, address: str, log: Path) -> None:
        self._arguments, self._log = arguments, log
        self.start(address)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill the process if it is still running."""
        self.process.kill()
        self.process.wait()

    def start(self, address: str) -> None:
        """Start or restart the job."""
        environment = os.environ | ENVIRONMENT | {"RAY_ADDRESS": address}
        command = [sys.executable, str(REPOSITORY / "jobs" / "train_sop.py"), *self._arguments]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )

    @property
    def output(self) -> str:
        """The output so far."""
        return self._log.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last iteration in the output."""
        found = re.findall(r"^step (\d+)/", self.output.replace(",", ""), re.M)
        return int(found[-1]) if found else 0

    @property
    def attempts(self) -> list[int]:
        """The first iteration after each start of the workers."""
        return [int(found) for found in re.findall(r"^step (\d+): training", self.output.replace(",", ""), re.M)]

    def wait_for_step(self, step: int) -> None:
        """Wait for an iteration (see `wait`)."""
        self.wait(lambda: self.step >= step, f"step {step}")

    def wait_for_attempt(self, number: int) -> None:
        """Wait until the workers have started `number` times (see `wait`)."""
        self.wait(lambda: len(self.attempts) >= number, f"its attempt {number}")

    def wait(self, reached: Callable[[], bool], what: str, *, timeout: float = 600) -> None:
        """Wait until `reached` returns true.

        Raises:
            RuntimeError: the job ended before that, or the timeout expired.

        """
        deadline = time.monotonic() + timeout
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the training did not reach {what}:\n{self.output[-4000:]}")
            time.sleep(0.2)


def compare(ours: str, theirs: str) -> float:
    """Return the largest difference between tensors of two runs' newest checkpoints, relative to their largest value.

    Raises:
        ValueError: the checkpoints contain different tensors.

    """
    first, second = (_tensors(run_dir) for run_dir in (ours, theirs))
    if first.keys() != second.keys():
        raise ValueError(f"{ours} and {theirs} hold different tensors")
    most = 0.0
    for name, tensor in first.items():
        if not np.array_equal(tensor, second[name]):
            scale = float(np.abs(tensor).max())
            difference = float(np.abs(tensor.astype(float) - second[name].astype(float)).max())
            most = max(most, difference / scale if scale > 0 and np.isfinite(difference) else np.inf)
    return most


def _tensors(run_dir: str) -> dict[str, Any]:
    """Return all tensors of the newest checkpoint, with the rows of all workers concatenated."""
    newest = RunFolder(run_dir).newest_checkpoint()
    if newest is None:
        raise ValueError(f"{run_dir} has no complete checkpoint")
    folder = Path(newest[0])
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
    """Yield all descendants of a process."""
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
    """Train undisturbed, train disturbed, compare."""
    config = tyro.cli(ChaosConfig, description=__doc__)
    storage = Path(config.storage or tempfile.mkdtemp(prefix="nsl_dist_chaos_"))
    storage.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"--storage={storage}", f"--num-workers={config.num_workers}", f"--checkpoint.every={config.checkpoint_every}",
        f"--optim.epochs={max(1, config.steps // 18)}", "--data.image-size=32", "--model.dim=32", "--max-failures=-1",
        "--recipe=laptop_scratch", "--model.backbone=shufflenet_v2_x0_5", "--model.batch-norm=frozen",
        "--data.batch-size=60",
        "--tracking.every=5",
        "--eval.no-nmi",
    ]  # fmt: skip
    print(f"storage: {storage}", flush=True)
    nodes = Nodes(config.nodes)
    try:
        address, log = nodes.address(), storage / "undisturbed.log"
        if not (storage / "runs" / "undisturbed" / "results.json").exists():
            with Driver([*arguments, "--run-name=undisturbed"], address=address, log=log) as driver:
                if driver.process.wait() != 0:
                    raise ValueError(f"the undisturbed training failed:\n{driver.output[-4000:]}")
            print("undisturbed training finished", flush=True)
        with Driver([*arguments, "--run-name=disturbed"], address=address, log=storage / "disturbed.log") as driver:
            kills = disturb(config, nodes, driver)
    finally:
        nodes.kill_all()
    show(kills)
    difference = compare(f"{storage}/runs/undisturbed", f"{storage}/runs/disturbed")
    print(f"largest relative difference of weights, momentum and proxies: {difference:.2g}")
    if difference > 0:
        raise ValueError(f"the disturbed training has a different result; see {storage}")
    print("nothing was lost")


def disturb(config: ChaosConfig, nodes: Nodes, driver: Driver) -> list[dict[str, Any]]:
    """Kill at random until the time is over, restart the driver whenever it has ended, and wait for it to finish.

    Returns:
        For each kill its victim, its time (`at`) and `step`, the seconds until training resumed (`recovered`) and the
        number of repeated steps (`again`). The latter two are missing or None if another kill came first.

    Raises:
        ValueError: the driver failed although nothing was killed since it was started.

    """
    rng = random.Random(config.seed)
    started = driver_started = time.monotonic()
    kills: list[dict[str, Any]] = []
    attempts_before = 0
    next_kill: float | None = None
    while True:
        time.sleep(0.2)
        now, attempts = time.monotonic(), driver.attempts
        if len(attempts) > attempts_before:  # training has resumed
            attempts_before = len(attempts)
            next_kill = now + rng.expovariate(1 / config.seconds_between)
            if kills and kills[-1]["recovered"] is None:
                kills[-1]["recovered"] = now - kills[-1]["at"]
                kills[-1]["again"] = max(0, kills[-1]["step"] - attempts[-1] + 1)
        if (status := driver.process.poll()) is not None:
            if status == 0:
                return kills
            if not kills or kills[-1]["at"] < driver_started:
                raise ValueError(f"the disturbed training failed on its own:\n{driver.output[-4000:]}")
            driver.start(nodes.address())
            driver_started = now
        if next_kill is None or now < next_kill or now - started > 60 * config.minutes:
            continue
        next_kill = now + rng.uniform(0, 60) if rng.random() < 0.2 else None
        victim = rng.choice(config.victims)
        step = driver.step
        if victim == "worker" and not nodes.kill_worker(rng):
            continue
        if victim == "node":
            nodes.kill_node(rng)
            nodes.add()
        elif victim == "driver":
            driver.kill()
        elif victim == "stop":
            driver.process.terminate()
        elif victim == "head":
            nodes.kill_all()
            driver.kill()
            nodes.start()
        kills.append({"victim": victim, "at": now, "step": step, "recovered": None})
        print(f"{duration(now - started):>12}  step {step:5,}  kill {len(kills)}: {victim}", flush=True)


def show(kills: list[dict[str, Any]]) -> None:
    """Print the number and cost of kills per kind of victim."""
    print(f"\n{len(kills)} kills; times are of those that training recovered from before the next one:")
    print(f"{'':8}{'kills':>7}{'back':>6}{'s to resume':>16}{'max':>7}{'steps again':>13}{'max':>6}")
    for victim in sorted({kill["victim"] for kill in kills}):
        those = [kill for kill in kills if kill["victim"] == victim]
        back = [kill for kill in those if kill["recovered"] is not None]
        line = f"{victim:8}{len(those):7}{len(back):6}"
        if back:
            seconds, again = [kill["recovered"] for kill in back], [kill["again"] for kill in back]
            line += (
                f"{statistics.median(seconds):16.1f}{max(seconds):7.1f}{statistics.median(again):13.1f}{max(again):6}"
            )
        print(line)


if __name__ == "__main__":
    run_job(main)

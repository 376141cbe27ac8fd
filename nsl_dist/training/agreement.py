"""Agreement between the training workers on what all of them do after the same iteration."""

import time
from dataclasses import dataclass

import ray
import ray.train
import ray.train.collective
from ray.util.queue import Queue

from nsl_dist import cluster
from nsl_dist.config import TrainConfig
from nsl_dist.training.records import ClusterChanged

AGREE_EVERY_SECONDS = 2.0  # approximate interval at which the workers agree on what to do


@dataclass(frozen=True)
class Agreed:
    """What the workers do next; by default they just continue."""

    checkpoint: bool = False
    leave: bool = False


class Agreement:
    """Lets all workers write an extra checkpoint, or write one and leave, after the same iteration."""

    def __init__(self, config: TrainConfig, records: Queue, orders: Queue, *, first_step: int) -> None:
        self._records = records
        self._minutes = config.checkpoint.minutes
        self._orders = orders
        self._rank = ray.train.get_context().get_world_rank()
        self._asked_at = self._written_at = time.monotonic()
        self._asked_step, self._next_step = first_step, first_step + 1
        fewest, most = config.worker_range or (1, 1)
        self._elastic = most > fewest
        self._nodes = self._live_nodes()
        self._going: set[str] = set()  # nodes with workers that are about to be taken away

    def reached(self, step: int) -> Agreed:
        """Return what to do after `step` iterations."""
        if step < self._next_step:
            return Agreed()
        notice = ray.train.get_preemption_info()  # every worker asks, and all get the same answer
        going = set(notice.preempted_node_ids) if notice is not None else set()
        answer = None
        if self._rank == 0:
            now = time.monotonic()
            due = self._minutes is not None and now - self._written_at >= 60 * self._minutes
            rate = (step - self._asked_step) / (now - self._asked_at)
            # The first iterations after a start find batches waiting, so their rate says little about later ones.
            most = 2 * (step - self._asked_step)
            next_step = step + max(1, min(most, round(rate * AGREE_EVERY_SECONDS)))
            leave = not self._orders.empty()
            # When nodes join, Ray Train soon restarts an elastic run with more workers.
            nodes, before = self._live_nodes(), self._nodes
            grown = self._elastic and nodes - before
            self._nodes = nodes
            if nodes != before:
                self._records.put(ClusterChanged(step, cluster.described()))
            write = bool(due or going - self._going or grown or leave)
            if write:
                self._written_at = now
            self._asked_at, self._asked_step = now, step
            # Plain types: Ray Train's synchronization actor would otherwise import this module, and with it torch.
            answer = (write, leave, next_step)
        self._going = going
        write, leave, self._next_step = ray.train.collective.broadcast_from_rank_zero(answer)
        return Agreed(checkpoint=write, leave=leave)

    def _live_nodes(self) -> set[str]:
        return {node["NodeID"] for node in cluster.live_nodes()} if self._rank == 0 else set()

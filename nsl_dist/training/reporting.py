"""What workers and mid-run evaluations report, shown as plain lines and tracked in MLflow."""

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ray.util.queue import Queue

from nsl_dist.progress import Bar, Phases, duration
from nsl_dist.schedule import Schedule

if TYPE_CHECKING:
    from nsl_dist.tracking.tracker import Tracker


class Relay:
    """Takes records from a queue in a thread of its own until it is closed.

    Steps that are done again after a failure are shown but not tracked again.

    Args:
        records: from the workers.
        tracked: the MLflow run.
        schedule: of the run.
        phases: of its start; the last ends with the first iteration.

    Attributes:
        rates: throughputs so far, images/s.
        left_at: iterations after which the workers have left as they were told; None: they have not.

    """

    def __init__(self, records: Queue, tracked: "Tracker", schedule: Schedule, phases: Phases) -> None:
        self.rates: list[float] = []
        self.left_at: int | None = None
        self._records = records
        self._tracked = tracked
        self._schedule = schedule
        self._phases = phases
        self._shown_step = 0
        self._seen_at = time.monotonic()
        self._num_attempts = 0
        self._bar: Bar | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Relay what is left."""
        self._records.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            step = record.pop("step")
            if "evaluation" in record:
                print(f"step {step:,}: {record['evaluation'].recall_line()}", flush=True)
                self._tracked.log(record["evaluation"].metrics_by_name(), step=step)
            elif "attempt" in record:
                self._show_attempt(record["attempt"], step)
            elif "left" in record:
                self.left_at = step
            elif "cluster" in record:
                print(f"step {step:,}: the cluster has {record['cluster']} now", flush=True)
            elif "node" in record:
                self._tracked.log(record["node"], step=self._shown_step, once=True)
            elif "warning" in record:
                print(f"step {step:,}: {record['warning']}", flush=True)
            elif "checkpoint" in record:
                print(
                    f"step {step:,}: {record['checkpoint']} written in {record['seconds']:.1f} s, for which training "
                    f"waited {record['waited']:.2f} s",
                    flush=True,
                )
                self._tracked.log({"checkpoint_wait_seconds": record["waited"]}, step=step)
            else:
                self._show_step(record, step)

    def _show_attempt(self, attempt: dict[str, Any], step: int) -> None:
        """Say where and how training begins, or goes on after a failure."""
        self._num_attempts += 1
        where = f"on {attempt['world_size']} workers"
        if attempt["checkpoint"] is not None:
            name, mib = attempt["checkpoint"].rpartition("/")[2], attempt["bytes_read"] / 2**20
            where += f" from {name}, of which the first worker read {mib:,.1f} MiB"
        if attempt["left_out"]:
            where += f", without {attempt['left_out']:,} classes of damaged shards"
        if self._num_attempts == 1:
            self._phases.end("workers and first iteration")
            print(f"step {step + 1:,}: training {where}\nstarted in {self._phases}", flush=True)
        else:
            again = max(0, self._shown_step - step)
            silence = duration(time.monotonic() - self._seen_at)
            print(
                f"step {step + 1:,}: training goes on {where}, {silence} after the last sign of the workers before; "
                f"{again} steps or more are done again",
                flush=True,
            )

    def _show_step(self, record: dict[str, float], step: int) -> None:
        schedule = self._schedule
        left = record.pop("seconds_left", None)
        if left is not None:  # unknown after the first step, which waits for the first batch
            self.rates.append(record["images_per_second"])
        epoch = (step - 1) // schedule.steps_per_epoch + 1
        line = (
            f"step {step:,}/{schedule.num_steps:,}  epoch {epoch}  loss {record['loss']:.3f}  "
            f"accuracy {record['accuracy']:.0%}  lr {record['learning_rate']:.2g}  "
            f"{record['images_per_second']:.0f} images/s  data wait {record['data_wait_share']:.0%}"
            + (f"  {duration(left)} left" if left is not None else "")
        )
        if sys.stdout.isatty():
            self._bar = self._bar or Bar("train", schedule.num_steps)
            self._bar.show(step, line)
        else:
            print(line, flush=True)
        self._shown_step, self._seen_at = step, time.monotonic()
        self._tracked.log(record, step=step, once=True)

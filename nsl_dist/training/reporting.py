"""Show records from the workers as plain lines or a progress bar, and track them in MLflow."""

import dataclasses
import sys
import threading
import time
from typing import TYPE_CHECKING

from ray.util.queue import Queue

from nsl_dist.progress import Bar, Phases, counted, doing, duration
from nsl_dist.schedule import Schedule
from nsl_dist.training.records import (
    AttemptStarted,
    CheckpointWritten,
    ClusterChanged,
    Evaluated,
    Left,
    NodeMeasured,
    Record,
    StepMetrics,
    Warned,
)

if TYPE_CHECKING:
    from nsl_dist.tracking.tracker import Tracker


class Reporter:
    """Takes records from a queue in its own thread until it is closed.

    Iterations repeated after a failure are shown but not tracked again. A record that cannot be shown or tracked is
    skipped with a warning, which is repeated on close.

    Args:
        records: queue of `Record`; None ends the thread.
        phases: start-up phases; the last one ends with the first iteration.

    Attributes:
        num_attempts: starts of workers that came to train.
        rates: throughputs so far, in images/s.
        left_at: number of iterations after which the workers left as ordered; None if they have not.

    """

    def __init__(self, records: Queue, tracker: "Tracker", schedule: Schedule, phases: Phases) -> None:
        self.rates: list[float] = []
        self.left_at: int | None = None
        self._records = records
        self._tracker = tracker
        self._schedule = schedule
        self._phases = phases
        self._shown_step = 0
        self._seen_at = time.monotonic()
        self.num_attempts = 0
        self._lost: list[str] = []
        self._bar: Bar | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Report the remaining records, and how many could not be shown or tracked."""
        self._records.put(None)
        self._thread.join()
        if self._lost:
            print(
                f"warning: {counted(len(self._lost), 'record')} of this run could not be shown or tracked; "
                f"the first: {self._lost[0]}",
                flush=True,
            )

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                self._take(record)
            except Exception as error:  # whatever the error is, later records must not be lost
                self._lost.append(f"{type(record).__name__}: {error!r}")
                print(f"warning: a record could not be shown or tracked: {self._lost[-1]}", flush=True)

    def _take(self, record: Record) -> None:
        match record:
            case AttemptStarted():
                self._show_attempt(record)
            case StepMetrics():
                self._show_step(record)
            case CheckpointWritten(step, name, seconds, waited):
                self._say(step, f"{name} written in {seconds:.1f} s; training waited {waited:.2f} s for it")
                self._tracker.log({"checkpoint_wait_seconds": waited}, step=step)
            case Evaluated(step, results):
                self._say(step, results.recall_line())
                self._tracker.log(results.metrics_by_name(), step=step)
            case ClusterChanged(step, described):
                self._say(step, f"the cluster now has {described}")
            case NodeMeasured(metrics):
                self._tracker.log(metrics, step=self._shown_step, once=True)
            case Warned(step, text):
                self._say(step, text)
            case Left(step):
                self.left_at = step

    @staticmethod
    def _say(step: int, text: str) -> None:
        print(f"step {step:,}: {text}", flush=True)

    def _show_attempt(self, attempt: AttemptStarted) -> None:
        """Print where training starts, or continues after a failure."""
        doing(None)
        self.num_attempts += 1
        where = f"on {counted(attempt.world_size, 'worker')}"
        if attempt.checkpoint is not None:
            name, mib = attempt.checkpoint.rpartition("/")[2], attempt.bytes_read / 2**20
            where += f" from {name}, of which the first worker read {mib:,.1f} MiB"
        if attempt.num_left_out:
            where += f", without {attempt.num_left_out:,} classes of damaged shards"
        if attempt.compile_seconds is not None:
            where += f", the model compiled in {duration(attempt.compile_seconds)}"
        if self.num_attempts == 1:
            self._phases.end("workers and first iteration")
            self._say(attempt.step + 1, f"training {where}\nstarted in {self._phases}")
        else:
            again = max(0, self._shown_step - attempt.step)
            silence = duration(time.monotonic() - self._seen_at)
            self._say(
                attempt.step + 1,
                f"training continues {where}, {silence} after the last report of the previous workers; at least "
                f"{counted(again, 'step')} repeated",
            )

    def _show_step(self, metrics: StepMetrics) -> None:
        schedule, step = self._schedule, metrics.step
        if metrics.seconds_left is not None:
            self.rates.append(metrics.images_per_second)
        epoch = (step - 1) // schedule.steps_per_epoch + 1
        line = (
            f"step {step:,}/{schedule.num_steps:,}  epoch {epoch}  loss {metrics.loss:.3f}  "
            f"accuracy {metrics.accuracy_sampled:.0%}  lr {metrics.learning_rate:.2g}  "
            f"{metrics.images_per_second:.0f} images/s  data wait {metrics.data_wait_share:.0%}"
            + (f"  {duration(metrics.seconds_left)} left" if metrics.seconds_left is not None else "")
        )
        if sys.stdout.isatty():
            self._bar = self._bar or Bar("train", schedule.num_steps)
            self._bar.show(step, line)
        else:
            print(line, flush=True)
        self._shown_step, self._seen_at = step, time.monotonic()
        tracked = dataclasses.asdict(metrics)
        del tracked["step"], tracked["seconds_left"]
        self._tracker.log(tracked, step=step, once=True)

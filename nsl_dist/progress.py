"""Output of the jobs: progress, as bars on a terminal or plain lines in a log, and results."""

import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

Output = Literal["full", "quiet", "json"]
_output: Output = "full"


class Progress:
    """Shows throughput and remaining time: as a bar on a terminal, else as a line every two seconds.

    Args:
        work: name of the activity: "embed".
        unit: items that are counted: "images".
        total: number of items.

    """

    def __init__(self, work: str, unit: str, total: int) -> None:
        self._work, self._unit, self._total = work, unit, total
        self._done = 0
        self._started = self._shown = time.monotonic()
        self._stream = sys.stdout
        self._bar = Bar(work, total) if self._stream.isatty() else None

    def advance(self, count: int) -> None:
        """Count `count` more items as done."""
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        counted = f"{self._done:,}/{self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s"
        left = f"{duration((self._total - self._done) / rate)} left"
        if self._bar is not None:
            self._bar.show(self._done, f"{counted}, {left}")
        elif now - self._shown >= 2 or self._done >= self._total:
            self._shown = now
            print(f"{self._work}: {counted}, {left}", file=self._stream, flush=True)


class Bar:
    """A bar at the bottom of a terminal, below printed output. Several bars are stacked."""

    def __init__(self, work: str, total: int) -> None:
        self._task = _bars().add_task(work, total=total, text="")
        _bars().start()

    def show(self, done: int, text: str) -> None:
        """Show the number of items done, with a text next to the bar."""
        _bars().update(self._task, completed=done, text=text)
        if _bars().finished:
            close_bars()


@functools.cache
def _bars() -> Any:
    from rich.progress import BarColumn, Progress, TextColumn  # not needed in a log

    return Progress(TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[text]}"))


def close_bars() -> None:
    """Stop updating the terminal and leave the bars as they are."""
    if _bars.cache_info().currsize:
        _bars().stop()
        for task in _bars().task_ids:
            _bars().remove_task(task)


@contextmanager
def output(choice: Output) -> Iterator[None]:
    """Discard everything printed except results ("quiet"), or send it to stderr ("json")."""
    global _output
    _output = choice
    try:
        with open(os.devnull, "w") as nowhere:
            stream = {"full": sys.stdout, "quiet": nowhere, "json": sys.stderr}[choice]
            with redirect_stdout(stream):
                yield
    finally:
        close_bars()
        _output = "full"


def show_results(text: str, results: dict[str, Any]) -> None:
    """Print the results of a job, as text or, with --json, as JSON."""
    stream = sys.stdout if _output == "full" else sys.__stdout__
    print(json.dumps(results) if _output == "json" else text, file=stream, flush=True)


class Phases:
    """Measures consecutive phases of work.

    Args:
        began: start of the first phase in seconds since the epoch; None means now.

    Attributes:
        seconds: of each phase that has ended.

    """

    def __init__(self, *, began: float | None = None) -> None:
        self._last = began or time.time()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """End the current phase, called `name`, and begin the next."""
        now = time.time()
        self.seconds[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items())
        return f"{duration(sum(self.seconds.values()))}: {phases}"


def duration(seconds: float) -> str:
    """Format a duration for people: `1 h 02 min`, `3 min 04 s` or `5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def counted(number: int, noun: str) -> str:
    """Return "1 worker" or "2 workers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

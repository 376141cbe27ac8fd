"""What a job shows of itself: progress, as bars on a terminal and as plain lines in a log, and its results."""

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
    """Counts what is done and shows throughput and time left: a bar on a terminal, else a line every two seconds.

    Args:
        work: what is being done: "embed".
        unit: what is counted: "images".
        total: how many there are.

    """

    def __init__(self, work: str, unit: str, total: int) -> None:
        self._work, self._unit, self._total = work, unit, total
        self._done = 0
        self._started = self._shown = time.monotonic()
        self._stream = sys.stdout
        self._bar = Bar(work, total) if self._stream.isatty() else None

    def advance(self, count: int) -> None:
        """Count some more as done."""
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
    """A bar at the bottom of a terminal, below what is printed meanwhile; several stand below each other.

    Args:
        work: what is being done.
        total: of what `show` is given.

    """

    def __init__(self, work: str, total: int) -> None:
        self._task = _bars().add_task(work, total=total, text="")
        _bars().start()

    def show(self, done: int, text: str) -> None:
        """Show how much is done, and a text beside it."""
        _bars().update(self._task, completed=done, text=text)
        if _bars().finished:
            close_bars()


@functools.cache
def _bars() -> Any:
    from rich.progress import BarColumn, Progress, TextColumn  # which a log needs not

    return Progress(TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[text]}"))


def close_bars() -> None:
    """Leave the terminal to others, with the bars as they are."""
    if _bars.cache_info().currsize:
        _bars().stop()
        for task in _bars().task_ids:
            _bars().remove_task(task)


@contextmanager
def output(choice: Output) -> Iterator[None]:
    """Choose what becomes of all that is printed but results: nothing ("quiet"), or it goes to stderr ("json")."""
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
    """Print what a job found: for a person, or as JSON where that was asked for."""
    stream = sys.stdout if _output == "full" else sys.__stdout__
    print(json.dumps(results) if _output == "json" else text, file=stream, flush=True)


class Phases:
    """Measures work that comes in phases, one after the other.

    Args:
        began: when the first began, seconds since the epoch; None: now.

    Attributes:
        seconds: of each phase that has ended.

    """

    def __init__(self, *, began: float | None = None) -> None:
        self._last = began or time.time()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """End the phase `name`; the next begins."""
        now = time.time()
        self.seconds[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items())
        return f"{duration(sum(self.seconds.values()))}: {phases}"


def duration(seconds: float) -> str:
    """Return a time as a person would write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def counted(number: int, noun: str) -> str:
    """Return "1 worker" or "2 workers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

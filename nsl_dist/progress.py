"""Output of the jobs: progress, as bars on a terminal or plain lines in a log, and results."""

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

Output = Literal["full", "quiet", "json"]
SILENCE_SECONDS = 5.0  # after which `doing` is repeated
_output: Output = "full"
_activity: tuple[str, float] | None = None  # what is going on, and since when


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


class _Timed:
    """A stream that knows when it was written to."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.written_at = time.monotonic()

    def write(self, text: str) -> int:
        self.written_at = time.monotonic()
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def output(choice: Output) -> Iterator[None]:
    """Discard everything printed except results ("quiet"), or send it to stderr ("json"); see also `doing`."""
    global _output
    _output = choice
    ended = threading.Event()
    try:
        with open(os.devnull, "w") as nowhere:
            stream = _Timed({"full": sys.stdout, "quiet": nowhere, "json": sys.stderr}[choice])
            threading.Thread(target=_end_silences, args=(stream, ended), daemon=True).start()
            with redirect_stdout(stream):
                yield
    finally:
        ended.set()
        close_bars()
        _output = "full"


def doing(activity: str | None) -> None:
    """Say what begins now; it is printed, with its duration, whenever nothing else was for `SILENCE_SECONDS`.

    None ends the repetition.
    """
    global _activity
    _activity = (activity, time.monotonic()) if activity is not None else None


def _end_silences(stream: _Timed, ended: threading.Event) -> None:
    while not ended.wait(0.5):
        now, activity = time.monotonic(), _activity
        if activity is not None and now - stream.written_at >= SILENCE_SECONDS:
            print(f"{activity[0]}: {duration(now - activity[1])}", file=stream, flush=True)


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


def announce(lines: dict[str, str]) -> None:
    """Print what a job is about to do, by heading; headings without text are left out."""
    width = max(10, *map(len, lines))
    print("\n".join(f"{name:>{width}}  {text}" for name, text in lines.items() if text), flush=True)


def duration(seconds: float) -> str:
    """Format a duration for people: `1 h 02 min`, `3 min 04 s` or `5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def counted(number: int, noun: str) -> str:
    """Return "1 worker" or "2 workers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

"""Progress of a long piece of work, as plain lines that read well in a log."""

import sys
import time


class Progress:
    """Counts what is done and prints throughput and time left, at most every two seconds.

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

    def advance(self, count: int) -> None:
        """Count some more as done."""
        self._done += count
        now = time.monotonic()
        if now - self._shown < 2 and self._done < self._total:
            return
        self._shown = now
        rate = self._done / max(now - self._started, 1e-9)
        print(
            f"{self._work}: {self._done:,}/{self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s, "
            f"{duration((self._total - self._done) / rate)} left",
            file=self._stream,
            flush=True,
        )


class Phases:
    """Measures work that comes in phases, one after the other.

    Args:
        began: when the first began, seconds since the epoch; None: now.

    """

    def __init__(self, *, began: float | None = None) -> None:
        self._last = began or time.time()
        self._seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """End the phase `name`; the next begins."""
        now = time.time()
        self._seconds[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self._seconds.items())
        return f"{duration(sum(self._seconds.values()))}: {phases}"


def duration(seconds: float) -> str:
    """Return a time as a person would write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

"""Throughput of a training, as one worker sees it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Averages since the last reading.

    Attributes:
        data_wait_share: share of the time that was spent waiting for data.
        seconds_left: until the last iteration, at the rate since the second; None after the first, which waits for the
            first batch.

    """

    images_per_second: float
    step_seconds: float
    data_wait_share: float
    seconds_left: float | None


class Meter:
    """Measures throughput and time spent waiting for data."""

    def __init__(self, first_step: int, num_steps: int, batch_size: int) -> None:
        self._first_step = first_step
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._waited = 0.0
        self._started = self._read_at = time.monotonic()
        self._read_step = first_step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in this context as waiting for data."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def read(self, step: int) -> Rates:
        """Return the rates since the last reading, after iteration `step`."""
        now = time.monotonic()
        elapsed, steps = now - self._read_at, step + 1 - self._read_step
        seconds_left = None
        if step == self._first_step:
            self._started = now
        else:
            seconds_left = (now - self._started) / (step - self._first_step) * (self._num_steps - step - 1)
        rates = Rates(steps * self._batch_size / elapsed, elapsed / steps, self._waited / elapsed, seconds_left)
        self._read_at, self._read_step, self._waited = now, step + 1, 0.0
        return rates

"""Training throughput as measured by one worker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Measures throughput, share of time spent waiting for data, and time left (excluding the slow first batch)."""

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

    def read(self, step: int) -> dict[str, float]:
        """Return the figures since the last reading."""
        now = time.monotonic()
        elapsed, steps = now - self._read_at, step + 1 - self._read_step
        figures = {
            "images_per_second": steps * self._batch_size / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait_share": self._waited / elapsed,
        }
        if step == self._first_step:
            self._started = now
        else:
            per_step = (now - self._started) / (step - self._first_step)
            figures["seconds_left"] = per_step * (self._num_steps - step - 1)
        self._read_at, self._read_step, self._waited = now, step + 1, 0.0
        return figures

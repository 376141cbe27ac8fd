"""SIGTERM and SIGINT end a job within seconds and with one line, wherever it is.

No exception is raised: one that hits Ray, MLflow or an import at the wrong moment is lost, or leaves a lock behind that
the end of the process would wait for.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from nsl_dist.progress import close_bars

LAST_SECONDS = 8.0  # for what must be done before the end
_last_acts: list[tuple[Callable[[], object], str]] = []


def end_on_signals() -> None:
    """End this process when SIGTERM or SIGINT arrives; a second signal ends it at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


@contextmanager
def before_a_stop(act: Callable[[], object], *, said: str) -> Iterator[None]:
    """Within this context, a signal calls `act`, in another thread, and adds `said` to the last line."""
    last = (act, said)
    _last_acts.append(last)
    try:
        yield
    finally:
        _last_acts.remove(last)


def _end(number: int, _: Any) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    try:
        acts = [threading.Thread(target=act, daemon=True) for act in (close_bars, *(act for act, _ in _last_acts))]
        for thread in acts:
            thread.start()
        # Others may be at work that must not be left half done, such as the set-up of MLflow's database.
        others = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
        deadline = time.monotonic() + LAST_SECONDS
        for thread in (*acts, *others):
            thread.join(max(0, deadline - time.monotonic()))
        lines = [f"{signal.Signals(number).name}: stopped", *(said for _, said in _last_acts)]
        print("; ".join(lines), file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:
        os._exit(128 + number)  # also ends the processes of a local Ray

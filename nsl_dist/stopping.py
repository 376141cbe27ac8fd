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

LAST_SECONDS = 8.0  # for what must be done before the end
_last_acts: list[Callable[[], str]] = []


def end_on_signals() -> None:
    """End this process when SIGTERM or SIGINT arrives; a second signal ends it at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


@contextmanager
def before_a_stop(act: Callable[[], str]) -> Iterator[None]:
    """Within this context, a signal calls `act`, in another thread, and adds what it returns to the last line."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


def _end(number: int, _: Any) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    said = [f"{signal.Signals(number).name}: stopped"]
    acting = threading.Thread(target=lambda: said.extend(act() for act in list(_last_acts)), daemon=True)
    acting.start()
    # Others may be at work that must not be left half done, such as the set-up of MLflow's database.
    others = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    deadline = time.monotonic() + LAST_SECONDS
    for thread in (acting, *others):
        thread.join(max(0, deadline - time.monotonic()))
    print("; ".join(said), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(128 + number)  # also ends the processes of a local Ray

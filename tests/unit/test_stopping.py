"""Signals end a process with one line, whatever it is doing."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import threading, time
from nsl_dist.stopping import before_a_stop, end_on_signals

end_on_signals()
begun = threading.Event()

def work():
    begun.set()
    time.sleep(1)
    print("whole", flush=True)

threading.Thread(target=work).start()
begun.wait()
with before_a_stop(lambda: print("acted", flush=True), said="the same command continues"):
    print("ready", flush=True)
    lock = threading.Lock()
    lock.acquire()
    {wait}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("wait", ["lock.acquire()", "while True: pass"])
def test_a_signal_ends_the_process_but_not_work_in_its_middle(number: signal.Signals, wait: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(wait=wait)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number
    assert sorted(output.splitlines()) == ["acted", "whole"]
    assert errors == f"{number.name}: stopped; the same command continues\n"

"""What jobs show: bars on a terminal, lines in a log, results alone or as JSON."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from nsl_dist import progress
from nsl_dist.progress import doing, output
from tests.support.processes import wait_until

JOB = """
import sys, time
from nsl_dist.commandline import run_job
from nsl_dist.progress import Bar, Progress, show_results

def main():
    assert len(sys.argv) == 1, sys.argv
    print("the plan")
    progress = Progress("embed", "images", 30)
    for _ in range(3):
        progress.advance(10)
        print("between", flush=True)
    show_results("a table", {"recall": 0.5})
    FAIL

run_job(main, shows_results=True)
"""


def run(*flags: str, fails: str = "") -> "subprocess.CompletedProcess[str]":
    code = JOB.replace("FAIL", fails)
    return subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)


def test_a_log_gets_plain_lines() -> None:
    done = run()
    assert re.fullmatch(
        r"the plan\n(between\n){2}embed: 30/30 images, [\d,]+ images/s, 0 s left\nbetween\na table\n", done.stdout
    ), done.stdout
    assert (done.stderr, done.returncode) == ("", 0)


def test_quiet_and_json_leave_results() -> None:
    assert (run("--quiet").stdout, run("--quiet").stderr) == ("a table\n", "")
    done = run("--json")
    assert json.loads(done.stdout) == {"recall": 0.5}
    assert done.stderr.startswith("the plan\nbetween\n")


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_errors_are_shown_however_quiet(flag: str) -> None:
    done = run(flag, fails="raise ValueError('give another')")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: give another")


def test_a_terminal_gets_bars_below_what_is_printed() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", JOB.replace("FAIL", "")], stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        output += part
    assert process.wait() == 0
    text = output.decode()
    assert "\x1b[?25l" in text  # the cursor is hidden
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # and comes back
    seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    assert re.search(r"embed ━+ +30/30 images, [\d,]+ images/s, 0 s left", seen), seen
    assert seen.count("between") == 3
    assert seen.rstrip().endswith("a table")


def test_silences_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.1)
    with output("full"):
        doing("starting")
        wait_until(lambda: "starting: " in capsys.readouterr().out, why=lambda: "nothing was said")
        doing(None)

"""Lines that a job's user should not see: of Ray, torch or MLflow instead of this project."""

import re

FOREIGN = re.compile(
    r"pid=|\(raylet|\(autoscaler|\(gcs|core_worker|\.(py|cc|cpp):\d"  # Ray's processes, and lines of code
    r"|\b(DEBUG|INFO|WARN|WARNING|ERROR)\b|Warning\b|Traceback"
    r"|^\s*(\x1b\[\d+m)?\[?\d{4}[-/]\d\d[-/]\d\d|^[IWEF]\d{4} |^\[[WE]"  # times; absl and torch
    r"|\bRay Data\b|Progress bars|auth token|Token authentication|alembic"
)


def foreign_lines(text: str) -> list[str]:
    """Return the foreign lines of a job's output."""
    return [line for line in text.splitlines() if FOREIGN.search(line)]

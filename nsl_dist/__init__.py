"""Distributed deep metric learning by classification: the Normalized Softmax Loss at 10^4 to 10^8 classes, on Ray."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsl_dist.embedder import Embedder

__version__ = "0.1.0"

# Ray reads these when it is imported.
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")  # the jobs say themselves which nodes they wait for, and which came
if "RAY_ADDRESS" not in os.environ:
    # A Ray started on this machine alone stays on loopback (Ray named the variable after the systems on which that is
    # the default) and is not starved by what else runs there.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_enable_autoscaler_v2", "1")  # which says what this machine cannot give
    # Nobody reads its statistics; each of its two dozen processes would keep them.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_event_stats", "0")


def load_embedder(location: str, *, device: str = "cpu") -> "Embedder":
    """Load the embedding model of a checkpoint (see `nsl_dist.embedder.load_embedder`)."""
    from nsl_dist.embedder import load_embedder  # imports torch and torchvision, which takes seconds

    return load_embedder(location, device=device)

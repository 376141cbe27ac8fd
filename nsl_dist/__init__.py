"""Distributed deep metric learning by classification: the Normalized Softmax Loss at 10^4 to 10^8 classes, on Ray."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsl_dist.embedder import Embedder

__version__ = "0.1.0"


def load_embedder(location: str, *, device: str = "cpu") -> "Embedder":
    """Load the embedding model of a checkpoint (see `nsl_dist.embedder.load_embedder`)."""
    from nsl_dist.embedder import load_embedder  # imports torch and torchvision, which takes seconds

    return load_embedder(location, device=device)

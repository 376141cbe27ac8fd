"""Approximate indexes of float embeddings, as faiss builds them from a factory string."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsl_dist.config import EvalConfig


def check_index(config: EvalConfig, dim: int) -> None:
    """Refuse an approximate index that faiss does not know, before any work is done for it.

    Raises:
        ValueError: with faiss's reason.

    """
    if config.index is not None:
        build_index(np.empty((0, dim), dtype=np.float32), config.index, config.index_parameters)


def build_index(
    vectors: NDArray[np.float32], factory: str, parameters: str | None, *, flag: str = "--eval.index"
) -> Any:
    """Build a faiss index by inner product.

    Args:
        vectors: `[n, D]`; with n = 0 the index is only checked.
        factory: faiss's description of the index.
        parameters: search parameters as faiss names them; None: faiss's defaults.
        flag: the command line's name of `factory`, for the error message.

    Raises:
        ValueError: with faiss's reason.

    """
    import faiss

    index: Any
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if len(vectors):
            index.train(vectors)
            index.add(vectors)
        if parameters is not None:
            space: Any = faiss.ParameterSpace()
            space.set_index_parameters(index, parameters)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1]
        where = f" over {len(vectors):,}" if len(vectors) else ", for"
        raise ValueError(
            f"faiss cannot build {flag} {factory} ({parameters or 'its own search parameters'}){where} vectors "
            f"of {vectors.shape[1]} dimensions: {reason}; choose another"
            + (", or fewer --eval.num-shards" if len(vectors) and flag == "--eval.index" else "")
        ) from error
    return index

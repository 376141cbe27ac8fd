"""The embedding model as MLflow serves it, from images to embeddings or packed binary codes. Does not need Ray.

MLflow calls `_load_pyfunc` with the code that was registered with the model (see `nsl_dist/tracking/models.py`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsl_dist.embedder import Embedder, load_embedder
from nsl_dist.retrieval.vector_files import pack_codes


class EmbeddingPyfunc:
    """The model that `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32] | NDArray[np.uint8]:
        """Embed images.

        Args:
            images: pandas DataFrame with a column "image" of encoded bytes or a column "path" of files.
            params: `{"binary": True}` returns binary codes.

        Returns:
            Unit vectors, float32 `[len(images), dim]`; or codes, uint8 `[len(images), ceil(dim / 8)]`.

        Raises:
            ValueError: both columns are missing, or an image cannot be decoded.

        """
        given = [name for name in ("image", "path") if name in images and not images[name].isna().any()]
        if not given:
            raise ValueError("give a column 'image' of encoded images as bytes, or 'path' of their files")
        vectors_ND = self._embedder(images[given[0]])
        return pack_codes(vectors_ND) if (params or {}).get("binary") else vectors_ND


def _load_pyfunc(path: str) -> EmbeddingPyfunc:
    return EmbeddingPyfunc(load_embedder(path))

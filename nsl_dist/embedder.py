"""The embedding model of a checkpoint: safetensors and a JSON description. Does not need Ray."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from nsl_dist import storage
from nsl_dist.config import DataConfig, ModelConfig, TrainConfig
from nsl_dist.data.images import MOST_PIXELS, decode
from nsl_dist.data.transforms import Normalise, eval_transform, least_pixels
from nsl_dist.model import EmbeddingModel, build_model
from nsl_dist.run import BEST, DESCRIPTION_FILE, MODEL_FILE

FORMAT_VERSION = 1


class Embedder:
    """Embeds images as unit vectors.

    Attributes:
        model: takes normalised images; in evaluation mode.
        network: takes uint8 images: normalisation, then the model.
        image_size: width and height of the model's input, in pixels.
        dim: embedding dimensions.

    """

    def __init__(self, model: EmbeddingModel, data: DataConfig, dim: int, device: torch.device) -> None:
        self.model = model.eval().to(device)
        self.network = nn.Sequential(Normalise().to(device), self.model)
        self.image_size = data.image_size
        self.dim = dim
        self._data = data
        self._device = device

    def __call__(self, images: Iterable[str | Path | bytes], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Embed images, given as paths or as encoded bytes (see `nsl_dist.data.images`).

        Returns:
            Unit vectors `[len(images), dim]`.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: an image cannot be decoded.

        """
        images = list(images)
        parts = [self._embed(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
        return np.concatenate([np.empty((0, self.dim), dtype=np.float32), *parts])

    def _embed(self, images: Sequence[str | Path | bytes]) -> NDArray[np.float32]:
        return self.embed(torch.stack([self.pixels(image) for image in images]))

    def pixels(self, image: str | Path | bytes, *, most_pixels: int = MOST_PIXELS) -> torch.Tensor:
        """Decode an image to the model's input: uint8 `[3, image_size, image_size]`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the image cannot be decoded, or has more than `most_pixels`.

        """
        try:
            encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
            image_CHW = decode(encoded, least=least_pixels(self._data), most_pixels=most_pixels)
            return eval_transform(image_CHW, self._data)
        except ValueError as error:
            raise ValueError(f"{'bytes' if isinstance(image, bytes) else image}: {error}") from error

    def embed(self, pixels_BCHW: torch.Tensor) -> NDArray[np.float32]:
        """Embed a stack of outputs of `pixels` as unit vectors `[B, dim]`."""
        with torch.inference_mode():
            embeddings_BD: NDArray[np.float32] = self.network(pixels_BCHW.to(self._device)).cpu().numpy()
        return embeddings_BD


def load_embedder(location: str, *, device: str | torch.device = "cpu") -> Embedder:
    """Load the model of a checkpoint.

    Args:
        location: folder or URI of a checkpoint, or of a run's `best`.
        device: device to embed on.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged or was written by another release.

    """
    config, data = read_description(location)
    model = build_model(config, seed=0, pretrained=False)
    load_weights(model, storage.read_bytes(storage.join(location, MODEL_FILE)), location=location)
    return Embedder(model, data, config.dim, torch.device(device))


def read_description(location: str) -> tuple[ModelConfig, DataConfig]:
    """Return the configuration of a checkpoint's model and of its input images.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged or was written by another release.

    """
    where = storage.join(location, DESCRIPTION_FILE)
    if not storage.exists(where):
        raise FileNotFoundError(f"{where} is missing: give a checkpoint, or `{BEST}` of an evaluated run")
    try:
        description = json.loads(storage.read_bytes(where))
        if description["version"] != FORMAT_VERSION:
            raise ValueError(f"version {description['version']}, this release reads {FORMAT_VERSION}")
        config = ModelConfig(**description["model"])
        data = DataConfig(image_size=description["image_size"], crop_ratio=description["crop_ratio"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is damaged, or of another release: {error}") from error
    return config, data


def describe(config: TrainConfig) -> bytes:
    """Return the JSON description from which the model of a run can be rebuilt."""
    description: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "model": dataclasses.asdict(config.model),
        "image_size": config.data.image_size,
        "crop_ratio": config.data.crop_ratio,
    }
    return json.dumps(description, indent=1).encode()


def weights_of(state: dict[str, torch.Tensor]) -> bytes:
    """Serialise a model's state as stored in `MODEL_FILE`."""
    return bytes(save({name: tensor.contiguous() for name, tensor in state.items()}))


def load_weights(model: EmbeddingModel, content: bytes, *, location: str) -> None:
    """Load the output of `weights_of` into a model.

    Raises:
        ValueError: the content is damaged or belongs to another model; the message names `location`.

    """
    try:
        model.load_state_dict(load(content))
    except SafetensorError as error:
        raise ValueError(f"{location}: the weights are damaged: {error}; copy them again") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{location}: the weights do not match the model description: {reason}; copy both again"
        ) from error

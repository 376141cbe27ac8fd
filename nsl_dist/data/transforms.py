"""Image preprocessing: resizing, augmentation and cropping on the CPU, normalisation on the device.

Letters in tensor names: B images, C = 3 colours, H and W pixels.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsl_dist.config import DataConfig

if TYPE_CHECKING:
    from nsl_dist.data.images import Least

FLOATS_AT_ONCE = 2**20
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize(image_CHW: Tensor, edge: int) -> Tensor:
    """Resize to `edge` x `edge` pixels with bilinear interpolation, ignoring the aspect ratio (paper, section 4.1)."""
    return F.interpolate(image_CHW[None], (edge, edge), mode="bilinear", antialias=True)[0]


def crop_draws(positions: range, config: DataConfig, *, seed: int, step: int) -> Tensor | None:
    """Return random numbers `[B, 4]` for `random_crop`, by position as in `augment`; None without `crop_area`."""
    if config.crop_area is None:
        return None
    draws = np.random.default_rng((seed, step, 1, 1)).random((config.batch_size, 4))
    return torch.from_numpy(draws[positions.start : positions.stop])


def random_crop(image_CHW: Tensor, draws_4: Tensor, config: DataConfig) -> Tensor:
    """Crop a random fraction of the area, from `config.crop_area` to 1, with a random aspect ratio, and resize it.

    Like torchvision's RandomResizedCrop, except that a side longer than the image is clipped instead of drawn again.

    Returns:
        uint8 `[3, image_size, image_size]`.

    """
    left, top = draws_4.tolist()[2:]
    height, width = image_CHW.shape[1:]
    crop_height, crop_width = _crop_size(draws_4, height, width, config)
    x, y = int(left * (width - crop_width + 1)), int(top * (height - crop_height + 1))
    return resize(image_CHW[:, y : y + crop_height, x : x + crop_width], config.image_size)


def _crop_size(draws_4: Tensor, height: int, width: int, config: DataConfig) -> tuple[int, int]:
    assert config.crop_area is not None
    area, ratio = draws_4.tolist()[:2]
    area = (config.crop_area + (1 - config.crop_area) * area) * height * width
    ratio = (3 / 4) ** (1 - 2 * ratio)
    crop_width = min(width, max(1, round(math.sqrt(area * ratio))))
    crop_height = min(height, max(1, round(math.sqrt(area / ratio))))
    return crop_height, crop_width


def least_pixels(config: DataConfig, draws_n4: Tensor | None = None) -> "Least":
    """Return what `decode` needs for an image not to be enlarged, when it is resized whole or to its random crops."""

    def least(height: int, width: int) -> tuple[float, float]:
        if draws_n4 is None:
            return config.resized_edge, config.resized_edge
        sizes = [_crop_size(draws_4, height, width, config) for draws_4 in draws_n4]
        return (
            config.image_size * height / min(crop_height for crop_height, _ in sizes),
            config.image_size * width / min(crop_width for _, crop_width in sizes),
        )

    return least


def eval_transform(image_CHW: Tensor, config: DataConfig) -> Tensor:
    """Resize and centre-crop to uint8 `[3, image_size, image_size]`."""
    size = config.image_size
    margin = (config.resized_edge - size) // 2
    return resize(image_CHW, config.resized_edge)[:, margin : margin + size, margin : margin + size]


def augment(resized_BCHW: Tensor, positions: range, config: DataConfig, *, seed: int, step: int) -> Tensor:
    """Randomly crop, mirror, rotate, scale and shear images in a single resampling.

    The augmentation of an image depends only on (seed, step, position), not on the number of workers.

    Args:
        resized_BCHW: uint8 images of `config.resized_edge` squared, or crops of `config.image_size` squared.
        positions: positions of the images in the global batch.
        config: strength of each augmentation.
        seed: seed of the run.
        step: step of the batch.

    Returns:
        uint8 `[B, 3, image_size, image_size]`.

    """
    # 7 draws per position; the extra word in the seed makes them differ from the plan's draws.
    draws = np.random.default_rng((seed, step, 1)).random((config.batch_size, 7))[positions.start : positions.stop]
    left, top, mirror, angle, scale, shear_x, shear_y = torch.from_numpy(draws).float().T
    edge, size = resized_BCHW.shape[-1], config.image_size
    left, top = [(u * (edge - size + 1)).floor() for u in (left, top)]
    flip = torch.where(mirror < 0.5, -1.0, 1.0) if config.flip else torch.ones_like(mirror)

    if config.rotation == config.scale == config.shear == 0:
        crops = []
        for image, x, y, f in zip(resized_BCHW, left.int().tolist(), top.int().tolist(), flip.tolist(), strict=True):
            crop = image[:, y : y + size, x : x + size]
            crops.append(crop.flip(2) if f < 0 else crop)
        return torch.stack(crops)

    def symmetric(u: Tensor, bound: float) -> Tensor:
        return (2 * u - 1) * bound

    angle = torch.deg2rad(symmetric(angle, config.rotation))
    shear_x = torch.tan(torch.deg2rad(symmetric(shear_x, config.shear)))
    shear_y = torch.tan(torch.deg2rad(symmetric(shear_y, config.shear)))
    zoom = (1 + symmetric(scale, config.scale)) * size / edge
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # Maps output to input coordinates, both in [-1, 1]: crop offset, then rotation x shear, then mirroring.
    offset_x, offset_y = (2 * left + size - edge) / edge, (2 * top + size - edge) / edge
    matrix_B23 = torch.stack(
        [
            torch.stack([(cos - sin * shear_y) * flip, cos * shear_x - sin, offset_x], dim=1),
            torch.stack([(sin + cos * shear_y) * flip, sin * shear_x + cos, offset_y], dim=1),
        ],
        dim=1,
    )
    images_BCHW = torch.empty(len(resized_BCHW), 3, size, size, dtype=torch.uint8)
    # A few at a time: allocating floats for a whole batch costs as much as processing them.
    at_once = max(1, FLOATS_AT_ONCE // (3 * edge**2))
    parts = (each.split(at_once) for each in (resized_BCHW, matrix_B23, images_BCHW))
    for resized, matrix, images in zip(*parts, strict=True):
        grid = F.affine_grid(matrix, [len(resized), 3, size, size], align_corners=False)
        sampled = F.grid_sample(resized.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        images.copy_(sampled.round_())
    return images_BCHW


class Normalise(nn.Module):
    """Normalises uint8 images by ImageNet's mean and standard deviation, to float32."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Made once: making them on a GPU in every step would wait for it.
        self.register_buffer("mean_C11", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalise, keeping shape, device and memory format."""
        return images_BCHW.float().div_(255).sub_(self.mean_C11).div_(self.std_C11)

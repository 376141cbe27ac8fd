import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsl_dist.config import DataConfig
from nsl_dist.data.images import decode
from nsl_dist.data.transforms import (
    Normalise,
    augment,
    crop_draws,
    eval_transform,
    least_pixels,
    random_crop,
    resize,
)
from tests.support.images import encode

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(np.kron(RNG.integers(0, 255, (6, 5, 3)), np.ones((8, 8, 1))), dtype=np.uint8)


def test_decodes_formats_and_grayscale() -> None:
    assert decode(encode(SMOOTH, "PNG")).permute(1, 2, 0).numpy().tolist() == SMOOTH.tolist()
    gray = decode(encode(SMOOTH[..., 0]))
    assert gray.shape == (3, 48, 40)
    assert (gray[0] == gray[2]).all()
    assert (decode(encode(SMOOTH)).permute(1, 2, 0).int() - torch.from_numpy(SMOOTH).int()).abs().float().mean() < 12


@pytest.mark.parametrize("broken", [b"", b"no image", encode(SMOOTH)[:400], encode(SMOOTH, "PNG")[:100]])
def test_broken_images_are_refused(broken: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode(broken)


@pytest.mark.parametrize(
    "config",
    [DataConfig(image_size=28, flip=True), DataConfig(image_size=28, flip=True, rotation=20, scale=0.2, shear=10)],
)
def test_augmentation_does_not_depend_on_the_number_of_workers(config: DataConfig) -> None:
    images = torch.stack([resize(decode(encode(SMOOTH)), config.resized_edge)] * 80)
    whole = augment(images, range(80), config, seed=1, step=2)
    parts = [augment(images[p.start : p.stop], p, config, seed=1, step=2) for p in (range(40), range(40, 80))]
    assert whole.shape == (80, 3, 28, 28)
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, augment(images, range(80), config, seed=1, step=3))


def test_random_crops_do_not_depend_on_the_number_of_workers() -> None:
    config = DataConfig(image_size=28, crop_area=0.16)
    ramp = torch.arange(120, dtype=torch.uint8).repeat(90, 1)[None].repeat(3, 1, 1)  # its pixels say where they were
    draws = crop_draws(range(80), config, seed=1, step=2)
    assert draws is not None
    crops = torch.stack([random_crop(ramp, each, config) for each in draws])
    second_half = crop_draws(range(40, 80), config, seed=1, step=2)
    assert second_half is not None
    assert torch.equal(random_crop(ramp, second_half[0], config), crops[40])
    images = augment(crops, range(80), config, seed=1, step=2)
    assert images.shape == (80, 3, 28, 28)
    assert all(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for image, crop in zip(images, crops))  # noqa: B905
    widths = (crops[:, 0, 0, -1].int() - crops[:, 0, 0, 0].int()) / 120  # shares of the ramp, less than a pixel's
    assert 0.3 < widths.min() < 0.5  # sqrt(0.16 x 3/4), at the image's own ratio of 4/3 less
    assert 0.85 < widths.max() <= 1
    assert crops[:, 0, 0, 0].min() < 10


@pytest.mark.parametrize("size", [(768, 1024), (1024, 768)])
def test_crops_of_a_smaller_image_are_those_of_the_whole(size: tuple[int, int]) -> None:
    config = DataConfig(image_size=72, crop_area=0.16)
    height, width = size
    smooth = torch.from_numpy(SMOOTH).permute(2, 0, 1)[None].float()
    photo = F.interpolate(smooth, size, mode="bicubic").clamp(0, 255).byte()[0]
    content = encode(photo.permute(1, 2, 0).numpy(), quality=95)
    draws = crop_draws(range(20), config, seed=1, step=2)
    assert draws is not None
    shapes = set()
    for each in draws:
        smaller = decode(content, least=least_pixels(config, each[None]))
        shapes.add(smaller.shape[1])
        difference = random_crop(smaller, each, config).int() - random_crop(photo, each, config).int()
        assert difference.abs().float().mean() < 10  # borders are rounded to pixels; another crop differs by 30 or more
    assert shapes == {height // 8, height // 4}
    need_height, need_width = least_pixels(config, draws)(height, width)
    assert need_height == max(least_pixels(config, each[None])(height, width)[0] for each in draws)
    assert need_width == max(least_pixels(config, each[None])(height, width)[1] for each in draws)
    whole = resize(decode(content, least=least_pixels(DataConfig(image_size=90, crop_ratio=1.0))), 90)
    assert (whole.int() - resize(photo, 90).int()).abs().float().mean() < 3


def test_a_whole_crop_is_the_image() -> None:
    config = DataConfig(image_size=28, crop_area=1.0)
    square = decode(encode(SMOOTH))[:, :40, :40]
    assert torch.equal(random_crop(square, torch.tensor([0.3, 0.5, 0.2, 0.9]), config), resize(square, 28))


def test_both_ways_of_cropping_agree() -> None:
    """A rotation too small to move a pixel takes the resampling path; it must give the plain crops and mirrors."""
    plain = DataConfig(image_size=28, batch_size=20)
    tiny = DataConfig(image_size=28, batch_size=20, rotation=1e-4)
    images = torch.stack([resize(decode(encode(SMOOTH)), plain.resized_edge)] * 20)
    crops, sampled = (augment(images, range(20), config, seed=0, step=0) for config in (plain, tiny))
    assert (crops.int() - sampled.int()).abs().max() <= 1


def test_eval_takes_the_centre() -> None:
    config = DataConfig(image_size=28)
    whole = resize(decode(encode(SMOOTH)), 32)
    assert torch.equal(eval_transform(decode(encode(SMOOTH)), config), whole[:, 2:30, 2:30])


def test_normalise() -> None:
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    torch.testing.assert_close(Normalise()(pixels)[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.64]), atol=1e-4, rtol=0)

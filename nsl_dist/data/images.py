"""Decoding of images. Everything that this project sees of an image, it sees through `decode`.

Images come from users' folders and from clients of the search service, so that any bytes may come: each failure is a
ValueError with the reason, and large images are refused before they are decoded.
"""

import functools
import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from nsl_dist.config import REENCODED_QUALITY

# Formats of Pillow. Others, such as EPS, hand their content to programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
SHOWN_BY_BROWSERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
BROWSER_EDGE = 2048  # of images that are converted for them, pixels
MOST_PIXELS = 178_956_970  # as Pillow's own limit
# Divisors of a JPEG's width and height that libjpeg-turbo is fast to decode to: it skips the rest of each 8 x 8 block.
SHRINKS = (8, 4, 2)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")
# What the orientation of EXIF asks for: quarter turns counterclockwise of the image, mirrored first or not.
TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}


# Given height and width of an upright image, returns the fewest pixels of each that will do.
Least = Callable[[int, int], tuple[float, float]]


def decode(encoded: bytes, *, least: Least | None = None, most_pixels: int = MOST_PIXELS) -> Tensor:
    """Decode an image in one of `FORMATS` to RGB, upright as its EXIF orientation says, as browsers show it.

    Transparent pixels are white, 16 bits are reduced to 8, and of an animation the first frame counts. HEIF needs the
    extra `heif`.

    Args:
        encoded: content of a file.
        least: a JPEG is decoded to a half, a quarter or an eighth of its size if that is enough, which takes a fraction
            of the time; None: always to its full size.
        most_pixels: the most that an image may have.

    Returns:
        uint8 `[3, H, W]`.

    Raises:
        ValueError: the bytes are not a complete image in one of the formats, or it has more than `most_pixels`.

    """
    try:
        pixels_HWC = _pixels(encoded, least, most_pixels)
    except Exception as error:  # decoders raise anything on damaged bytes: SyntaxError, struct.error, MemoryError
        raise ValueError(_reason(error)) from error
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def thumbnail(encoded: bytes, edge: int, *, quality: int) -> bytes:
    """Return an image as a JPEG of at most `edge` x `edge` pixels.

    Raises:
        ValueError: see `decode`.

    """
    return _fitted_jpeg(decode(encoded, least=_fitting(edge)), edge, quality=quality)


def reencoded(encoded: bytes, max_edge: int | None) -> bytes | None:
    """Decode an image, and return it as a smaller JPEG if a side is longer than `max_edge`, otherwise None.

    Raises:
        ValueError: see `decode`.

    """
    if max_edge is None:
        decode(encoded)
        return None
    image_CHW = decode(encoded, least=_fitting(max_edge + 1))  # so that a larger image stays larger
    if max(image_CHW.shape) <= max_edge:
        return None
    return _fitted_jpeg(image_CHW, max_edge, quality=REENCODED_QUALITY)


def _fitting(edge: int) -> Least:
    """Return the size of an image that just fits into `edge` x `edge` pixels."""
    return lambda height, width: (edge * height / max(height, width), edge * width / max(height, width))


def _fitted_jpeg(image_CHW: Tensor, edge: int, *, quality: int) -> bytes:
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    image.thumbnail((edge, edge))
    small = io.BytesIO()
    image.save(small, "JPEG", quality=quality)
    return small.getvalue()


def for_browsers(encoded: bytes) -> tuple[bytes, str]:
    """Return an image and its media type: as it is if browsers show its format, else as a JPEG.

    Raises:
        ValueError: see `decode`.

    """
    kind = str(_open(encoded).format)
    if kind in SHOWN_BY_BROWSERS:
        return encoded, Image.MIME[kind]
    return thumbnail(encoded, BROWSER_EDGE, quality=90), "image/jpeg"


def _refuse_too_large(height: int, width: int, most_pixels: int) -> None:
    if height * width > most_pixels:
        raise ValueError(f"{width:,} x {height:,} pixels are too many: {most_pixels:,} is the most")


def _pixels(encoded: bytes, least: Least | None, most_pixels: int) -> NDArray[np.uint8]:
    turns, mirrored = TURNS.get(_orientation(encoded), (0, False))
    if (size := _size_of_jpeg(encoded)) is None:
        image = _open(encoded)
        _refuse_too_large(image.height, image.width, most_pixels)
        pixels_HWC = _rgb(image)
    else:
        _refuse_too_large(*size, most_pixels)
        upright = size if turns % 2 == 0 else size[::-1]
        shrink = 1 if least is None else _shrink(upright, least(*upright))
        height, width = (math.ceil(each / shrink) for each in size)
        pixels_HWC = simplejpeg.decode_jpeg(encoded, colorspace="RGB", min_height=height, min_width=width)
    if mirrored:
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels_HWC, turns))


def _size_of_jpeg(encoded: bytes) -> tuple[int, int] | None:
    """Return height and width as they are stored; None if simplejpeg cannot decode the image."""
    # simplejpeg is as fast as torchvision, whose import takes each decoding process twice as long as that of torch.
    if not simplejpeg.is_jpeg(encoded):
        return None
    height, width, colours = simplejpeg.decode_jpeg_header(encoded)[:3]
    return None if colours in ("CMYK", "YCCK") else (height, width)


def _shrink(size: tuple[int, int], least: tuple[float, float]) -> int:
    """Return the largest divisor of an image's height and width that leaves at least `least` of both."""
    return next((each for each in SHRINKS if size[0] >= each * least[0] and size[1] >= each * least[1]), 1)


def _open(encoded: bytes) -> Image.Image:
    Image.init()  # else Pillow knows only the most frequent formats
    if encoded[4:8] == b"ftyp" and encoded[8:12] in HEIF_BRANDS:
        _register_heif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
        try:
            return Image.open(io.BytesIO(encoded), formats=[each for each in FORMATS if each in Image.OPEN])
        except UnidentifiedImageError:
            raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}") from None


@functools.cache
def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError("HEIF images need the extra heif: pip install 'nsl_dist[heif]'") from None
    register_heif_opener()


def _orientation(encoded: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1 is upright, also where the EXIF data are damaged."""
    if simplejpeg.is_jpeg(encoded) and encoded.find(b"Exif\0\0", 0, 2**17) < 0:
        return 1  # most photos of data sets; asking Pillow would take a tenth of the decoding
    try:
        image = _open(encoded)
        # Pillow turns TIFFs itself.
        return 1 if image.format == "TIFF" else int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (ValueError, SyntaxError, TypeError, OSError):
        return 1  # as browsers show it


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        grey_HW = (np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _reason(error: Exception) -> str:
    return (str(error).removeprefix("bytes: ") or type(error).__name__).splitlines()[0][:200]

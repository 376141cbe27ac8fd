"""Decoding of images. Everything that this project sees of an image, it sees through `decode`.

Images come from users' folders and from clients of the search service, so that any bytes may come: each failure is a
ValueError with the reason, and large images are refused before they are decoded.
"""

import functools
import io
import warnings

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

# Formats of Pillow. Others, such as EPS, hand their content to programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
SHOWN_BY_BROWSERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
BROWSER_EDGE = 2048  # of images that are converted for them, pixels
MOST_PIXELS = 178_956_970  # as Pillow's own limit
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")
# What the orientation of EXIF asks for: quarter turns counterclockwise of the image, mirrored first or not.
TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}


def decode(encoded: bytes, *, most_pixels: int = MOST_PIXELS) -> Tensor:
    """Decode an image in one of `FORMATS` to RGB, upright as its EXIF orientation says, as browsers show it.

    Transparent pixels are white, 16 bits are reduced to 8, and of an animation the first frame counts. HEIF needs the
    extra `heif`.

    Returns:
        uint8 `[3, H, W]`.

    Raises:
        ValueError: the bytes are not a complete image in one of the formats, or it has more than `most_pixels`.

    """
    try:
        _refuse_too_large(*_size_of(encoded), most_pixels)
        pixels_HWC = _pixels(encoded)
    except Exception as error:  # decoders raise anything on damaged bytes: SyntaxError, struct.error, MemoryError
        raise ValueError(_reason(error)) from error
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def thumbnail(encoded: bytes, edge: int, *, quality: int) -> bytes:
    """Return an image as a JPEG of at most `edge` x `edge` pixels.

    Raises:
        ValueError: see `decode`.

    """
    image = Image.fromarray(decode(encoded).permute(1, 2, 0).numpy())
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


def _size_of(encoded: bytes) -> tuple[int, int]:
    """Return height and width as they are stored."""
    if _is_fast(encoded):
        height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
    else:
        width, height = _open(encoded).size
    return height, width


def _refuse_too_large(height: int, width: int, most_pixels: int) -> None:
    if height * width > most_pixels:
        raise ValueError(f"{width:,} x {height:,} pixels are too many: {most_pixels:,} is the most")


def _pixels(encoded: bytes) -> NDArray[np.uint8]:
    pixels_HWC = simplejpeg.decode_jpeg(encoded, colorspace="RGB") if _is_fast(encoded) else _rgb(_open(encoded))
    turns, mirrored = TURNS.get(_orientation(encoded), (0, False))
    if mirrored:
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels_HWC, turns))


def _is_fast(encoded: bytes) -> bool:
    # simplejpeg is as fast as torchvision, whose import takes each decoding process twice as long as that of torch.
    return simplejpeg.is_jpeg(encoded) and simplejpeg.decode_jpeg_header(encoded)[2] not in ("CMYK", "YCCK")


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

"""Images of every format and kind, upright and as RGB; damaged ones are refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from nsl_dist.data.images import FORMATS, decode, for_browsers, reencoded, thumbnail

HEIGHT, WIDTH = 24, 40


def scene() -> Image.Image:
    """An image that no turn or mirror maps to itself."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 2], axis=2).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def difference(content: bytes, expected: Image.Image) -> float:
    pixels = decode(content).permute(1, 2, 0).numpy().astype(float)
    return float(np.abs(pixels - np.asarray(expected.convert("RGB"), float)).mean())


UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = scene() if orientation == 1 else scene().transpose(UNDO[orientation])
    content = encoded(stored, kind, exif=exif)
    assert decode(content).shape == (3, HEIGHT, WIDTH)
    assert difference(content, scene()) < 4


def test_damaged_exif_leaves_an_image_as_it_is() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = encoded(scene(), "JPEG", exif=exif)
    start = content.index(b"Exif\0\0") + 6
    assert difference(content[:start] + b"\xff" * 8 + content[start + 8 :], scene()) < 4


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("AVIF", "HEIF")])
def test_formats(kind: str) -> None:
    assert difference(encoded(scene(), kind), scene()) < (6 if kind == "GIF" else 4)


def test_heif() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="no pillow-heif: install the extra heif")
    pillow_heif.register_heif_opener()
    assert difference(encoded(scene(), "HEIF", quality=95), scene()) < 4


def test_transparent_pixels_are_white() -> None:
    image = scene().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    for kind in ("PNG", "WEBP"):
        assert decode(encoded(image, kind)).min() == 255
    palette = scene().convert("P")
    content = encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))
    assert decode(content)[:, 0, 0].tolist() == [255] * 3


def test_sixteen_bits() -> None:
    levels = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 60
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(levels), kind))
        for channel in pixels:
            np.testing.assert_array_equal(channel, levels >> 8)


def test_cmyk_palettes_and_bilevel_images() -> None:
    assert difference(encoded(scene().convert("CMYK"), "JPEG"), scene()) < 4
    for image in (scene().convert("P"), scene().convert("1"), scene().convert("LA")):
        assert difference(encoded(image, "PNG"), image) == 0


def test_the_first_frame_of_an_animation() -> None:
    frames = [scene(), scene().transpose(Image.Transpose.ROTATE_180)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert difference(content, scene()) < 1


def test_thumbnails_are_upright() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    small = Image.open(io.BytesIO(thumbnail(encoded(scene().transpose(UNDO[6]), "JPEG", exif=exif), 20, quality=90)))
    assert small.size == (20, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_decoded_to_no_more_than_is_needed(orientation: int) -> None:
    large = scene().resize((8 * WIDTH, 8 * HEIGHT))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = large if orientation == 1 else large.transpose(UNDO[orientation])
    content = encoded(stored, "JPEG", exif=exif, quality=95)
    asked_of = []

    def decoded(*least: int) -> np.ndarray:
        def needed(*size: int) -> tuple[float, float]:
            asked_of.append(size)
            return least[0], least[1]

        return decode(content, least=needed).numpy().astype(float)

    h, w = HEIGHT, WIDTH
    few, some, many, most = (h, w), (h, w + 1), (4 * h, 1), (4 * h + 1, 1)
    for shrink, least in ((8, few), (4, some), (2, many), (1, most)):
        pixels = decoded(*least)
        expected = np.asarray(large.reduce(shrink), float).transpose(2, 0, 1)
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).mean() < 2
    assert set(asked_of) == {(8 * HEIGHT, 8 * WIDTH)}
    assert decode(encoded(large, "PNG"), least=lambda _height, _width: (1, 1)).shape == (3, 8 * HEIGHT, 8 * WIDTH)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_only_larger_images_are_reencoded(kind: str) -> None:
    content = encoded(scene().resize((320, 192)), kind)
    assert reencoded(content, None) is None
    assert reencoded(content, 320) is None
    for max_edge, size in ((319, (319, 191)), (160, (160, 96)), (100, (100, 60))):
        smaller = Image.open(io.BytesIO(reencoded(content, max_edge) or b""))
        assert (smaller.format, smaller.size) == ("JPEG", size)
        assert np.abs(np.asarray(smaller, float) - np.asarray(scene().resize(size), float)).mean() < 6
    with pytest.raises(ValueError, match=r"."):
        reencoded(content[: len(content) // 2], 100)


def test_browsers_get_what_they_show() -> None:
    for kind in ("JPEG", "PNG", "AVIF"):
        assert for_browsers(encoded(scene(), kind)) == (encoded(scene(), kind), f"image/{kind.lower()}")
    for kind in ("TIFF", "PPM"):
        content, media_type = for_browsers(encoded(scene(), kind))
        assert media_type == "image/jpeg"
        assert Image.open(io.BytesIO(content)).size == (WIDTH, HEIGHT)


def bomb() -> bytes:
    """A PNG whose header asks for 14 GiB."""
    header = struct.pack(">IIBBBBB", 70_000, 70_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_bomb() -> bytes:
    content = bytearray(encoded(scene(), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image in one of the formats JPEG, PNG"),
        (b"hello", "not an image in one of the formats JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in one of the formats"),
        (encoded(scene(), "JPEG")[:500], "."),
        (encoded(scene(), "PNG")[:60], "."),
        (bomb(), "pixels"),
        (jpeg_bomb(), "65,500 x 65,500 pixels are too many: 178,956,970 is the most"),
    ],
    ids=["empty", "text", "eps", "half a JPEG", "half a PNG", "PNG bomb", "JPEG bomb"],
)
def test_what_is_no_image_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(content)


def test_a_limit_of_pixels() -> None:
    content = encoded(scene(), "JPEG")
    assert decode(content, most_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="40 x 24 pixels are too many: 959 is the most"):
        decode(content, most_pixels=HEIGHT * WIDTH - 1)

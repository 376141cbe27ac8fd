"""A folder of photos as people have them, in every format and with everything that goes wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import ExifTags, Image

CLASSES = [
    "Äpfel", "rote Grütze", "🍌", "Fruit/Kiwi", "Fruit/Citrus/Lemon", "Milk 1,5%", "Bread", "Cheese", "Eggs", "Rice",
    "Tea", "Soap",
]  # fmt: skip
PER_CLASS = 18
HEIGHT, WIDTH = 48, 64


def photo(class_number: int, number: int) -> Image.Image:
    """A picture in the pattern and colours of its class, lit differently each time."""
    rng = np.random.default_rng((class_number, number))
    colours = np.random.default_rng(class_number).integers(40, 215, (2, 3))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    stripes = ((x * (class_number % 3) + y * (class_number % 4 + 1)) // 8 % 2)[..., None]
    pixels = np.where(stripes, colours[0], colours[1]) * rng.uniform(0.7, 1.2) + rng.normal(0, 8, (HEIGHT, WIDTH, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_own_photos(root: Path) -> None:
    """Write 12 classes of photos, and beside them what the constants below say."""
    pillow_heif.register_heif_opener()
    for class_number, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(PER_CLASS):
            photo(class_number, number).save(folder / f"IMG {number:02}.jpg", quality=90)

    apples, bread = root / "Äpfel", root / "Bread"
    _replace(apples, 0, "png", photo(0, 0).convert("RGBA"))
    _replace(apples, 1, "jpg", photo(0, 1).convert("CMYK"))
    _replace(apples, 2, "png", Image.fromarray(np.asarray(photo(0, 2).convert("L"), dtype=np.uint16) * 257))
    _replace(apples, 3, "gif", photo(0, 3).convert("P"))
    _replace(apples, 4, "gif", photo(0, 4), save_all=True, append_images=[photo(1, 4)])
    _replace(apples, 5, "heic", photo(0, 5))
    _replace(apples, 6, "avif", photo(0, 6))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        _replace(apples, 9 + orientation, "jpg", photo(0, 9 + orientation), exif=exif)

    (bread / "IMG 00.jpg").write_bytes((bread / "IMG 00.jpg").read_bytes()[:600])
    (bread / "IMG 01.jpg").write_bytes(b"")
    (bread / "IMG 02.jpg").write_bytes((bread / "IMG 03.jpg").read_bytes())
    (root / "Cheese" / "IMG 05.jpg").write_bytes((root / "Rice" / "IMG 05.jpg").read_bytes())
    (root / "Tea" / "link.jpg").symlink_to(root / "Tea" / "IMG 00.jpg")
    (root / "Tea" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "Empty").mkdir()
    (root / "Soap" / "notes.txt").write_text("bought in March")
    (root / "Soap" / "Thumbs.db").write_bytes(b"\0")
    photo(0, 99).save(root / "of no class.jpg")


def _replace(folder: Path, number: int, ending: str, image: Image.Image, **options: Any) -> None:
    (folder / f"IMG {number:02}.jpg").unlink()
    image.save(folder / f"IMG {number:02}.{ending}", **options)


# Of `Manifest`: what the folder holds, to the file.
USED = 12 * PER_CLASS - 2 + 1  # two are broken; a link is an image of its own
UNDECODABLE = {"Bread/IMG 00.jpg", "Bread/IMG 01.jpg"}
DUPLICATES = [
    ["Bread/IMG 02.jpg", "Bread/IMG 03.jpg"],
    ["Cheese/IMG 05.jpg", "Rice/IMG 05.jpg"],
    ["Tea/IMG 00.jpg", "Tea/link.jpg"],
]
UNUSED = {
    ".db": ["Soap/Thumbs.db"], ".jpg": ["of no class.jpg"], ".txt": ["Soap/notes.txt"], "broken links": ["Tea/gone.jpg"]
}  # fmt: skip
EMPTY_FOLDERS = ["Empty"]

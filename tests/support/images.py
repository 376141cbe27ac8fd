"""Small data sets in each layout, of noisy images in the colour of their class."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    """Encode an image."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def write_sop(root: Path, sizes: dict[str, list[int]], *, edge: int = 24, seed: int = 0) -> Path:
    """Write a small data set in the SOP layout: noisy images of one colour a class, some of them grayscale."""
    rng = np.random.default_rng(seed)
    image_id = class_id = 0
    for split, name in (("train", "Ebay_train.txt"), ("test", "Ebay_test.txt")):
        lines = ["image_id class_id super_class_id path"]
        for size in sizes[split]:
            class_id += 1
            colour = rng.integers(40, 215, 3)
            for _ in range(size):
                image_id += 1
                pixels = np.clip(colour + rng.normal(0, 12, (edge, edge, 3)), 0, 255).astype(np.uint8)
                pixels = pixels[..., 0] if image_id % 7 == 0 else pixels
                path = root / "thing_final" / f"{class_id}_{image_id}.JPG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(pixels))
                lines.append(f"{image_id} {class_id} 1 thing_final/{path.name}")
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def write_image(path: Path, class_number: int, image_number: int, *, edge: int = 24) -> None:
    """Write a noisy image in the colour of its class, every fifth one grayscale."""
    rng = np.random.default_rng((class_number, image_number))
    colour = np.random.default_rng(class_number).integers(40, 215, 3)
    pixels = np.clip(colour + rng.normal(0, 12, (edge, edge, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels[..., 0] if image_number % 5 == 0 else pixels))


def write_inshop(root: Path, *, train: list[int], query: list[int], gallery: list[int]) -> Path:
    """Write a small In-Shop data set: a count, a padded header and padded columns; sizes by class."""
    rows = []
    for split, sizes in (("train", train), ("query", query), ("gallery", gallery)):
        for number, size in enumerate(sizes, start=0 if split == "train" else len(train)):
            item = f"id_{number + 1:08d}"
            for image in range(size):
                name = f"img/WOMEN/Dresses/{item}/{split}_{image:02d}_1_front.{'JPG' if image == 1 else 'jpg'}"
                write_image(root / name, number, image + 10 * len(split))
                rows.append(f"{name:<72}{item:<16}{split}")
    lines = [str(len(rows)), f"{'image_name':<72}{'item_id':<16}evaluation_status", *rows]
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return root


def write_cub200(root: Path, sizes: list[int]) -> Path:
    """Write a small CUB-200-2011 data set: images numbered from 1 over classes numbered from 1."""
    images: list[str] = []
    labels: list[str] = []
    classes = []
    for number, size in enumerate(sizes, start=1):
        classes.append(f"{number} {number:03d}.Bird_{number}")
        for image in range(size):
            name = f"{number:03d}.Bird_{number}/Bird_{image:04d}.{'JPG' if image == 1 else 'jpg'}"
            write_image(root / "images" / name, number, image)
            images.append(f"{len(images) + 1} {name}")
            labels.append(f"{len(labels) + 1} {number}")
    for name, lines in (("images", images), ("image_class_labels", labels), ("classes", classes)):
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_cars196(root: Path, sizes: list[int]) -> Path:
    """Write a small CARS196 data set: a MATLAB struct array with classes from 1 and a `test` field of another split."""
    from scipy.io import savemat

    fields = [("relative_im_path", object), ("bbox_x1", object), ("class", object), ("test", object)]
    rows: list[tuple[str, int, int, int]] = []
    for number, size in enumerate(sizes, start=1):
        for image in range(size):
            name = f"car_ims/{len(rows) + 1:06d}.jpg"
            write_image(root / name, number, image)
            rows.append((name, 1, number, image % 2))
    names = np.array([f"Maker Model {number}" for number in range(1, len(sizes) + 1)], dtype=object)
    savemat(root / "cars_annos.mat", {"annotations": np.array([rows], dtype=fields), "class_names": names[None]})
    return root


def write_folders(root: Path, sizes: list[int]) -> Path:
    """Write a folder of images for each class, some with upper-case endings, beside other files."""
    for number, size in enumerate(sizes, start=1):
        for image in range(size):
            write_image(root / f"thing {number}" / f"{image}.{'JPEG' if image == 1 else 'png'}", number, image)
    (root / "README.txt").write_text("not an image")
    (root / "thing 1" / "notes.txt").write_text("not an image")
    return root

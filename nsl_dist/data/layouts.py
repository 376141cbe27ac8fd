"""Readers for the official layouts of data sets, one function per layout.

A record holds an image's split, class and path. Splits are "train" and either "test", in which every image queries the
others, or "query" and "gallery".
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, get_args

import pyarrow as pa
from pyarrow import fs

from nsl_dist import storage
from nsl_dist.config import Layout

RECORDS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("class_id", pa.string()),
        ("image_id", pa.int64()),
        ("path", pa.string()),  # relative to the root
        ("num_bytes", pa.int64()),
    ]
)

SOP_SPLITS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
SOP_HEADER = "image_id class_id super_class_id path"
INSHOP_LIST = "list_eval_partition.txt"
INSHOP_HEADER = "image_name item_id evaluation_status"
CUB_FILES = ("images.txt", "image_class_labels.txt", "classes.txt")
CARS_FILE = "cars_annos.mat"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class _Row:
    """One image as listed in a split file.

    Attributes:
        split: "train", "test", "query" or "gallery".
        class_id: name of the class in the data set.
        class_order: sort key of the class.
        image_id: the data set's own number, or the position in the list.
        path: relative to the root.
        where: where this was read, for error messages: "file:line".

    """

    split: str
    class_id: str
    class_order: Any
    image_id: int
    path: str
    where: str


def recognise(root: str) -> Layout:
    """Detect the layout of a raw folder from its files.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no layout or more than one fits.

    """
    if not storage.exists(root):
        raise FileNotFoundError(
            f"no such folder: {root}; set --data.root (or --root) to the unpacked data set or to shards written by "
            "jobs/prepare_shards.py"
        )
    if (layout := official_layout(root)) is not None:
        return layout
    filesystem, path = storage.resolve(root)
    if any(info.type == fs.FileType.Directory for info in filesystem.get_file_info(fs.FileSelector(path))):
        return "folders"
    raise ValueError(
        f"{root} holds neither shards (manifest.json) nor a known layout: Stanford Online Products "
        f"({', '.join(SOP_SPLITS.values())}), In-Shop ({INSHOP_LIST}), CUB-200-2011 ({', '.join(CUB_FILES)}), CARS196 "
        f"({CARS_FILE}), or one folder of images per class; set --data.root (or --root) to one of them"
    )


def official_layout(root: str) -> Layout | None:
    """Return the layout of a folder with the files of a published data set, or None for any other folder.

    Raises:
        ValueError: the folder holds files of more than one data set.

    """
    markers: dict[Layout, tuple[str, ...]] = {
        "sop": tuple(SOP_SPLITS.values()),
        "inshop": (INSHOP_LIST,),
        "cub200": ("image_class_labels.txt",),
        "cars196": (CARS_FILE,),
    }
    found: list[Layout] = [
        layout for layout, names in markers.items() if any(storage.exists(storage.join(root, name)) for name in names)
    ]
    if len(found) > 1:
        raise ValueError(f"{root} holds files of more than one layout: {', '.join(found)}; say which with --layout")
    return found[0] if found else None


def read_records(root: str, *, layout: Layout) -> pa.Table:
    """Read the records of a raw data set.

    Returns:
        Records with `RECORDS_SCHEMA`, ordered by split, class and image.

    Raises:
        FileNotFoundError: the folder, a split file or an image is missing.
        ValueError: a row is malformed, an image is listed twice, a class is in both training and test split, or a split
            is empty.

    """
    if not storage.exists(root):
        raise FileNotFoundError(f"no such folder: {root}; set --data.root (or --root) to the unpacked data set")
    sizes = _file_sizes(root)
    rows = _READERS[layout](root, sizes)
    _reject_shared_classes(rows)
    missing = [row for row in rows if row.path not in sizes]
    if missing:
        raise FileNotFoundError(
            f"{missing[0].where}: image {missing[0].path} does not exist below {root} ({len(missing)} of {len(rows)} "
            "images are missing); unpack the whole archive or remove these rows from the list"
        )
    return _table(rows, sizes)


def read_catalogue(root: str) -> pa.Table:
    """Read the records of a folder of images to be searched, not trained on.

    The class of an image is its top-level folder. Images directly in the root are each a class of their own, named
    after the file.

    Returns:
        Records of the split "test", with `RECORDS_SCHEMA`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it contains no images.

    """
    if not storage.exists(root):
        raise FileNotFoundError(f"no such folder: {root}; give a folder of images or shards")
    sizes = _file_sizes(root)
    paths = sorted(path for path in sizes if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"{root} contains no images (files ending in {', '.join(sorted(IMAGE_SUFFIXES))}); give a folder of images "
            "or shards"
        )
    names = [PurePosixPath(path).parts[0] for path in paths]
    rows = [
        _Row("test", name, name, number, path, storage.join(root, path))
        for number, (name, path) in enumerate(zip(names, paths, strict=True), start=1)
    ]
    return _table(rows, sizes)


def _table(rows: list[_Row], sizes: dict[str, int]) -> pa.Table:
    rows.sort(key=lambda row: (row.split, row.class_order, row.image_id))
    columns: list[list[Any]] = [
        [row.split for row in rows],
        [row.class_id for row in rows],
        [row.image_id for row in rows],
        [row.path for row in rows],
        [sizes[row.path] for row in rows],
    ]
    return pa.table([pa.array(column) for column in columns], schema=RECORDS_SCHEMA)


def _read_sop(root: str, _sizes: dict[str, int]) -> list[_Row]:
    """Read Stanford Online Products: two split files, and images in class folders."""
    rows: list[_Row] = []
    for split, name in SOP_SPLITS.items():
        location = storage.join(root, name)
        lines = _read_lines(location, "a Stanford Online Products folder holds Ebay_train.txt and Ebay_test.txt")
        _expect_header(location, 1, lines[:1], SOP_HEADER)
        first = len(rows)
        for number, line in _numbered(lines, skip=1):
            where = f"{location}:{number}"
            try:
                image_id, class_id, _, path = line.split()
                row = _Row(split, str(int(class_id)), int(class_id), int(image_id), path, where)
            except ValueError:
                raise _malformed(where, line, f"{SOP_HEADER!r} with three integers and a path without spaces") from None
            rows.append(row)
        if len(rows) == first:
            raise ValueError(f"{location}: no images below the header")
    return rows


def _read_inshop(root: str, _sizes: dict[str, int]) -> list[_Row]:
    """Read In-Shop Clothes Retrieval: one list with a count, a padded header, and train, query and gallery images."""
    location = storage.join(root, INSHOP_LIST)
    lines = _read_lines(location, f"an In-Shop folder holds {INSHOP_LIST} and img/")
    _expect_header(location, 2, lines[1:2], INSHOP_HEADER)
    rows: list[_Row] = []
    for number, line in _numbered(lines, skip=2):
        where = f"{location}:{number}"
        fields = line.split()
        if len(fields) != 3 or fields[2] not in ("train", "query", "gallery"):
            raise _malformed(where, line, f"{INSHOP_HEADER!r} with a status of train, query or gallery")
        path, class_id, split = fields
        rows.append(_Row(split, class_id, class_id, len(rows) + 1, path, where))
    if lines[0].strip() != str(len(rows)):
        raise ValueError(
            f"{location}:1: expected the number of listed images, {len(rows)}, got {lines[0]!r}; restore the file if "
            "it is truncated, or correct the count"
        )
    _require_splits(location, rows, ("train", "query", "gallery"))
    return rows


def _read_cub200(root: str, _sizes: dict[str, int]) -> list[_Row]:
    """Read CUB-200-2011: the first half of the classes is for training, the second for test (paper, section 4.1)."""
    hint = f"a CUB-200-2011 folder holds {', '.join(CUB_FILES)} and images/"

    def read(name: str) -> dict[int, tuple[str, str]]:
        location = storage.join(root, name)
        found: dict[int, tuple[str, str]] = {}
        for number, line in _numbered(_read_lines(location, hint), skip=0):
            where = f"{location}:{number}"
            try:
                key, value = line.split(maxsplit=1)
                repeated = int(key) in found
                found[int(key)] = value.strip(), where
            except ValueError:
                raise _malformed(where, line, "a number and a value") from None
            if repeated:
                raise ValueError(f"{where}: number {key} is listed twice; remove one of the rows")
        return found

    paths, labels, classes = (read(name) for name in CUB_FILES)
    rows = []
    for image_id, (path, where) in paths.items():
        if image_id not in labels:
            raise ValueError(f"{where}: image {image_id} has no row in image_class_labels.txt; add it")
        label, label_where = labels[image_id]
        if not label.isdecimal() or int(label) not in classes:
            raise ValueError(f"{label_where}: class {label} of image {image_id} is not in classes.txt; add it there")
        split = "train" if int(label) <= len(classes) // 2 else "test"
        rows.append(_Row(split, label, int(label), image_id, f"images/{path}", where))
    _require_splits(storage.join(root, "images.txt"), rows, ("train", "test"))
    return rows


def _read_cars196(root: str, _sizes: dict[str, int]) -> list[_Row]:
    """Read CARS196: annotations in a MATLAB file; first half of the classes for training (paper, section 4.1)."""
    from scipy.io import loadmat  # only this layout needs it
    from scipy.io.matlab import MatReadError

    location = storage.join(root, CARS_FILE)
    hint = f"a CARS196 folder holds {CARS_FILE} and car_ims/"
    try:
        content = storage.read_bytes(location)
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotations {location}; {hint}") from None
    try:
        mat = loadmat(io.BytesIO(content), squeeze_me=True)
        annotations, num_classes = mat["annotations"].reshape(-1), mat["class_names"].size
        paths, labels = annotations["relative_im_path"].tolist(), annotations["class"].tolist()
    except (MatReadError, KeyError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        raise ValueError(
            f"{location} is not the annotations of CARS196 (struct array annotations with relative_im_path and class, "
            f"and class_names): {error}"
        ) from error
    rows = []
    for number, (path, label) in enumerate(zip(paths, labels, strict=True), start=1):
        where = f"{location}, annotation {number}"
        if not 1 <= int(label) <= num_classes:
            raise ValueError(f"{where}: class {label} is not in the range 1 to {num_classes} of class_names")
        split = "train" if int(label) <= num_classes // 2 else "test"
        rows.append(_Row(split, str(int(label)), int(label), number, str(path), where))
    _require_splits(location, rows, ("train", "test"))
    return rows


def _read_folders(root: str, sizes: dict[str, int]) -> list[_Row]:
    """Read one folder of images per class; in order of names, the first half is for training, the second for test."""
    images = sorted(
        path
        for path in sizes
        if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES and len(PurePosixPath(path).parts) > 1
    )
    names = sorted({PurePosixPath(path).parts[0] for path in images})
    if len(names) < 2:
        raise ValueError(
            f"{root}: images of {len(names)} class folders; training and testing need two or more folders in the "
            f"root with files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    train = set(names[: len(names) // 2])
    return [
        _Row("train" if name in train else "test", name, name, number, path, storage.join(root, path))
        for number, path in enumerate(images, start=1)
        for name in PurePosixPath(path).parts[:1]
    ]


_READERS: dict[Layout, Callable[[str, dict[str, int]], list[_Row]]] = {
    "sop": _read_sop,
    "inshop": _read_inshop,
    "cub200": _read_cub200,
    "cars196": _read_cars196,
    "folders": _read_folders,
}
assert set(_READERS) == set(get_args(Layout))


def _read_lines(location: str, hint: str) -> list[str]:
    try:
        return storage.read_bytes(location).decode().splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {location}; {hint}") from None


def _numbered(lines: list[str], *, skip: int) -> list[tuple[int, str]]:
    """Return all non-blank lines with their numbers, starting at 1."""
    return [(number, line) for number, line in enumerate(lines, start=1) if number > skip and line.strip()]


def _expect_header(location: str, number: int, lines: list[str], header: str) -> None:
    if not lines or lines[0].split() != header.split():
        raise ValueError(f"{location}:{number}: expected the header {header!r}, got {lines[0] if lines else ''!r}")


def _malformed(where: str, line: str, expected: str) -> ValueError:
    return ValueError(f"{where}: expected {expected}, got {line!r}; correct or remove the line")


def _require_splits(location: str, rows: list[_Row], splits: tuple[str, ...]) -> None:
    for split in splits:
        if not any(row.split == split for row in rows):
            raise ValueError(f"{location}: no images of the {split} split")


def _reject_shared_classes(rows: list[_Row]) -> None:
    """Reject classes in both training and test, paths outside the folder, and images listed twice."""
    trained: dict[str, bool] = {}
    seen: dict[str, str] = {}
    for row in rows:
        if trained.setdefault(row.class_id, row.split == "train") != (row.split == "train"):
            raise ValueError(
                f"{row.where}: class {row.class_id} is in both splits; test classes must be unseen in training"
            )
        if PurePosixPath(row.path).is_absolute() or ".." in PurePosixPath(row.path).parts:
            raise ValueError(f"{row.where}: image path {row.path!r} leaves the data folder; use a path relative to it")
        if row.path in seen:
            raise ValueError(
                f"{row.where}: image {row.path} is listed twice, first at {seen[row.path]}; remove one of the rows"
            )
        seen[row.path] = row.where


def _file_sizes(root: str) -> dict[str, int]:
    """Return the size in bytes of every file in a folder tree, by relative path, with one listing."""
    filesystem, path = storage.resolve(root)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    prefix = len(path.rstrip("/")) + 1
    return {info.path[prefix:]: info.size for info in infos if info.type == fs.FileType.File}

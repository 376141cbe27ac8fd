"""Readers for the official layouts of data sets, one function per layout.

A record holds an image's split, class and path. Splits are "train" and either "test", in which every image queries the
others, or "query" and "gallery".
"""

import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, get_args

import pyarrow as pa

from nsl_dist import storage
from nsl_dist.config import BY_CLASSES, FolderSplit, Layout

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
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif",
}  # fmt: skip


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
    if storage.has_folders(root):
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


def read_records(root: str, *, layout: Layout, split: FolderSplit = BY_CLASSES) -> pa.Table:
    """Read the records of a raw data set.

    Args:
        root: folder or URI.
        layout: layout of the data set.
        split: how class folders are split; other layouts accept only the default.

    Returns:
        Records with `RECORDS_SCHEMA`, ordered by split, class and image.

    Raises:
        FileNotFoundError: the folder, a split file or an image is missing.
        ValueError: a row is malformed, an image is listed twice, a class is in both training and test split, or a split
            is empty.

    """
    if not storage.exists(root):
        raise FileNotFoundError(f"no such folder: {root}; set --data.root (or --root) to the unpacked data set")
    sizes = storage.list_tree(root).sizes
    if layout == "folders":
        rows = _read_folders(root, sizes, split)
    elif split == BY_CLASSES:
        rows = _READERS[layout](root, sizes)
    else:
        raise ValueError(
            f"{root} has the layout {layout} with a split of its own; --data.split, --data.test-share and "
            "--data.test-classes are for class folders"
        )
    _reject_shared_classes(rows, allowed=split.by == "images")
    missing = [row for row in rows if row.path not in sizes]
    if missing:
        raise FileNotFoundError(
            f"{missing[0].where}: image {missing[0].path} does not exist below {root} ({len(missing)} of {len(rows)} "
            "images are missing); unpack the whole archive or remove these rows from the list"
        )
    return _table(rows, sizes)


def read_catalogue(root: str) -> pa.Table:
    """Read the records of a folder of images to be searched, not trained on.

    The class of an image is its folder. An image directly in the root is a class of its own, named after the file.

    Returns:
        Records of the split "test", with `RECORDS_SCHEMA`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it contains no images.

    """
    if not storage.exists(root):
        raise FileNotFoundError(f"no such folder: {root}; give a folder of images or shards")
    sizes = storage.list_tree(root).sizes
    paths = sorted(path for path in sizes if _is_image(path))
    if not paths:
        raise ValueError(
            f"{root} contains no images (files ending in {', '.join(sorted(IMAGE_SUFFIXES))}); give a folder of images "
            "or shards"
        )
    names = [_folder(path) or path for path in paths]
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


def _read_folders(root: str, sizes: dict[str, int], split: FolderSplit) -> list[_Row]:
    """Read folders of images; each folder that holds images is a class."""
    images = sorted(path for path in sizes if _is_image(path) and _folder(path))
    names = sorted({_folder(path) for path in images})
    if len(names) < 2:
        raise ValueError(
            f"{root}: images of {len(names)} class folders; training and testing need two or more folders in the "
            f"root with files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    _reject_classes_in_classes(root, names)
    if split.by == "images":
        test = set(_drawn_by_class(images, split.test_share))
    else:
        classes = _test_classes(root, names, split)
        test = {path for path in images if _folder(path) in classes}
    return [
        _Row("test" if path in test else "train", _folder(path), _folder(path), number, path, storage.join(root, path))
        for number, path in enumerate(images, start=1)
    ]


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _folder(path: str) -> str:
    """Return the folder of a file, relative to the root; "" is the root itself."""
    return path.rpartition("/")[0]


def _reject_classes_in_classes(root: str, names: list[str]) -> None:
    holders = set(names)
    for name in names:
        above = [str(parent) for parent in PurePosixPath(name).parents if str(parent) in holders]
        if above:
            raise ValueError(
                f"{root}: both {above[0]} and {name} hold images, so it is not clear which is the class; move the "
                f"images of {above[0]} into a folder of their own, or those of {name} up"
            )


def _drawn(names: list[str], share: float, *, fewest: int = 1) -> list[str]:
    """Draw a share of the names, some but not all; whether one is drawn hardly depends on the others."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return ordered[: min(max(fewest, round(share * len(names))), len(names) - 1)]


def _drawn_by_class(images: list[str], share: float) -> Iterator[str]:
    for _, paths in itertools.groupby(images, _folder):
        yield from _drawn(list(paths), share, fewest=2)  # one alone would have no match to find


def _test_classes(root: str, names: list[str], split: FolderSplit) -> set[str]:
    """Return the test classes: those of a file, or drawn ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names a class that does not exist, or leaves no class to one of the splits.

    """
    if split.test_classes is None:
        return set(_drawn(names, split.test_share))
    location = split.test_classes
    listed = {line.strip() for line in _read_lines(location, "it lists the test classes, one a line") if line.strip()}
    unknown = sorted(listed.difference(names))
    if unknown:
        raise ValueError(
            f"{location}: {root} has no class folder {unknown[0]!r} ({len(unknown)} of {len(listed)} do not exist); "
            f"its folders are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    if not listed or listed == set(names):
        raise ValueError(f"{location} lists {len(listed)} of {len(names)} classes; both splits need at least one")
    return listed


@dataclass(frozen=True)
class Unused:
    """What a folder of images holds beside the images.

    Attributes:
        files: relative paths, by ending.
        folders: relative paths of folders without any file.

    """

    files: dict[str, list[str]]
    folders: list[str]


def unused(root: str, used: set[str]) -> Unused:
    """Return what a folder holds besides the images at the paths in `used`."""
    tree = storage.list_tree(root)
    files: dict[str, list[str]] = {}
    for path in sorted(tree.sizes):
        if path not in used:
            files.setdefault(PurePosixPath(path).suffix.lower() or "no ending", []).append(path)
    if tree.broken_links:
        files["broken links"] = sorted(tree.broken_links)
    full = {str(parent) for path in tree.sizes for parent in PurePosixPath(path).parents}
    return Unused(files, sorted(set(tree.folders) - full))


_READERS: dict[Layout, Callable[[str, dict[str, int]], list[_Row]]] = {
    "sop": _read_sop,
    "inshop": _read_inshop,
    "cub200": _read_cub200,
    "cars196": _read_cars196,
}
assert {*_READERS, "folders"} == set(get_args(Layout))


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


def _reject_shared_classes(rows: list[_Row], *, allowed: bool) -> None:
    """Reject classes in both training and test unless allowed, paths outside the folder, and images listed twice."""
    trained: dict[str, bool] = {}
    seen: dict[str, str] = {}
    for row in rows:
        if not allowed and trained.setdefault(row.class_id, row.split == "train") != (row.split == "train"):
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

"""Official layouts of data sets on disk -> image records."""

from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs

from nsl_dist import storage

RECORDS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("class_id", pa.string()),
        ("image_id", pa.int64()),
        ("path", pa.string()),  # below the root
        ("num_bytes", pa.int64()),
    ]
)

SOP_SPLITS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
SOP_HEADER = "image_id class_id super_class_id path"


def is_sop(root: str) -> bool:
    """Tell whether a folder holds a split file of Stanford Online Products."""
    return any(storage.exists(storage.join(root, name)) for name in SOP_SPLITS.values())


def read_sop(root: str) -> pa.Table:
    """Read the official layout of Stanford Online Products: two split files, images below class folders.

    Args:
        root: local folder or URI.

    Returns:
        Records with `RECORDS_SCHEMA`, ordered by split, class and image.

    Raises:
        FileNotFoundError: the folder, a split file or an image is missing.
        ValueError: a row is malformed, an image or a class is in both splits, or a split is empty.

    """
    if not storage.exists(root):
        raise FileNotFoundError(
            f"no such folder: {root}; give the unpacked Stanford_Online_Products folder as --data.root, or --root"
        )
    rows: list[tuple[str, int, int, str, str]] = []
    for split, name in SOP_SPLITS.items():
        rows += [(split, *row) for row in _read_sop_split(storage.join(root, name))]
    _reject_shared_classes(rows)

    sizes = _file_sizes(root)
    missing = [(path, where) for _, _, _, path, where in rows if path not in sizes]
    if missing:
        path, where = missing[0]
        raise FileNotFoundError(
            f"{where}: image {path} does not exist below {root} ({len(missing)} of {len(rows)} images are missing); "
            "unpack the whole archive, or take the rows out of the split file"
        )
    rows.sort(key=lambda row: (row[0], row[1], row[2]))
    splits, class_ids, image_ids, paths, _ = zip(*rows, strict=True)
    columns = [splits, [str(value) for value in class_ids], image_ids, paths, [sizes[value] for value in paths]]
    return pa.table([pa.array(column) for column in columns], schema=RECORDS_SCHEMA)


def _read_sop_split(location: str) -> list[tuple[int, int, str, str]]:
    """Return (class_id, image_id, path, "file:line") of each row."""
    try:
        lines = storage.read_bytes(location).decode().splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no split file {location}; a Stanford Online Products folder holds Ebay_train.txt and Ebay_test.txt"
        ) from None
    if not lines or lines[0].split() != SOP_HEADER.split():
        raise ValueError(f"{location}:1: expected the header {SOP_HEADER!r}, got {lines[0] if lines else ''!r}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            image_id, class_id, _, path = line.split()
            row = (int(class_id), int(image_id), path, f"{location}:{number}")
        except ValueError:
            raise ValueError(
                f"{location}:{number}: expected 'image_id class_id super_class_id path' with three integers and a "
                f"path without spaces, got {line!r}; mend or remove the line"
            ) from None
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{location}:{number}: image path {path!r} leaves the data folder; make it relative to it")
        rows.append(row)
    if not rows:
        raise ValueError(f"{location}: no images below the header")
    return rows


def _reject_shared_classes(rows: list[tuple[str, int, int, str, str]]) -> None:
    """Refuse a class in both splits, which would leak into the test, and an image listed twice."""
    split_of_class: dict[int, str] = {}
    seen: dict[str, str] = {}
    for split, class_id, _, path, where in rows:
        if split_of_class.setdefault(class_id, split) != split:
            raise ValueError(f"{where}: class {class_id} is in both splits; test classes must be unseen in training")
        if path in seen:
            raise ValueError(f"{where}: image {path} is listed twice, first at {seen[path]}; remove one of the rows")
        seen[path] = where


def _file_sizes(root: str) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by relative path, in one listing."""
    filesystem, path = storage.resolve(root)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    prefix = len(path.rstrip("/")) + 1
    return {info.path[prefix:]: info.size for info in infos if info.type == fs.FileType.File}

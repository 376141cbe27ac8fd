"""Parquet shards of class bags, with a manifest.

A shard is a Parquet file of whole classes, with one row group (a bag) per class and one row per image in its original
encoding. Reading all images of a class is a single range read, on disk or from an object store. Next to the shards are
`classes.parquet` (split, label, size, shard and row group of each class) and `manifest.json`, which is written last.
"""

import functools
import hashlib
import io
import json
import math
import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from pyarrow import fs

from nsl_dist import cluster, storage
from nsl_dist.config import BY_CLASSES, REENCODED_QUALITY, TEST_CLASSES, FolderSplit, Layout, SplitBy
from nsl_dist.data.layouts import Unused, read_records, recognise, unused
from nsl_dist.data.synthetic import write_products
from nsl_dist.progress import Progress

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SHARD_BYTES = 64 * 2**20
MIN_SHARDS = 8  # per split, so that small data sets are also processed in parallel
READ_AGAIN_AFTER = (1.0, 4.0)  # seconds; object stores fail occasionally
IMAGES_PER_PROCESS = 256  # minimum; starting a process for fewer is not worth it
FEW_UNDECODABLE = 5  # of three times as many images or more; in a small folder one is already a large share
MOST_COMPARED = 5_000_000  # images whose contents are compared, since their hashes are in memory

BAG_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("class_id", pa.string()), ("path", pa.string()), ("image", pa.binary())]
)
CLASSES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("label", pa.int64()),  # 0 to num_classes - 1 within the split
        ("class_id", pa.string()),
        ("num_images", pa.int64()),
        ("shard", pa.string()),
        ("row_group", pa.int64()),
    ]
)


class DamagedShardError(ValueError):
    """A shard cannot be read; its name is in `shard`."""

    def __init__(self, shard: str, why: str) -> None:
        super().__init__(shard, why)
        self.shard = shard

    def __str__(self) -> str:
        remedy = "prepare the data again, or train without its classes with --data.max-damaged-shards"
        return f"shard {self.args[1]}; {remedy}"


@dataclass(frozen=True)
class Split:
    """The classes of one split, ordered by label.

    Attributes:
        root: folder or URI of the shards.
        sizes: number of images of each class.
        shard_names: the shards of the split.
        shards: index into `shard_names` for each class.
        row_groups: row group within the shard for each class.

    """

    root: str
    sizes: NDArray[np.int64]
    shard_names: list[str]
    shards: NDArray[np.int32]
    row_groups: NDArray[np.int32]

    @property
    def num_classes(self) -> int:
        """Classes with at least one image."""
        return len(self.sizes)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Number of images before each class, `[num_classes + 1]`."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def num_images(self) -> int:
        """Number of images."""
        return int(self.sizes.sum())

    @property
    def num_singletons(self) -> int:
        """Classes with a single image, whose queries cannot have a match."""
        return int((self.sizes == 1).sum())

    def read_bag(self, label: int, columns: list[str]) -> pa.Table:
        """Read all images of one class, in a fixed order.

        Raises:
            DamagedShardError: the shard cannot be read after retries, although the storage is available.
            OSError: the storage is unavailable for a long time.

        """
        name = self.shard_names[self.shards[label]]
        location = storage.join(self.root, name)
        pauses = iter(READ_AGAIN_AFTER)
        while True:
            try:
                # Handing one column to a thread pool takes longer than reading it.
                shard, row_group = _open_shard(location), int(self.row_groups[label])
                return shard.read_row_group(row_group, columns=columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                storage.patiently(lambda: storage.read_bytes(storage.join(self.root, MANIFEST_FILE)))
                pause = next(pauses, None)
                if pause is None:
                    raise DamagedShardError(name, f"{location}: {str(error).rstrip('.')}") from error
                _open_shard.cache_clear()
                time.sleep(pause)


@functools.lru_cache(maxsize=256)
def _open_shard(location: str) -> pq.ParquetFile:
    filesystem, path = storage.resolve(location)
    return pq.ParquetFile(path, filesystem=filesystem)


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json` and the location of its folder.

    Attributes:
        root: the folder.
        layout: layout of the raw data set.
        source: its folder or URI.
        digest: see `records_digest`.
        splits: numbers of images, classes and classes with one image, by split.
        undecodable: path and error of the images that were left out.
        shards: path, images and bytes of each shard.
        duplicates: paths and splits of images with the same bytes; not looked for above `MOST_COMPARED` images.
        unused: paths of files that are no images, by ending; only for class folders, as the next.
        empty_folders: paths of folders without any file.
        split_by: whether training and test share classes ("images") or not.
        max_edge: see `DataSource`.
        num_reencoded: images that were made smaller for it.
        version: of this format.

    """

    root: str
    layout: Layout
    source: str
    digest: str
    splits: dict[str, dict[str, int]]
    undecodable: list[dict[str, str]]
    shards: list[dict[str, Any]]
    duplicates: list[dict[str, list[str]]] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)
    empty_folders: list[str] = field(default_factory=list)
    split_by: SplitBy = "classes"
    max_edge: int | None = None
    num_reencoded: int = 0
    version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """The name of the raw folder."""
        return self.source.rstrip("/").rpartition("/")[2]

    @property
    def test_classes(self) -> str:
        """Say which classes the test images have."""
        return TEST_CLASSES[self.split_by]

    def account(self) -> dict[str, str]:
        """Say what became of all files of the raw folder but the images used; what there is none of is left out."""
        across = [same for same in self.duplicates if len(set(same["splits"])) > 1]
        lines = {
            "undecodable": _listed([f"{each['path']} ({each['error']})" for each in self.undecodable]),
            "re-encoded": f"{self.num_reencoded:,} to {self.max_edge} pixels, JPEG of quality {REENCODED_QUALITY}"
            if self.max_edge is not None
            else "",
            "other files": ", ".join(f"{ending} {len(files):,}" for ending, files in sorted(self.unused.items())),
            "empty folders": _listed(self.empty_folders),
            "duplicates": _listed([" = ".join(same["paths"]) for same in self.duplicates]),
            "in both splits": _listed([" = ".join(same["paths"]) for same in across]),
        }
        return {name: text for name, text in lines.items() if text}

    @property
    def evaluation_splits(self) -> tuple[str, str]:
        """The query and the gallery split; they are the same if every image queries the others."""
        return ("query", "gallery") if "query" in self.splits else ("test", "test")

    def class_ids(self, split: str) -> pa.ChunkedArray:
        """Return the original class names of a split, ordered by label."""
        return self._classes(split, ["class_id"])["class_id"]

    def split(self, name: str) -> Split:
        """Load the classes of one split.

        Raises:
            ValueError: the split does not exist.

        """
        if name not in self.splits:
            raise ValueError(f"{self.root} has no split {name!r}, only {', '.join(self.splits)}")
        table = self._classes(name, ["num_images", "shard", "row_group"])
        shards = table["shard"].combine_chunks().dictionary_encode()
        return Split(
            root=self.root,
            sizes=table["num_images"].to_numpy(),
            shard_names=shards.dictionary.to_pylist(),
            shards=shards.indices.to_numpy(),
            row_groups=table["row_group"].to_numpy().astype(np.int32),
        )

    def _classes(self, split: str, columns: list[str]) -> pa.Table:
        filesystem, path = storage.resolve(storage.join(self.root, "classes.parquet"))
        return pq.read_table(path, filesystem=filesystem, columns=columns, filters=[("split", "=", split)])


def _listed(names: list[str]) -> str:
    """Return the first few of a list, with the number of all."""
    shown = "; ".join(names[:3])
    return f"{len(names):,}: {shown}{'; ... (all in manifest.json)' if len(names) > 3 else ''}" if names else ""


def is_prepared(root: str) -> bool:
    """Return whether a folder holds a finished set of shards."""
    return storage.exists(storage.join(root, MANIFEST_FILE))


def load_manifest(root: str) -> Manifest:
    """Read a manifest and check that its shards are complete.

    Raises:
        ValueError: the manifest is unreadable or of another version, or a shard is missing or has another size.

    """
    root = storage.absolute(root)
    location = storage.join(root, MANIFEST_FILE)
    try:
        content = json.loads(storage.read_bytes(location))
        version = content["version"]
        manifest = Manifest(root=root, **content) if version == FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{location} is not a manifest of shards: {error}; run jobs/prepare_shards.py again"
        ) from error
    if manifest is None:
        raise ValueError(
            f"{location} has format version {version}, this release reads {FORMAT_VERSION}; run "
            "jobs/prepare_shards.py again"
        )
    filesystem, path = storage.resolve(root)
    sizes = {info.base_name: info.size for info in filesystem.get_file_info(fs.FileSelector(path))}
    for shard in manifest.shards:
        if sizes.get(shard["path"]) != shard["num_bytes"]:
            raise ValueError(
                f"shard {storage.join(root, shard['path'])} has {sizes.get(shard['path'], 'no')} bytes, its manifest "
                f"says {shard['num_bytes']}; delete {root} and prepare it again"
            )
    return manifest


def records_digest(records: pa.Table, *, layout: str) -> str:
    """Return the SHA-256 of the splits, classes, names and sizes of a data set's images, whatever its location."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {layout}\n".encode())
    for batch in records.to_batches(max_chunksize=65536):
        rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        digest.update("".join("\t".join(map(str, row)) + "\n" for row in rows).encode())
    return digest.hexdigest()


def layout_of(root: str, layout: Layout | None) -> Layout:
    """Return the layout of a raw folder or of shards.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the layout is unknown or ambiguous, or the shards have a different one than `layout`.

    """
    root = storage.absolute(root)
    if not is_prepared(root):
        return layout or recognise(root)
    prepared: Layout = load_manifest(root).layout
    if layout not in (None, prepared):
        raise ValueError(f"{root} holds shards of layout {prepared}, not {layout}; omit --layout")
    return prepared


@dataclass(frozen=True)
class DataSource:
    """A raw data set or shards, before anything is decoded.

    Attributes:
        root: folder or URI.
        layout: of the raw data set.
        records: see `read_records`; None for shards.
        split_by: whether training and test share classes.
        max_edge: pixels of an image's longer side above which it is re-encoded, smaller, when it is sharded; None: all
            images are kept as they are.

    """

    root: str
    layout: Layout
    records: pa.Table | None
    split_by: SplitBy
    max_edge: int | None = None

    @property
    def digest(self) -> str:
        """See `records_digest`."""
        if self.records is None:
            return load_manifest(self.root).digest
        kept = "" if self.max_edge is None else f" max-edge {self.max_edge} quality {REENCODED_QUALITY}"
        return records_digest(self.records, layout=f"{self.layout}{kept}")

    def training_sizes(self) -> NDArray[np.int64]:
        """Return the number of images of each training class, in any order."""
        if self.records is None:
            return load_manifest(self.root).split("train").sizes
        classes = self.records.filter(pc.field("split") == "train")["class_id"]
        return classes.value_counts().field("counts").to_numpy()


def find_data(root: str, *, layout: Layout | None, split: FolderSplit = BY_CLASSES) -> DataSource:
    """Look at a data set.

    Args:
        root: folder or URI of shards or of a raw data set.
        layout: layout of the data set; None to detect it.
        split: how class folders are split.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: its contents are invalid (see `read_records`), or it holds shards of another layout.

    """
    root, layout = storage.absolute(root), layout_of(root, layout)
    if is_prepared(root):
        return DataSource(root, layout, None, load_manifest(root).split_by)
    return DataSource(root, layout, read_records(root, layout=layout, split=split), split.by)


def synthetic_data(storage_root: str) -> DataSource:
    """Return the built-in synthetic products, rendered below `storage_root` unless they are there."""
    return find_data(write_products(storage.join(storage_root, "synthetic")), layout="sop")


def open_data(data: DataSource, *, storage_root: str, max_undecodable: float) -> Manifest:
    """Open shards, or shard a raw data set into `storage_root/shards/DIGEST` unless that exists.

    Raises:
        ValueError: too many images are undecodable (see `prepare`), or there are too few test images.

    """
    if data.records is None:
        manifest = load_manifest(data.root)
    else:
        manifest = prepare_into(storage_root, data, max_undecodable=max_undecodable)
    query, gallery = manifest.evaluation_splits
    if (num_images := manifest.split(gallery).num_images) < (2 if query == gallery else 1):
        raise ValueError(f"{data.root}: the test split has {num_images} image, too few for an evaluation")
    return manifest


def prepare_into(storage_root: str, data: DataSource, *, max_undecodable: float) -> Manifest:
    """Shard a raw data set into `storage_root/shards/DIGEST` unless that exists (see `prepare`)."""
    out = storage.join(storage_root, "shards", data.digest[:16])
    if not is_prepared(out):
        print(f"Sharding {data.root} into {out} (once; cached by digest)", flush=True)
    return prepare(data, out=out, max_undecodable=max_undecodable)


def prepare(data: DataSource, *, out: str, max_undecodable: float) -> Manifest:
    """Write shards and manifest of a data set in parallel on the cluster, one shard per CPU at a time, with progress.

    Undecodable images are skipped and listed in the manifest. The manifest is written last; a folder without one is
    incomplete and is written again.

    Args:
        data: raw data set.
        out: folder or URI to write to.
        max_undecodable: fraction of undecodable images above which preparation fails; unless it is 0, a few may
            always be undecodable.

    Raises:
        ValueError: `data` are shards, too many images are undecodable, or `out` holds another data set.

    """
    if data.records is None:
        raise ValueError(f"{data.root} holds shards already; give the folder of the raw data set")
    root, records = data.root, data.records
    if not 0 <= max_undecodable <= 1:
        raise ValueError(f"--max-undecodable {max_undecodable} must be in [0, 1]")
    out, digest = storage.absolute(out), data.digest
    if is_prepared(out):
        manifest = load_manifest(out)
        if manifest.digest != digest:
            raise ValueError(
                f"{out} holds shards of another data set (digest {manifest.digest[:16]} of {manifest.source}; "
                f"{root} has {digest[:16]}); choose another --out or delete it"
            )
        beside = _beside(data)  # which the digest does not cover
        return replace(manifest, source=root, unused=beside.files, empty_folders=beside.folders)
    storage.check_writable(out)

    written = _write_shards(data, out=out)
    try:
        reports = _collect(written, num_images=len(records), max_undecodable=max_undecodable)
    finally:
        written.close()

    classes = _index_classes([row for report in reports for row in report["classes"]])
    beside = _beside(data)
    written_classes = io.BytesIO()
    pq.write_table(classes, written_classes)
    storage.write_bytes(storage.join(out, "classes.parquet"), written_classes.getvalue())
    shards = sorted((report["shard"] for report in reports), key=lambda shard: str(shard["path"]))
    content = {
        "version": FORMAT_VERSION,
        "layout": data.layout,
        "source": root,
        "digest": digest,
        "splits": _count_splits(classes),
        "undecodable": [image for report in reports for image in report["undecodable"]],
        "shards": shards,
        "duplicates": _same_contents(reports) if len(records) <= MOST_COMPARED else [],
        "unused": beside.files,
        "empty_folders": beside.folders,
        "split_by": data.split_by,
    }
    if data.max_edge is not None:
        content["max_edge"] = data.max_edge
        content["num_reencoded"] = sum(report["num_reencoded"] for report in reports)
    storage.write_bytes(storage.join(out, MANIFEST_FILE), json.dumps(content, indent=1).encode())
    return load_manifest(out)


def _beside(data: DataSource) -> Unused:
    """Return what class folders hold besides the images."""
    if data.layout != "folders" or data.records is None:
        return Unused({}, [])
    return unused(data.root, set(data.records["path"].to_pylist()))


def _write_shards(data: DataSource, *, out: str) -> Generator[dict[str, Any], None, None]:
    """Write shards on the cluster; yield the report of each. When closed, let the running tasks finish.

    Not by Ray Data, which would cancel them: if one ends at that moment, Ray 2.60 aborts the driver ("Tried to complete
    task that was not pending").
    """

    @ray.remote(num_cpus=1, **cluster.prefer_cpu_nodes())
    def write(records: pa.Table, name: str, start: int, stop: int) -> dict[str, Any]:
        return _write_shard(records.slice(start, stop - start), root=root, out=out, name=name, max_edge=max_edge)

    root, records, max_edge = data.root, data.records, data.max_edge
    assert records is not None
    records_ref = ray.put(records)
    waiting = deque(_cut_into_shards(records, max_edge=max_edge))
    most = math.ceil(len(records) / IMAGES_PER_PROCESS)
    running: list[ray.ObjectRef] = []
    try:
        while waiting or running:
            # Some more than there are CPUs, so that the autoscaler adds nodes.
            while waiting and len(running) < min(most, 2 * max(1, cluster.totals()[0])):
                running.append(write.remote(records_ref, *waiting.popleft()))
            (done,), running = ray.wait(running)
            yield cluster.get(done)
    finally:
        if running:
            ray.wait(running, num_returns=len(running))


def _cut_into_shards(records: pa.Table, *, max_edge: int | None = None) -> list[tuple[str, int, int]]:
    """Split ordered records into shards (name, start, stop) of about equal bytes without splitting a class."""
    splits, class_ids = records["split"].to_numpy(), records["class_id"].to_numpy()
    new_class = np.ones(len(records), dtype=bool)
    new_class[1:] = (splits[1:] != splits[:-1]) | (class_ids[1:] != class_ids[:-1])
    ranges = []
    for split in dict.fromkeys(splits):
        rows = np.flatnonzero(splits == split)
        first, last = int(rows[0]), int(rows[-1]) + 1
        num_bytes = records["num_bytes"].to_numpy()[first:last]
        ends = np.cumsum(num_bytes if max_edge is None else np.minimum(num_bytes, max_edge**2 // 3))
        num_shards = max(MIN_SHARDS, -(-int(ends[-1]) // SHARD_BYTES))
        starts = first + np.flatnonzero(new_class[first:last])
        # A class belongs to the shard that contains its first byte.
        shard_of_class = (np.append(0, ends)[starts - first] * num_shards // max(int(ends[-1]), 1)).astype(int)
        cuts = [*starts[np.append(True, shard_of_class[1:] != shard_of_class[:-1])].tolist(), last]
        ranges += [(f"{split}-{i:05d}.parquet", *cut) for i, cut in enumerate(pairwise(cuts))]
    return ranges


def _write_shard(records: pa.Table, *, root: str, out: str, name: str, max_edge: int | None) -> dict[str, Any]:
    """Write one shard, class by class; return its entry for the manifest, its classes and its undecodable images."""
    from nsl_dist.data.images import reencoded  # torch takes seconds to import; the driver does not need it

    source, source_path = storage.resolve(root)
    written = io.BytesIO()  # in memory first: another job that shards the same data may be reading the existing file
    classes: list[dict[str, Any]] = []
    undecodable: list[dict[str, str]] = []
    contents: list[tuple[str, str, str]] = []
    num_reencoded = 0
    rows = records.to_pylist()
    # Column statistics would put whole images into the footer.
    with pq.ParquetWriter(
        written, BAG_SCHEMA, compression="none", use_dictionary=False, write_statistics=False
    ) as writer:
        start = 0
        while start < len(rows):
            stop = start
            images, image_ids, paths = [], [], []
            while stop < len(rows) and rows[stop]["class_id"] == rows[start]["class_id"]:
                row = rows[stop]
                stop += 1
                with source.open_input_stream(f"{source_path}/{row['path']}") as stream:
                    encoded = stream.read()
                try:
                    smaller = reencoded(encoded, max_edge)
                except ValueError as error:
                    undecodable.append({"path": row["path"], "error": str(error).splitlines()[0]})
                    continue
                num_reencoded += smaller is not None
                images.append(smaller or encoded)
                image_ids.append(row["image_id"])
                paths.append(row["path"])
                contents.append((hashlib.blake2b(encoded, digest_size=12).hexdigest(), row["path"], row["split"]))
            if images:
                class_id = rows[start]["class_id"]
                bag = pa.table([image_ids, [class_id] * len(images), paths, images], schema=BAG_SCHEMA)
                row_group = len(classes)
                writer.write_table(bag, row_group_size=len(images))
                classes.append(
                    {
                        "split": rows[start]["split"],
                        "class_id": class_id,
                        "num_images": len(images),
                        "shard": name,
                        "row_group": row_group,
                    }
                )
            start = stop
    content = written.getvalue()
    storage.write_bytes(storage.join(out, name), content)
    num_images = sum(row["num_images"] for row in classes)
    shard = {"path": name, "num_images": num_images, "num_bytes": len(content)}
    return {
        "shard": shard,
        "classes": classes,
        "undecodable": undecodable,
        "contents": contents,
        "num_reencoded": num_reencoded,
    }


def _same_contents(reports: list[dict[str, Any]]) -> list[dict[str, list[str]]]:
    """Return paths and splits of images with the same bytes, ordered by path."""
    images: dict[str, list[tuple[str, str]]] = {}
    for report in reports:
        for content, path, split in report["contents"]:
            images.setdefault(content, []).append((path, split))
    groups = sorted(sorted(same) for same in images.values() if len(same) > 1)
    return [{"paths": [path for path, _ in same], "splits": [split for _, split in same]} for same in groups]


def _collect(written: Iterable[dict[str, Any]], *, num_images: int, max_undecodable: float) -> list[dict[str, Any]]:
    """Collect the reports of all shards with progress; fail as soon as too many images are undecodable."""
    reports: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    progress = Progress("shards", "images", num_images)
    for report in written:
        reports.append(report)
        bad += report["undecodable"]
        if len(bad) > _most_undecodable(max_undecodable, num_images):
            raise ValueError(
                f"{len(bad)} of {num_images} images cannot be decoded, more than the allowed share "
                f"{max_undecodable}; first: {bad[0]['path']} ({bad[0]['error']}); repair them, or raise "
                "--data.max-undecodable (--max-undecodable of jobs/prepare_shards.py) to skip them"
            )
        progress.advance(report["shard"]["num_images"] + len(report["undecodable"]))
    return reports


def _most_undecodable(share: float, num_images: int) -> float:
    return max(share * num_images, min(FEW_UNDECODABLE, num_images // 3)) if share else 0


def _index_classes(rows: list[dict[str, Any]]) -> pa.Table:
    """Label the classes of each split in the order of their shards and row groups."""
    rows.sort(key=lambda row: (row["split"], row["shard"], row["row_group"]))
    labels: dict[str, int] = {}
    for row in rows:
        row["label"] = labels.get(row["split"], 0)
        labels[row["split"]] = row["label"] + 1
    return pa.Table.from_pylist(rows, schema=CLASSES_SCHEMA)


def _count_splits(classes: pa.Table) -> dict[str, dict[str, int]]:
    counts = {}
    for split in classes["split"].unique().to_pylist():
        sizes = classes.filter(pc.equal(classes["split"], split))["num_images"].to_numpy()
        counts[split] = {
            "num_images": int(sizes.sum()),
            "num_classes": len(sizes),
            "num_singletons": int((sizes == 1).sum()),
        }
    return counts

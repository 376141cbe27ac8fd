"""Search by image within one process: the gallery is opened, embedded and indexed with faiss."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import faiss
import numpy as np
import ray
import torch
from numpy.typing import NDArray

from nsl_dist import cluster, storage
from nsl_dist.config import Kind, SearchConfig, TrainConfig
from nsl_dist.data.images import for_browsers
from nsl_dist.data.layouts import official_layout, read_catalogue
from nsl_dist.data.shards import DataSource, Manifest, find_data, is_prepared, open_data, prepare_into
from nsl_dist.embedder import load_embedder, read_description
from nsl_dist.progress import announce
from nsl_dist.retrieval.batch_inference import embed, embeddings_key
from nsl_dist.retrieval.faiss_index import build_index
from nsl_dist.retrieval.vector_files import EmbeddingSet, pack_codes
from nsl_dist.run import DESCRIPTION_FILE, MODEL_FILE, RunFolder, find_checkpoint

MOST_PIXELS = 50_000_000  # of a query image
CACHED_BAGS = 64  # classes whose images are kept in memory


@dataclass(frozen=True)
class PreparedGallery:
    """An embedded gallery.

    Attributes:
        checkpoint: folder or URI of the model.
        manifest: of the shards that hold the images.
        embeddings: of the split that is searched.
        approximate: reference to a faiss index of them, built once for all replicas. None: exact search.

    """

    checkpoint: str
    manifest: Manifest
    embeddings: EmbeddingSet
    approximate: Any


def prepare_gallery(config: SearchConfig) -> PreparedGallery:
    """Open the gallery, embed it unless that was done before, and print what is searched.

    Raises:
        FileNotFoundError: the checkpoint or the gallery does not exist.
        ValueError: checkpoint, gallery or index cannot be used.

    """
    storage_root = storage.absolute(config.storage or RunFolder.storage_of(config.checkpoint))
    checkpoint = _find(config.checkpoint)
    model, data = read_description(checkpoint)
    settings = TrainConfig(model=model, data=data)
    build_index(np.empty((0, model.dim), dtype=np.float32), config.index, config.index_parameters, flag="--index")
    storage.check_writable(storage_root)
    cluster.connect(num_cpus=max(2, config.replicas))
    num_gpus = cluster.totals()[1] if cluster.settle_device(config.device) == "cuda" else 0

    manifest = _open_images(config, storage_root)
    split = config.split or manifest.evaluation_splits[1]
    num_images, num_classes = manifest.split(split).num_images, manifest.split(split).num_classes
    lines = {
        "checkpoint": f"{checkpoint}: {model.backbone}, {model.dim} dimensions, {data.image_size} pixels",
        "gallery": f"{num_images:,} images of {num_classes:,} classes, split {split} of {manifest.root}",
        **manifest.account(),
        "index": "; ".join(_described(kind, config, model.dim) for kind in config.kinds),
    }
    announce(lines)

    weights = storage.read_bytes(storage.join(checkpoint, MODEL_FILE))
    out = storage.join(storage_root, "embeddings", embeddings_key(weights, settings, manifest, num_gpus=num_gpus))
    if split in manifest.evaluation_splits:  # an evaluation may have written the same files
        sets = embed(weights, settings, manifest, out=out, num_gpus=num_gpus)
    else:
        sets = embed(weights, settings, manifest, out=f"{out}-{split}", num_gpus=num_gpus, splits=(split,))
    approximate = None
    if "float" in config.kinds and config.index != "Flat":
        vectors = sets[split].read_all("vector", range(sets[split].num_vectors))
        built = build_index(vectors, config.index, config.index_parameters, flag="--index")
        approximate = ray.put(faiss.serialize_index(built))
    return PreparedGallery(checkpoint, manifest, sets[split], approximate)


def _find(location: str) -> str:
    """Return the checkpoint at or below `location`; unlike an evaluation, a search needs only its model."""
    location = storage.absolute(location).rstrip("/")
    return location if storage.exists(storage.join(location, DESCRIPTION_FILE)) else find_checkpoint(location)


def _open_images(config: SearchConfig, storage_root: str) -> Manifest:
    root = storage.absolute(config.gallery)
    if not storage.exists(root):
        raise FileNotFoundError(f"no such folder: {root}; give a folder of images, or shards, as --gallery")
    if is_prepared(root) or config.layout or official_layout(root):
        source = find_data(root, layout=config.layout)
        return open_data(source, storage_root=storage_root, max_undecodable=config.max_undecodable)
    catalogue = DataSource(root, "folders", read_catalogue(root), "classes")
    return prepare_into(storage_root, catalogue, max_undecodable=config.max_undecodable)


def _described(kind: Kind, config: SearchConfig, dim: int) -> str:
    if kind == "binary":
        return f"binary: Flat, {-(-dim // 8)} bytes an image"
    return f"float: {' '.join(filter(None, (config.index, config.index_parameters)))}, {4 * dim} bytes a vector"


@dataclass(frozen=True)
class Query:
    """An image to search for.

    Attributes:
        pixels: from `Searcher.pixels`.
        kind: embeddings to compare.
        k: neighbours wanted; a smaller gallery returns all it has.

    """

    pixels: torch.Tensor
    kind: Kind
    k: int


@dataclass(frozen=True)
class Answer:
    """The neighbours of a query.

    Attributes:
        ids: nearest first.
        scores: cosine similarities, or Hamming distances in bits.
        embed_seconds: of all queries that were answered together.
        search_seconds: of all queries that were answered together.

    """

    ids: list[int]
    scores: list[float]
    embed_seconds: float
    search_seconds: float


class Searcher:
    """The model, the indexes, and the images by id. All methods but `search` are thread-safe.

    Attributes:
        class_names: of the gallery, by label.
        num_images: of the gallery.
        dim: of an embedding.
        image_size: edge of the square crop that the model sees, pixels.

    """

    def __init__(self, gallery: PreparedGallery, config: SearchConfig) -> None:
        embeddings = gallery.embeddings
        self.num_images, self.dim = embeddings.num_vectors, embeddings.dim
        self._embedder = load_embedder(gallery.checkpoint)
        self.image_size = self._embedder.image_size
        self._split = gallery.manifest.split(embeddings.split)
        self._offsets = self._split.offsets
        self._paths = embeddings.paths().combine_chunks()
        self.class_names: list[str] = gallery.manifest.class_ids(embeddings.split).to_pylist()
        self._reading = threading.Lock()  # two threads that read from one open file crash the process
        self._bag = lru_cache(CACHED_BAGS)(lambda label: self._split.read_bag(label, ["image"])["image"])
        self._indexes: dict[Kind, Any] = {}
        ids = range(self.num_images)
        if gallery.approximate is not None:
            self._indexes["float"] = faiss.deserialize_index(ray.get(gallery.approximate).copy())
        elif "float" in config.kinds:
            self._indexes["float"] = faiss.IndexFlatIP(self.dim)
            for _, vectors in embeddings.read("vector", ids):
                self._indexes["float"].add(np.ascontiguousarray(vectors))
        if "binary" in config.kinds:
            self._indexes["binary"] = faiss.IndexBinaryFlat(8 * embeddings.code_bytes)
            for _, codes in embeddings.read("code", ids):
                self._indexes["binary"].add(np.ascontiguousarray(codes))

    def pixels(self, encoded: bytes) -> torch.Tensor:
        """Decode an untrusted image to what the model sees of it.

        Raises:
            ValueError: it is not an image, is damaged, or would take too much memory.

        """
        try:
            return self._embedder.pixels(encoded, most_pixels=MOST_PIXELS)
        except ValueError as error:
            reason = str(error).removeprefix("bytes: ")
            raise ValueError(f"this is no image that can be read: {reason}") from error

    def search(self, queries: Sequence[Query]) -> list[Answer]:
        """Search for several images together, which is faster than one by one."""
        started = time.perf_counter()
        vectors_QD = self._embedder.embed(torch.stack([query.pixels for query in queries]))
        embedded = time.perf_counter()
        found: dict[int, tuple[NDArray[Any], NDArray[np.int64]]] = {}
        for kind, index in self._indexes.items():
            places = [place for place, query in enumerate(queries) if query.kind == kind]
            if places:
                vectors = vectors_QD[places] if kind == "float" else pack_codes(vectors_QD[places])
                k = min(self.num_images, max(queries[place].k for place in places))
                found |= zip(places, zip(*index.search(vectors, k), strict=True), strict=True)
        searched = time.perf_counter()
        return [
            self._answer(query, *found[place], seconds=(embedded - started, searched - embedded))
            for place, query in enumerate(queries)
        ]

    def _answer(
        self, query: Query, scores: NDArray[Any], ids: NDArray[np.int64], *, seconds: tuple[float, float]
    ) -> Answer:
        scores, ids = scores[: query.k][ids[: query.k] >= 0], ids[: query.k][ids[: query.k] >= 0]
        # Some indexes only know L2: the squared distance of unit vectors.
        if query.kind == "float" and self._indexes["float"].metric_type == faiss.METRIC_L2:
            scores = 1 - scores / 2
        return Answer(ids.tolist(), scores.tolist(), *seconds)

    def path(self, image_id: int) -> str:
        """Return the path of a gallery image, relative to the folder that was searched."""
        return str(self._paths[image_id])

    def class_name(self, image_id: int) -> str:
        """Return the data set's name of the class of a gallery image."""
        return self.class_names[self._label(image_id)]

    def image(self, image_id: int) -> tuple[bytes, str]:
        """Return a gallery image and its media type, encoded as in the data set if browsers show that (`for_browsers`).

        Raises:
            KeyError: the gallery has no such image.

        """
        if not 0 <= image_id < self.num_images:
            raise KeyError(f"no image {image_id}: the gallery has 0 to {self.num_images - 1}")
        label = self._label(image_id)
        with self._reading:
            encoded = self._bag(label)[image_id - int(self._offsets[label])].as_py()
        return for_browsers(encoded)

    def _label(self, image_id: int) -> int:
        return int(np.searchsorted(self._offsets, image_id, side="right")) - 1


_MEASURES: dict[Kind, Callable[[int], str]] = {
    "float": lambda _: "cosine similarity, 1 is the same",
    "binary": lambda dim: f"Hamming distance in bits of {dim}, 0 is the same",
}


def print_neighbours(config: SearchConfig) -> None:
    """Print a table of neighbours for each image of `config.query`.

    Raises:
        FileNotFoundError: a file, the checkpoint or the gallery does not exist.
        ValueError: a file is not an image; or see `prepare_gallery`.

    """
    contents = {name: storage.read_bytes(name) for name in config.query}
    searcher = Searcher(prepare_gallery(config), config)
    for name, encoded in contents.items():
        try:
            pixels = searcher.pixels(encoded)
        except ValueError as error:
            raise ValueError(f"--query {name}: {error}") from error
        for kind in config.kinds:
            (answer,) = searcher.search([Query(pixels, kind, config.k)])
            print(f"\n{name} among {searcher.num_images:,} images of {config.gallery}, {_MEASURES[kind](searcher.dim)}")
            print(f"{'rank':>6}  {'score':>8}  {'class':20}  path")
            for rank, (image_id, score) in enumerate(zip(answer.ids, answer.scores, strict=True), start=1):
                shown = f"{score:8.4f}" if kind == "float" else f"{score:8.0f}"
                print(f"{rank:6}  {shown}  {searcher.class_name(image_id):20}  {searcher.path(image_id)}")

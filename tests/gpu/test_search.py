"""Exact search of a shard on a GPU, by faiss."""

import numpy as np
import pytest
import torch

from nsl_dist.retrieval import gallery_shard
from nsl_dist.retrieval.gallery_shard import GalleryShard
from nsl_dist.retrieval.neighbours import distances_of, ids_of
from nsl_dist.retrieval.vector_files import EmbeddingSet, write_file
from tests.support.vectors import paths_of

NUM_VECTORS, DIM, FIRST = 6000, 64, 1000


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingSet:
    folder = tmp_path_factory.mktemp("embeddings")
    vectors = np.random.default_rng(0).standard_normal((NUM_VECTORS, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[1500:1600] = vectors[1400:1500]  # ties
    labels = np.arange(NUM_VECTORS)
    write_file(
        str(folder / "a.parquet"), split="test", ids=labels, paths=paths_of(labels), labels=labels, vectors=vectors
    )
    return EmbeddingSet(str(folder), "test", DIM, ("a.parquet",), (NUM_VECTORS,))


@pytest.mark.parametrize("k", [1, 100, 2048, 2500])  # beyond 2,048 faiss has no GPU search, and the CPU's takes over
@pytest.mark.parametrize("gpu_bytes", [2**30, 2**20])  # all at once, and in pieces
def test_a_shard_on_a_gpu_finds_the_nearest(
    k: int, gpu_bytes: int, gallery: EmbeddingSet, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    if device.type == "cuda" and faiss.get_num_gpus() == 0:
        pytest.skip("faiss was built without CUDA, or cannot use this device")
    monkeypatch.setattr(gallery_shard, "GPU_BYTES_AT_ONCE", gpu_bytes)
    ids = range(FIRST, NUM_VECTORS)
    shard = GalleryShard(gallery, ids, ("float",), use_gpu=True, shards_on_a_node=1, memory_bytes=2**30)
    assert (shard._gpu is not None) == (device.type == "cuda")
    shard.load()
    vectors = gallery.read_all("vector", range(NUM_VECTORS))
    queries = vectors[1350:1450]
    keys = shard.search(queries, k, "float")

    assert keys.shape == (len(queries), k)
    assert (np.diff(keys, axis=1) > 0).all()
    found = ids_of(keys)
    assert found.min() >= FIRST
    assert found.max() < NUM_VECTORS
    # Each found once, at its similarity, and none nearer left out; float32 errs by less than 1e-5.
    assert all(len(np.unique(row)) == k for row in found)
    exact = queries.astype(np.float64) @ vectors[FIRST:].astype(np.float64).T
    found_similarities = np.take_along_axis(exact, found - FIRST, axis=1)
    np.testing.assert_allclose(-distances_of(keys, np.float32), found_similarities, rtol=0, atol=1e-5)
    best = -np.sort(-exact, axis=1)[:, :k]
    np.testing.assert_allclose(found_similarities, best, rtol=0, atol=2e-5)

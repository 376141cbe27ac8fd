"""K-means over a sharded gallery, and the normalised mutual information of its clusters with the classes."""

import contextlib
import io

import numpy as np
import ray
from numpy.typing import NDArray

from nsl_dist.config import Kind
from nsl_dist.progress import Progress
from nsl_dist.retrieval.sharded_search import Gallery

NUM_ITERATIONS = 25  # faiss's defaults, as the seed
SEED = 1234


def cluster_nmi(gallery: Gallery, kind: Kind, labels: NDArray[np.int64]) -> float:
    """Return the NMI of k-means clusters and classes, geometrically normalised, with as many clusters as classes.

    The protocol of the paper's tables. faiss runs k-means, starting from randomly chosen vectors; the shards assign
    their own vectors and sum them up, so that only centroids travel. Codes are clustered as vectors of -1 and 1.

    Args:
        gallery: opened for exact search.
        kind: what to cluster.
        labels: classes of the gallery, by id.

    """
    from faiss.contrib.clustering import kmeans
    from sklearn.metrics import normalized_mutual_info_score

    num_classes = len(np.unique(labels))
    vectors = _ShardedVectors(gallery, kind)
    with contextlib.redirect_stdout(io.StringIO()):  # faiss prints a line that is of no use to the user
        centroids = kmeans(num_classes, vectors, niter=NUM_ITERATIONS, seed=SEED, verbose=False)
    clusters, _, _ = vectors.assign_to(centroids)
    return float(normalized_mutual_info_score(labels, clusters, average_method="geometric"))


class _ShardedVectors:
    """The vectors of a gallery with the interface of `faiss.contrib.clustering.DatasetAssign`."""

    def __init__(self, gallery: Gallery, kind: Kind) -> None:
        self._gallery, self._kind = gallery, kind
        self._progress = Progress(f"k-means {kind}", "iterations", NUM_ITERATIONS + 1)

    def count(self) -> int:
        return self._gallery.embeddings.num_vectors

    def dim(self) -> int:
        embeddings = self._gallery.embeddings
        return embeddings.dim if self._kind == "float" else 8 * embeddings.code_bytes

    def get_subset(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.empty((len(ids), self.dim()), dtype=np.float32)
        self._gallery.gather(ids, lambda shard, part: shard.rows.remote(ids[part], self._kind), found)
        return found

    def assign_to(
        self, centroids: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        shared = ray.put(centroids)
        places, distances, sums = zip(
            *ray.get([shard.assign.remote(shared, self._kind) for shard in self._gallery.shards]), strict=True
        )
        self._progress.advance(1)
        return np.concatenate(places), np.concatenate(distances), np.sum(sums, axis=0).astype(np.float32)

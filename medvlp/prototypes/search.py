"""Nearest centroids by FAISS: exact up to a number of centroids, through an inverted file above it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlp import distributed

#: Queries of one matrix product: its scores stay in the cache of a core (a fifth faster than FAISS's 4,096).
_QUERIES = 512
#: Lists of an inverted file for each square root of a centroid, and how many of them are searched.
_LISTS, _PROBED = 4, 16
#: FAISS's work space on a GPU in bytes; its own default of up to 1.5 GiB would be the model's loss.
_GPU_BYTES = 256 << 20


class CentroidSearch:
    """Finds each row's most similar centroid; the index object is used again with every new centroids.

    Above `ivf_above` centroids: an inverted file with 4 sqrt(K) lists of which 16 are searched (`nprobe`): a
    row is compared with the lists' centers and about as many centroids. (Scanning lists is memory-bound, at
    width 768 about 17 times slower for each comparison than the exact search's matrix products: fewer or
    longer lists would gain nothing.) The lists are learned from the first centroids that are searched. On
    GPUs (faiss-gpu, where it is installed and finds one) this rank's own is used; that part has never run,
    for lack of a faiss-gpu to install.

    Args:
        count: number of centroids K; width: D.
        ivf_above: largest K that is searched exactly.
        threads: of FAISS.
    """

    def __init__(self, count: int, width: int, ivf_above: int, threads: int) -> None:
        import faiss  # here: nothing but k-means and export needs it

        self._faiss, self._threads = faiss, threads
        index: Any = faiss.IndexFlatIP(width)
        if count > ivf_above:
            lists = max(1, round(_LISTS * math.sqrt(count)))
            self._quantizer = index  # FAISS keeps no reference of its own
            index = faiss.IndexIVFFlat(index, width, lists, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = min(_PROBED, lists)
        gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        if gpus > 0:
            self._resources = faiss.StandardGpuResources()
            self._resources.setTempMemory(_GPU_BYTES)
            index = faiss.index_cpu_to_gpu(self._resources, distributed.local_rank() % gpus, index)
        self._index = index

    def __call__(
        self, rows: NDArray[np.float32], centroids: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """[n, D] rows and [K, D] centroids -> ([n] dot products, [n] ids) of the nearest ones; n may be 0."""
        if not len(rows):
            return np.zeros(0, np.float32), np.zeros(0, np.int64)
        with self._settings():
            if not self._index.is_trained:
                self._index.train(centroids)
            self._index.reset()
            self._index.add(centroids)
            similarity, nearest = self._index.search(rows, 1)
        if (nearest < 0).any():  # an inverted file whose searched lists are all empty
            exact = (rows[nearest[:, 0] < 0] @ centroids.T).argmax(1)
            chosen = np.flatnonzero(nearest[:, 0] < 0)
            nearest[chosen, 0] = exact
            similarity[chosen, 0] = (rows[chosen] * centroids[exact]).sum(1)
        return similarity[:, 0], nearest[:, 0]

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """FAISS knows threads and block size only for the whole process; others may use it too."""
        threads, queries = self._faiss.omp_get_max_threads(), self._faiss.cvar.distance_compute_blas_query_bs
        self._faiss.omp_set_num_threads(self._threads)
        self._faiss.cvar.distance_compute_blas_query_bs = _QUERIES
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(threads)
            self._faiss.cvar.distance_compute_blas_query_bs = queries

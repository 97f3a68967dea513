"""Which centroid a row is nearest to: FAISS on the CPU or a GPU, or torch's matrix products on a GPU."""

import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.device import uses_cuda
from medvlp.prototypes.supervisor import NO_GPU

logger = logging.getLogger(__name__)

#: Queries of one matrix product: its scores stay in the cache of a core (a fifth faster than FAISS's 4,096).
_QUERIES = 512
#: Lists of an inverted file for each square root of a centroid, and how many of them are searched.
_LISTS, _PROBED = 4, 16
#: Operations of a refresh from which `device: auto` takes a GPU: about a minute of one core behind training.
_GPU_WORK = 5e12
#: Bytes of a CUDA context and of FAISS's kernels beside `prototypes.gpu_memory`.
_CONTEXT_BYTES = 768 << 20

Rows = NDArray[np.float32]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]


class _Index(Protocol):
    """[n, D] rows and [K, D] centroids -> ([n] dot products, [n] ids) of the nearest ones; n > 0."""

    def search(self, rows: Rows, centroids: Rows) -> Found: ...


class CentroidSearch:
    """Finds each row's most similar centroid, on a GPU where that is asked for and there is room.

    A GPU that is missing, full or another process's alone (compute mode), or that fails, costs one line in
    the log: the search goes on with FAISS on the CPU and stays there. FAISS's own checks of CUDA calls abort
    the process; the supervisor starts the next worker without a GPU then (`NO_GPU`).

    Args:
        count: number of centroids K; width: D.
        config: `device`, `gpu_memory`, `ivf_above`, `iterations`.
        rows: most rows of one search of this process; weighs the work.
        threads: of FAISS on the CPU.

    Attributes:
        on_gpu: whether the next search uses a GPU.
    """

    def __init__(self, count: int, width: int, config: PrototypesConfig, rows: int, threads: int) -> None:
        self._sizes, self._threads, self._config = (count, width), threads, config
        self._index: _Index | None = None
        work = 2.0 * rows * count * width * config.iterations
        wanted = config.device == "gpu" or (config.device == "auto" and work >= _GPU_WORK)
        if wanted and not (config.device == "auto" and not _gpu_count()):
            self._index = self._gpu_index()
        self.on_gpu = self._index is not None
        if self._index is None:
            self._index = _FaissIndex(count, width, config.ivf_above, threads)

    def __call__(self, rows: Rows, centroids: Rows) -> Found:
        """[n, D] rows and [K, D] centroids -> ([n] dot products, [n] ids) of the nearest ones; n may be 0."""
        if not len(rows):
            return np.zeros(0, np.float32), np.zeros(0, np.int64)
        assert self._index is not None
        try:
            return self._index.search(rows, centroids)
        except RuntimeError as error:  # out of memory, of FAISS or of torch
            if not self.on_gpu:
                raise
            _say(" ".join(str(error).split())[:200])
        self.on_gpu = False
        self._index = _FaissIndex(*self._sizes, self._config.ivf_above, self._threads)
        return self._index.search(rows, centroids)

    def _gpu_index(self) -> _Index | None:
        """FAISS or torch on this process's GPU; None, and a line in the log, where that cannot be."""
        count, width = self._sizes
        budget = int(self._config.gpu_memory * 2**30)
        reason = _obstacle(count, width, budget)
        if reason:
            _say(reason)
            return None
        gpu = distributed.local_rank() % _gpu_count()
        try:
            if _faiss_has_gpus():
                return _FaissIndex(count, width, self._config.ivf_above, self._threads, gpu, budget)
            return TorchIndex(torch.device("cuda", gpu), budget)
        except RuntimeError as error:
            _say(" ".join(str(error).split())[:200])
            return None


def _say(reason: str) -> None:
    logger.warning("clusters are searched on the CPU, not on a GPU (prototypes.device): %s", reason)


def _gpu_count() -> int:
    """GPUs that this process may use; asking makes no context on any."""
    return torch.cuda.device_count() if uses_cuda() else 0


def _faiss_has_gpus() -> bool:
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _obstacle(count: int, width: int, budget: int) -> str:
    """Why this process's GPU should not be touched; "" where nothing is known to be in the way."""
    if os.environ.get(NO_GPU):
        return "an earlier worker was aborted with one"
    gpus = _gpu_count()
    if not gpus:
        return "there is none"
    if 8 * count * width > budget:
        return f"prototypes.gpu_memory is too little for {count} centroids of width {width}"
    free, mode = _state(distributed.local_rank() % gpus)
    if mode.startswith(("Exclusive", "Prohibited")):
        return f"its compute mode is {mode}"
    if free is not None and free < budget + _CONTEXT_BYTES:
        return f"it has {free / 2**30:.1f} GiB free"
    return ""


def _state(gpu: int) -> tuple[int | None, str]:
    """Free bytes and compute mode of a GPU, by the driver's tool: CUDA would make a context to answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, ""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    name = visible[gpu] if gpu < len(visible) else str(gpu)
    command = [
        program,
        f"--id={name}",
        "--query-gpu=memory.free,compute_mode",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        free, mode = done.stdout.strip().split(", ")
        return int(free) << 20, mode
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, ""


class _FaissIndex:
    """FAISS on the CPU, or on one GPU; the index object is used again with every new centroids.

    Above `ivf_above` centroids: an inverted file with 4 sqrt(K) lists of which 16 are searched (`nprobe`): a
    row is compared with the lists' centers and about as many centroids. (Scanning lists is memory-bound, at
    width 768 about 17 times slower for each comparison than the exact search's matrix products: fewer or
    longer lists would gain nothing.) The lists are learned from the first centroids that are searched.

    Args:
        count, width, ivf_above, threads: see `CentroidSearch`.
        gpu: number of the GPU; None: the CPU.
        budget: bytes of work space there; FAISS's own default of up to 1.5 GiB would be the model's loss.
    """

    def __init__(
        self, count: int, width: int, ivf_above: int, threads: int, gpu: int | None = None, budget: int = 0
    ) -> None:
        import faiss  # here: of a training only what clusters needs it

        self._faiss, self._threads = faiss, threads
        index: Any = faiss.IndexFlatIP(width)
        if count > ivf_above:
            lists = max(1, round(_LISTS * math.sqrt(count)))
            self._quantizer = index  # FAISS keeps no reference of its own
            index = faiss.IndexIVFFlat(index, width, lists, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = min(_PROBED, lists)
        if gpu is not None:
            self._resources = faiss.StandardGpuResources()
            self._resources.setTempMemory(budget - 4 * count * width)
            index = faiss.index_cpu_to_gpu(self._resources, gpu, index)
        self._index = index

    def search(self, rows: Rows, centroids: Rows) -> Found:
        """See `CentroidSearch`."""
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


class TorchIndex:
    """Exact search by torch's matrix products in float32, where there is a GPU and no faiss-gpu.

    Args:
        device: where. budget: bytes for centroids, a block of rows and its scores together.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self._device, self._budget = device, budget

    @torch.no_grad()
    def search(self, rows: Rows, centroids: Rows) -> Found:
        """See `CentroidSearch`."""
        count, width = centroids.shape
        block = max(1, min(len(rows), (self._budget // 4 - count * width) // (count + width)))
        similarity, nearest = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would confuse neighbouring centroids
        try:
            candidates = torch.from_numpy(centroids).to(self._device).T
            for begin in range(0, len(rows), block):
                part = slice(begin, begin + block)
                best = (torch.from_numpy(rows[part]).to(self._device) @ candidates).max(1)
                similarity[part], nearest[part] = best.values.cpu().numpy(), best.indices.cpu().numpy()
        finally:
            torch.set_float32_matmul_precision(precision)
        return similarity, nearest

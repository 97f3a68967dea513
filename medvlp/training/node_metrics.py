"""What the machines of a run are doing, told to W&B by one rank of each node."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import psutil
import torch

from medvlp import distributed
from medvlp.ranks import detect, node_key
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.wandb_run import WandbRun

logger = logging.getLogger(__name__)

MIB = 2**20


class NodeMetrics(Callback):
    """Sends `system/node-<n>/...` of every node with each logged step: how busy processors are and how full
    the memory is in percent, MiB a second over the network, and the mean of both shares over the GPUs that
    its ranks compute on: the others may be another job's.

    W&B itself watches only the machine of rank 0; its own curves stay beside these.

    Args:
        wandb_run: where rank 0 sends them; None on other ranks.
    """

    name = "node_metrics"

    def __init__(self, wandb_run: WandbRun | None):
        self._wandb_run = wandb_run
        self._node = node_key(detect())
        self._watch: _Watch | None = None

    def on_start(self, step: int) -> None:
        """Agree on which rank watches each node, the first on it; all ranks call this together."""
        ranks = distributed.gather_objects((self._node, _own_gpu()))
        if [node for node, _ in ranks].index(self._node) == distributed.rank():
            self._watch = _Watch([gpu for node, gpu in ranks if node == self._node and gpu is not None])

    def on_step(self, record: StepRecord) -> None:
        """At logged steps, look and send; all ranks call this together."""
        if not (record.logged or record.last):
            return
        looked = distributed.gather_objects(None if self._watch is None else self._watch.look())
        if self._wandb_run is None:
            return
        seen = [values for values in looked if values is not None]
        named = {
            f"system/node-{number}/{name}": value
            for number, values in enumerate(seen)
            for name, value in values.items()
        }
        self._wandb_run.log(named, record.step)


class _Watch:
    """Looks at this machine. What it does not tell is left out: no metric is worth the training run.

    Args:
        gpus: UUIDs of those to look at.
    """

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self._gpus = _handles(gpus)
        psutil.cpu_percent()  # the first call only begins to count
        self._seconds, self._bytes = time.monotonic(), _network()

    def look(self) -> dict[str, float]:
        """What has happened since the last look."""
        now, carried = time.monotonic(), _network()
        found = {"cpu_percent": psutil.cpu_percent(), "memory_percent": psutil.virtual_memory().percent}
        if carried is not None and self._bytes is not None and now > self._seconds:
            found["network_mib_per_second"] = (carried - self._bytes) / MIB / (now - self._seconds)
        self._seconds, self._bytes = now, carried
        return found | self._of_gpus()

    def _of_gpus(self) -> dict[str, float]:
        if not self._gpus:
            return {}
        import pynvml

        try:
            busy = [pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu for gpu in self._gpus]
            memory = [pynvml.nvmlDeviceGetMemoryInfo(gpu) for gpu in self._gpus]
        except pynvml.NVMLError as error:  # as a GPU in parts (MIG) does
            logger.warning("the GPUs of this node do not say how busy they are (%s)", error)
            self._gpus = []
            return {}
        used = [100 * of.used / of.total for of in memory]
        return {"gpu_percent": fmean(busy), "gpu_memory_percent": fmean(used)}


def _network() -> int | None:
    """Bytes sent and received since the machine was started; None where it counts none."""
    try:
        counters = psutil.net_io_counters()
    except OSError:
        return None
    return None if counters is None else counters.bytes_sent + counters.bytes_recv


def _own_gpu() -> str | None:
    """UUID of the GPU that this rank computes on, as NVML writes it; None on a CPU."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _handles(gpus: Sequence[str]) -> list[Any]:
    """NVML's handles of GPUs; none without NVIDIA's driver or the package nvidia-ml-py."""
    if not gpus:
        return []
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByUUID(gpu) for gpu in gpus]
    except pynvml.NVMLError:
        return []

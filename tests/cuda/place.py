"""Where checks run: on the GPU, or at toy size on the CPU."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """What every check is given.

    Attributes:
        dry: toy sizes on the CPU, to see that the checks themselves work.
        scratch: folder for runs; data: folder of phantom shards.
    """

    dry: bool
    scratch: str
    data: str

    @property
    def device(self) -> torch.device:
        """The GPU; on a dry run the CPU."""
        from medvlp.device import choose_device

        return choose_device(0)

    def join(self) -> torch.device:
        """Be the one rank of a process group that lasts as long as the process, as DeepSpeed expects."""
        from medvlp import distributed

        device = distributed.initialize()
        distributed._owns_default_group = False  # so that no run ends it
        return device

    def folder(self, name: str) -> Path:
        """A new folder below `scratch`."""
        path = Path(self.scratch) / name
        path.mkdir(parents=True)
        return path

    def overrides(self, run: str, *more: str) -> list[str]:
        """The `key=value` list of a tiny run on the phantoms."""
        from tests.training.runs import TINY

        return [*TINY, f"data.root={self.data}", f"run.dir={Path(self.scratch) / run}", *more]


def free_memory(device: torch.device) -> None:
    """Begin anew to count a GPU's memory: engines that have ended are held by cycles, and peaks by CUDA."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

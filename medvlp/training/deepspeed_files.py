"""DeepSpeed's side of a checkpoint: it hands over state instead of writing it; no pickle is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from medvlp.training.state_files import StateFile, read_state

#: Classes in DeepSpeed's state beyond tensors and plain containers; records and an enum that run no code on
#: loading. The scalers are those of ZeRO (static in fp32 and bf16, dynamic in fp16).
STATE_CLASSES: list[type] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class CollectingCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Stands in for DeepSpeed's writer: `save` only remembers, `load` reads tensors and plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "collecting"
        self.collected: list[StateFile] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to make: the writer makes folders, where an error reaches all ranks."""

    def save(self, state_dict: Any, path: str) -> None:
        """Remember a file to be written by the checkpoint's writer."""
        self.collected.append(StateFile(Path(path), state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file back on the CPU; DeepSpeed copies it to where it belongs."""
        return read_state(Path(path), STATE_CLASSES)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """The manifest commits, not this."""
        return True

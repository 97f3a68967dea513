"""The latest embeddings of a rank, kept for the next refresh of the clusters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Modalities by the number stored in the bank.
MODALITIES = ("image", "text")


class EmbeddingBank:
    """A ring of float16 embeddings on the CPU; the oldest are overwritten.

    Args:
        rows: capacity; width: D.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.embeddings = torch.zeros(rows, width, dtype=torch.float16)
        self.sample = torch.full((rows,), -1, dtype=torch.int64)
        self.modality = torch.zeros(rows, dtype=torch.uint8)
        self.step = torch.full((rows,), -1, dtype=torch.int64)
        self._written = 0

    def __len__(self) -> int:
        return min(self._written, self.embeddings.shape[0])

    def add(self, embeddings: Tensor, sample: Tensor, modality: str, step: int) -> None:
        """Store [B, D] unit-norm embeddings with their [B] sample positions (at most the capacity)."""
        capacity = self.embeddings.shape[0]
        embeddings, sample = embeddings[-capacity:], sample[-capacity:]
        slots = (torch.arange(embeddings.shape[0]) + self._written) % capacity
        self.embeddings[slots] = embeddings.detach().to("cpu", torch.float16)
        self.sample[slots] = sample.cpu()
        self.modality[slots] = MODALITIES.index(modality)
        self.step[slots] = step
        self._written += embeddings.shape[0]

    def rows(self) -> Tensor:
        """[n, D] float32 embeddings, oldest first."""
        capacity = self.embeddings.shape[0]
        if self._written <= capacity:
            return self.embeddings[: self._written].float()
        return self.embeddings.roll(-(self._written % capacity), 0).float()

    def state_dict(self) -> dict[str, Any]:
        """Contents, for the checkpoint of this rank."""
        return {
            "embeddings": self.embeddings,
            "sample": self.sample,
            "modality": self.modality,
            "step": self.step,
            "written": self._written,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over stored contents.

        Raises:
            ValueError: the capacity or width has changed.
        """
        if state["embeddings"].shape != self.embeddings.shape:
            stored, own = tuple(state["embeddings"].shape), tuple(self.embeddings.shape)
            raise ValueError(f"the stored bank is {stored}, this run's is {own} (prototypes.bank_rows)")
        for name in ("embeddings", "sample", "modality", "step"):
            getattr(self, name).copy_(state[name])
        self._written = state["written"]

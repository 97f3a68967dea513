"""From the device into a ring, without making anybody wait for the device."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medvlp.prototypes.ring import EmbeddingRing

#: Copies on their way before the oldest is waited for; one step makes two for each micro-batch.
LONGEST_QUEUE = 64


class _Copy(NamedTuple):
    arrived: Any  # a torch.cuda.Event
    embeddings: Tensor
    sample: Tensor
    modality: str
    step: int
    labels: Tensor | None


class StagedRing:
    """A ring that takes embeddings from any device.

    Those on the CPU are written at once. Those on a GPU are copied into pinned memory behind the step that
    made them and written at a later `add`, when the copy has arrived. (The GPU's part has not been run for
    lack of a machine with one.)

    Attributes:
        ring: what is written to.
    """

    def __init__(self, ring: EmbeddingRing) -> None:
        self.ring = ring
        self._queue: deque[_Copy] = deque()

    def add(
        self, embeddings: Tensor, sample: Tensor, modality: str, step: int, labels: Tensor | None
    ) -> None:
        """Store [B, D] embeddings with their [B] samples and labels, both on the CPU; see `EmbeddingRing`."""
        self.flush(wait=len(self._queue) >= LONGEST_QUEUE)
        if embeddings.device.type != "cuda":
            self.ring.add(embeddings, sample, modality, step, labels)
            return
        host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
        host.copy_(embeddings.detach(), non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(embeddings.device))
        self._queue.append(_Copy(arrived, host, sample, modality, step, labels))

    def flush(self, wait: bool = False) -> None:
        """Write what has arrived, oldest first; `wait`: all that is on its way."""
        while self._queue and (wait or self._queue[0].arrived.query()):
            copy = self._queue.popleft()
            if wait:
                copy.arrived.synchronize()
            self.ring.add(copy.embeddings, copy.sample, copy.modality, copy.step, copy.labels)

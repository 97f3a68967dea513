"""What the training loop and the methods know of the prototype service, and what both kinds of it share."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from medvlp.config import PrototypesConfig
from medvlp.prototypes.ring import EmbeddingRing, StagedRing
from medvlp.prototypes.table import PrototypeTable


class PrototypeService(ABC):
    """Keeps clusters of the latest embeddings of all ranks; the defaults are right where there is no worker.

    Args:
        config: the `prototypes` section.
        count: number of clusters K.
        seed: of the start and of splits.
        ring: of this rank.

    Attributes:
        table: clusters of the present version, the same on all ranks; None before the first refresh.
    """

    def __init__(self, config: PrototypesConfig, count: int, seed: int, ring: EmbeddingRing) -> None:
        self.config = config
        self.count, self.seed = count, seed
        self.rows = StagedRing(ring)
        self.table: PrototypeTable | None = None

    @property
    def usable_table(self) -> PrototypeTable | None:
        """`table`, or None while it is too old to be used (`prototypes.stale: drop_loss`)."""
        return self.table

    def update(
        self, embeddings: dict[str, Tensor], sample: Tensor, step: int, labels: Tensor | None = None
    ) -> None:
        """Remember embeddings of this rank's samples.

        Args:
            embeddings: modality ("image", "text") -> [B, D] on any device.
            sample: [B] int64 on the CPU. step: finished steps.
            labels: [B] int64 of `medvlp.prototypes.ring.label_bits`, on the CPU.
        """
        for modality, values in embeddings.items():
            self.rows.add(values, sample, modality, step, labels)

    def assign(self, embeddings: Tensor) -> Tensor:
        """[B, D] unit-norm embeddings -> [B, K] float32 soft assignments; a collective with "sinkhorn".

        Raises:
            RuntimeError: there is no table yet.
        """
        if self.table is None:
            raise RuntimeError(
                "no clusters yet: the first refresh comes after prototypes.refresh_steps steps"
            )
        return self.table.soft_assign(embeddings)

    def refresh_due(self, step: int) -> bool:
        """Whether `step` optimiser steps end a period of `refresh_steps`."""
        return step > 0 and step % self.config.refresh_steps == 0

    @abstractmethod
    def refresh(self, step: int, anchors: Tensor | None = None) -> dict[str, float]:
        """Bring the table up to date, or ask for that, after `step` steps; returns metrics to log."""

    def proposal(self, step: int) -> list[int]:
        """Numbers of this rank for the agreement after `step` steps (see `medvlp.training.consensus`)."""
        return []

    def agree(self, greatest: list[int], step: int) -> bool:
        """Take the greatest of all ranks' latest proposals after `step` steps, maybe a new table.

        Returns:
            False: training has to wait.
        """
        return True

    def metrics(self) -> dict[str, float]:
        """What is to be logged after a step beside what a refresh returns, the same on all ranks."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state stored by this service or one of the other kind."""

    def close(self) -> None:  # noqa: B027 - most services have started nothing
        """End what was started."""

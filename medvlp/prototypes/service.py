"""The prototype service: what the training loop knows of it, and its synchronous kind."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from medvlp.config import PrototypesConfig
from medvlp.prototypes.refresh import refresh_table
from medvlp.prototypes.ring import EmbeddingRing
from medvlp.prototypes.staging import StagedRing
from medvlp.prototypes.supervisor import decline_worker, uses_workers
from medvlp.prototypes.table import PrototypeTable
from medvlp.ranks import Ranks


class PrototypeService(Protocol):
    """What the trainer's callback and the methods know of a service (see README.md beside this file)."""

    #: Clusters of the present version, the same on all ranks; None before the first refresh.
    table: PrototypeTable | None

    @property
    def usable_table(self) -> PrototypeTable | None:
        """`table`, or None while it is too old to be used (`prototypes.stale: drop_loss`)."""

    def update(
        self, embeddings: dict[str, Tensor], sample: Tensor, step: int, labels: Tensor | None = None
    ) -> None:
        """Remember this rank's embeddings of a step."""

    def assign(self, embeddings: Tensor) -> Tensor:
        """[B, D] unit-norm embeddings -> [B, K] soft assignments; a collective with balance "sinkhorn"."""

    def refresh_due(self, step: int) -> bool:
        """Whether clusters should be refreshed after `step` optimiser steps."""

    def refresh(self, step: int, anchors: Tensor | None = None) -> dict[str, float]:
        """Bring the table up to date, or ask for that, after `step` steps; returns figures to log."""

    def proposal(self, step: int) -> list[int]:
        """Numbers of this rank for the agreement after `step` steps (see `medvlp.training.agreement`)."""

    def agree(self, greatest: list[int]) -> bool:
        """Take the greatest of all ranks' proposals, maybe a new table; false: training has to wait."""

    def figures(self) -> dict[str, float]:
        """What is to be logged after a step, the same on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def close(self) -> None:
        """End what was started."""


class ServiceBase:
    """What both kinds of service share: a ring of this rank, and a table.

    Args:
        config: the `prototypes` section.
        count: number of clusters K.
        seed: of the start and of splits.
        ring: of this rank.
    """

    def __init__(self, config: PrototypesConfig, count: int, seed: int, ring: EmbeddingRing) -> None:
        self.config = config
        self.count, self.seed = count, seed
        self.rows = StagedRing(ring)
        self.table: PrototypeTable | None = None

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
        """[B, D] unit-norm embeddings -> [B, K] float32 soft assignments, balanced as configured.

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


class SynchronousService(ServiceBase):
    """Clusters of the latest embeddings of all ranks, refreshed inline, at the boundary between two steps.

    Args:
        config: the `prototypes` section.
        count: number of clusters K; width: D of the embeddings.
        seed: of the start and of splits.
    """

    def __init__(self, config: PrototypesConfig, count: int, width: int, seed: int = 0) -> None:
        super().__init__(config, count, seed, EmbeddingRing(config.bank_rows, width))

    @property
    def usable_table(self) -> PrototypeTable | None:
        """See `PrototypeService`; an inline refresh is never late."""
        return self.table

    def refresh(self, step: int, anchors: Tensor | None = None) -> dict[str, float]:
        """Cluster the rows of all ranks, warm-started from the present table; a collective.

        With too few rows the table stays as it is. Returns the figures of `refresh_table`.
        """
        self.rows.flush(wait=True)
        rows = self.rows.ring.rows()
        table, figures = refresh_table(rows, self.table, self.config, self.count, self.seed, anchors)
        self.table = table or self.table
        return figures

    def proposal(self, step: int) -> list[int]:
        """See `PrototypeService`; there is nothing to agree on."""
        return []

    def agree(self, greatest: list[int]) -> bool:
        """See `PrototypeService`."""
        return True

    def figures(self) -> dict[str, float]:
        """See `PrototypeService`; a refresh returns its own."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Table (the same on all ranks) and ring (this rank's)."""
        self.rows.flush(wait=True)
        table = None if self.table is None else self.table.state_dict()
        return {"table": table, "ring": self.rows.ring.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a stored table and, where there is one, this rank's ring.

        Without "ring" (another number of ranks, or a run with workers) the ring refills.
        """
        table = state["table"]
        self.table = None if table is None else PrototypeTable.from_state_dict(table)
        if state.get("ring") is not None:
            self.rows.ring.load_state_dict(state["ring"])

    def close(self) -> None:
        """See `PrototypeService`; there is nothing to end."""


def build_service(
    config: PrototypesConfig, size: tuple[int, int], seed: int, ranks: Ranks, device_type: str
) -> PrototypeService:
    """The service of a part with `service_size() == size`; a collective.

    Args:
        config: the `prototypes` section.
        size: number and width of the clusters. seed: of k-means.
        ranks: place of this process. device_type: of training, "cpu" or "cuda".
    """
    if not uses_workers(config, device_type == "cuda"):
        decline_worker(ranks)
        return SynchronousService(config, size[0], size[1], seed)
    from medvlp.prototypes.asynchronous import AsynchronousService

    return AsynchronousService(config, size[0], size[1], seed, ranks)

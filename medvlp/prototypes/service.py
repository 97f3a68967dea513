"""The prototype service in synchronous mode: the refresh runs inline, at the boundary between two steps."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.bank import EmbeddingBank
from medvlp.prototypes.kmeans import spherical_kmeans
from medvlp.prototypes.table import PrototypeTable


class PrototypeService(Protocol):
    """What the trainer's callback and the methods know of a service (see README.md beside this file)."""

    @property
    def table(self) -> PrototypeTable | None:
        """Clusters of the present version; None before the first refresh."""

    def update(self, embeddings: dict[str, Tensor], sample: Tensor, step: int) -> None:
        """Remember this rank's embeddings of a step."""

    def assign(self, embeddings: Tensor) -> Tensor:
        """[B, D] unit-norm embeddings -> [B, K] soft assignments; a collective with balance "sinkhorn"."""

    def refresh_due(self, step: int) -> bool:
        """Whether clusters should be refreshed after `step` optimiser steps."""

    def refresh(self) -> dict[str, float]:
        """Bring the table up to date; returns figures to log."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on identically."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


class SynchronousService:
    """Clusters of the latest embeddings of all ranks, refreshed by k-means every `refresh_steps` steps.

    Args:
        config: the `prototypes` section.
        count: number of clusters K; width: D of the embeddings.
        seed: of the start and of splits.
    """

    def __init__(self, config: PrototypesConfig, count: int, width: int, seed: int = 0) -> None:
        self.config = config
        self.count, self.seed = count, seed
        self.bank = EmbeddingBank(config.bank_rows, width)
        self.table: PrototypeTable | None = None

    def update(self, embeddings: dict[str, Tensor], sample: Tensor, step: int) -> None:
        """Remember [B, D] embeddings by modality ("image", "text") of this rank's [B] samples."""
        for modality, values in embeddings.items():
            self.bank.add(values, sample, modality, step)

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

    def refresh(self) -> dict[str, float]:
        """Cluster the banks of all ranks, warm-started from the present table; a collective.

        While all banks together hold fewer than K embeddings the table stays as it is.

        Returns:
            Figures to log: version, similarity (mean cosine to the own centroid), perplexity of cluster
            sizes as a share of K, dead share, clusters revived, rows, seconds.
        """
        started = time.perf_counter()
        rows = unit_norm(self.bank.rows())
        total = int(distributed.sum_on_host(torch.tensor(len(rows))).item())
        version = 0 if self.table is None else self.table.version
        if total < self.count:
            return {"prototypes/version": float(version), "prototypes/rows": float(total)}
        old = None if self.table is None else self.table.centroids.cpu()
        clusters = spherical_kmeans(rows, self.count, self.config.iterations, self.seed, version + 1, old)
        centroids = clusters.centroids
        if old is not None and self.config.blend < 1.0:
            centroids = unit_norm(torch.lerp(old, centroids, self.config.blend))
        share = clusters.counts / clusters.counts.sum()
        # Minus the log of the (smoothed) share against an even one: a softmax with it uses clusters evenly.
        smoothed = (clusters.counts + 1) / (clusters.counts + 1).mean()
        self.table = PrototypeTable(
            centroids,
            clusters.counts,
            -smoothed.log(),
            version + 1,
            self.config.temperature,
            self.config.balance,
        )
        perplexity = torch.special.entr(share).sum().exp() / self.count
        return {
            "prototypes/version": float(version + 1),
            "prototypes/rows": float(total),
            "prototypes/similarity": clusters.similarity,
            "prototypes/perplexity": float(perplexity),
            "prototypes/dead": float((clusters.counts == 0).float().mean()),
            "prototypes/revived": float(clusters.revived),
            "prototypes/seconds": time.perf_counter() - started,
        }

    def state_dict(self) -> dict[str, Any]:
        """Table (the same on all ranks) and bank (this rank's)."""
        table = None if self.table is None else self.table.state_dict()
        return {"table": table, "bank": self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a stored table and, where there is one, this rank's bank.

        Without "bank" (another number of ranks) the ring refills.
        """
        table = state["table"]
        self.table = None if table is None else PrototypeTable.from_state_dict(table)
        if state.get("bank") is not None:
            self.bank.load_state_dict(state["bank"])


def build_service(config: PrototypesConfig, size: tuple[int, int], seed: int = 0) -> PrototypeService:
    """The service of a method with `Method.prototype_size() == size`.

    Raises:
        ValueError: `prototypes.sync: false` asks for the asynchronous service, which does not exist yet.
    """
    if not config.sync:
        raise ValueError("prototypes.sync=false: this version has the synchronous service only")
    return SynchronousService(config, size[0], size[1], seed)

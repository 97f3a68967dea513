"""The read-only table of clusters that every rank assigns embeddings with."""

import copy
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from medvlp.distributed import logsumexp_over_ranks
from medvlp.losses.normalise import at_least_float32, unit_norm
from medvlp.losses.sinkhorn import sinkhorn
from medvlp.prototypes.board import Board, BoardError
from medvlp.prototypes.running_bias import RunningBias

BALANCES = ("sinkhorn", "bias", "none")


@dataclass(frozen=True)
class PrototypeTable:
    """One version of the clusters. All ranks hold the same one; assigning is one matrix product.

    Attributes:
        centroids: [K, D] float32, unit norm.
        counts: [K] float32, embeddings of each cluster at the refresh.
        log_bias: [K] float32 added to the scaled similarities when `balance` is "bias" and no
            `RunningBias` is at work.
        temperatures: [K] float32, positive: of soft assignments, one for each cluster.
        version: number of refreshes so far; cluster ids keep their meaning from one to the next.
        temperature: mean of `temperatures`, positive; the epsilon of Sinkhorn.
        balance: "sinkhorn" | "bias" | "none".
        running: what balances while training goes on (see `balanced_by`); no part of the version.
        fingerprint: hex digest of all but `running`, equal on all ranks that hold the same table.

    Raises:
        ValueError: shapes that do not fit, centroids that are not unit vectors, an unknown balance.
    """

    centroids: Tensor
    counts: Tensor
    log_bias: Tensor
    temperatures: Tensor
    version: int
    temperature: float = 0.1
    balance: str = "sinkhorn"
    running: RunningBias | None = field(default=None, repr=False, compare=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        clusters = self.centroids.shape[0]
        columns = (self.counts, self.log_bias, self.temperatures)
        if self.centroids.ndim != 2 or any(column.shape != (clusters,) for column in columns):
            raise ValueError(
                "a prototype table needs centroids [K, D] and counts, log_bias and temperatures [K]"
            )
        if self.balance not in BALANCES:
            raise ValueError(f"prototypes.balance={self.balance!r} is not one of {', '.join(BALANCES)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"prototypes.temperature={self.temperature} is not positive")
        if not (self.temperatures.isfinite() & (self.temperatures > 0)).all():
            raise ValueError("temperatures of a prototype table are not positive")
        lengths = torch.linalg.vector_norm(self.centroids, dim=1)
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
            raise ValueError("centroids of a prototype table are not unit vectors")
        object.__setattr__(self, "fingerprint", self._digest())

    @classmethod
    def start(
        cls, centroids: Tensor, version: int = 0, temperature: float = 0.1, balance: str = "sinkhorn"
    ) -> Self:
        """A table without counts or bias from [K, D] directions (normalised here)."""
        zeros = torch.zeros(centroids.shape[0])
        temperatures = torch.full_like(zeros, temperature)
        directions = unit_norm(centroids).float().cpu()
        return cls(directions, zeros, zeros.clone(), temperatures, version, temperature, balance)

    def scores(self, embeddings: Tensor) -> Tensor:
        """[B, D] unit-norm embeddings -> [B, K] cosine similarities in float32 or better."""
        embeddings = at_least_float32(embeddings)
        return embeddings @ self.centroids.to(embeddings.device, embeddings.dtype).T

    def assign(self, embeddings: Tensor) -> Tensor:
        """[B, D] -> [B] int64, the cluster with the highest (biased) score.

        A temperature of its own makes no cluster nearer: only soft assignments know it.
        """
        scores = self.scores(embeddings)
        if self.balance == "bias":
            scores = scores + self.temperature * self._bias(scores)
        return scores.argmax(1)

    def nearest(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[B, D] -> ([B, k] cosine similarities, [B, k] cluster ids), most similar first."""
        similarity, clusters = self.scores(embeddings).topk(min(k, self.centroids.shape[0]), dim=1)
        return similarity, clusters

    @torch.no_grad()
    def soft_assign(self, embeddings: Tensor, iterations: int = 3, every_rank: bool = True) -> Tensor:
        """[B, D] -> [B, K] float32 assignments whose rows sum to 1, without gradient.

        "sinkhorn" balances over the batch (of all ranks unless `every_rank` is false; a collective then),
        "bias" and "none" are a softmax of the biased or plain similarities; a running bias counts them.
        """
        if self.balance == "sinkhorn":
            reduce = {"reduce": logsumexp_over_ranks} if every_rank else {}
            return sinkhorn(self._logits(embeddings), 1.0, iterations, **reduce)
        assignments = self._logits(embeddings).softmax(1).float()
        if self.running is not None:
            self.running.observe(assignments)
        return assignments

    def balanced_by(self, running: RunningBias) -> Self:
        """The same table with a bias that follows the usage in training, for `balance` "bias"."""
        running.start(self.log_bias)
        return self._twin(running=running)

    def uncounted(self) -> Self:
        """The same table with its bias as it stands, for passes that are no training: they move no bias."""
        return self if self.running is None else self._twin(log_bias=self.running.log_bias, running=None)

    def to(self, device: torch.device | str) -> Self:
        """The same table with its tensors on `device`."""
        columns = ("centroids", "counts", "log_bias", "temperatures")
        return self._twin(**{name: getattr(self, name).to(device) for name in columns})

    def _twin(self, **changes: Any) -> Self:
        """A copy of the same content, so that nothing is checked and hashed again (0.3 s for 200 MB)."""
        twin = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(twin, name, value)
        return twin

    @property
    def fingerprint_number(self) -> int:
        """The first 62 bits of `fingerprint`: fits int64, with either sign."""
        return int(self.fingerprint[:16], 16) >> 2

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, for the checkpoint."""
        return {
            "centroids": self.centroids.cpu(),
            "counts": self.counts.cpu(),
            "log_bias": self.log_bias.cpu(),
            "temperatures": self.temperatures.cpu(),
            "version": self.version,
            "temperature": self.temperature,
            "balance": self.balance,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The inverse of `state_dict`."""
        return cls(**state)

    def _logits(self, embeddings: Tensor) -> Tensor:
        scores = self.scores(embeddings)
        logits = scores / self.temperatures.to(scores.device, scores.dtype)
        return logits + self._bias(scores) if self.balance == "bias" else logits

    def _bias(self, like: Tensor) -> Tensor:
        return (self.log_bias if self.running is None else self.running.log_bias).to(like)

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.version} {self.temperature!r} {self.balance}".encode())
        for tensor in (self.centroids, self.counts, self.log_bias, self.temperatures):
            digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).tobytes())
        return digest.hexdigest()[:16]


def read_table(board: Board, slot: int) -> tuple[PrototypeTable, dict[str, float]]:
    """The table in a slot, and the metrics of the refresh it came from.

    Raises:
        BoardError: it is not the table that was written there.
    """
    stored = board.table(slot)
    state = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in stored.state.items()
    }
    try:
        table = PrototypeTable.from_state_dict(state)
    except (TypeError, ValueError) as error:
        raise BoardError(f"the table on this node's board cannot be ({error})") from error
    if table.fingerprint_number != stored.fingerprint:
        raise BoardError("the table on this node's board has another fingerprint than it should")
    return table, stored.metrics


def publish_table(board: Board, table: PrototypeTable, metrics: dict[str, float]) -> None:
    """Write a refresh's table where the ranks look for it once it is said to be ready."""
    board.write_table(table.state_dict(), table.fingerprint_number, metrics)


def put_table(board: Board, table: PrototypeTable) -> None:
    """Write the table of a checkpoint and use it."""
    board.put(table.state_dict(), table.fingerprint_number)

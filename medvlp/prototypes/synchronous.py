"""The synchronous kind of prototype service, and which kind a run gets."""

from typing import Any

from torch import Tensor

from medvlp.config import PrototypesConfig
from medvlp.prototypes.asynchronous import AsynchronousService
from medvlp.prototypes.refresh import refresh_table
from medvlp.prototypes.ring import EmbeddingRing
from medvlp.prototypes.service import PrototypeService
from medvlp.prototypes.supervisor import decline_worker, uses_workers
from medvlp.prototypes.table import PrototypeTable
from medvlp.ranks import Ranks


class SynchronousService(PrototypeService):
    """Clusters of the latest embeddings of all ranks, refreshed inline, at the boundary between two steps.

    Args:
        config: the `prototypes` section.
        count: number of clusters K; width: D of the embeddings.
        seed: of the start and of splits.
    """

    def __init__(self, config: PrototypesConfig, count: int, width: int, seed: int = 0) -> None:
        super().__init__(config, count, seed, EmbeddingRing(config.bank_rows, width))

    def refresh(self, step: int, anchors: Tensor | None = None) -> dict[str, float]:
        """Cluster the rows of all ranks, warm-started from the present table; a collective.

        With too few rows the table stays as it is. Returns the metrics of `refresh_table`.
        """
        self.rows.flush(wait=True)
        rows = self.rows.ring.rows()
        table, metrics = refresh_table(rows, self.table, self.config, self.count, self.seed, anchors)
        self.table = table or self.table
        return metrics

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
    return AsynchronousService(config, size[0], size[1], seed, ranks)

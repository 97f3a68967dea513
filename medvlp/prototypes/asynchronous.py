"""The prototype service in asynchronous mode: cluster workers refresh the table behind the training."""

import logging
import os
from collections import Counter
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.prototypes.board import (
    BOARD,
    FAILED,
    PUT_OFF,
    READY,
    Board,
    BoardError,
    WorkerSettings,
)
from medvlp.prototypes.ring import EmbeddingRing
from medvlp.prototypes.service import PrototypeService
from medvlp.prototypes.supervisor import WorkerSupervisor
from medvlp.prototypes.table import PrototypeTable, put_table, read_table
from medvlp.ranks import Ranks, node_key

logger = logging.getLogger(__name__)

#: Periods without a new table after which clusters are stale, where `prototypes.max_staleness` is not set.
STALE_PERIODS = 5


class _Candidate(NamedTuple):
    """A table this rank could swap to, the request it answers, and what the refresh reported."""

    request: int
    table: PrototypeTable
    metrics: dict[str, float]


class AsynchronousService(PrototypeService):
    """Clusters of all ranks' latest embeddings, refreshed by one worker process on each node.

    A refresh is asked for, by the same number on all ranks, and goes on behind the training. All ranks swap
    to its table at the same step boundary: when they hear that all of them have read it and that their
    fingerprints are equal. Only one request is open at a time; it ends with a swap, a mismatch, too few rows,
    or the word of any node's worker that it failed. The next one is then made at the next due step.

    Args:
        config: the `prototypes` section.
        count: number of clusters K; width: D of the embeddings.
        seed: of the start and of splits.
        ranks: place of this process.

    Attributes:
        supervisor: of this node's worker, where the launcher is not the one; only on its first rank.
    """

    def __init__(
        self, config: PrototypesConfig, count: int, width: int, seed: int = 0, ranks: Ranks | None = None
    ) -> None:
        """A collective: the ranks find their nodes' boards."""
        ranks = ranks or Ranks("none")
        self.supervisor: WorkerSupervisor | None = None
        self._first = ranks.local_rank == 0
        self._local_rank = ranks.local_rank
        self._store: Any = None
        self._board = self._meet_on_board(config, count, width, seed, ranks)
        memory = self._board.ring_memory(ranks.local_rank)
        super().__init__(config, count, seed, EmbeddingRing(config.bank_rows, width, memory))
        self._request, self._step = 0, 0
        self._swapped: int | None = None
        self._candidate: _Candidate | None = None
        self._warned = False
        self._counts: Counter[str] = Counter()
        self._greatest = {"prototypes/worker_restarts": 0.0, "prototypes/dropped_rows": 0.0}
        self._news: dict[str, float] = {}

    def _meet_on_board(
        self, config: PrototypesConfig, count: int, width: int, seed: int, ranks: Ranks
    ) -> Board:
        path = os.environ.get(BOARD)
        if self._first and path is None:
            self.supervisor = WorkerSupervisor().start()
            path = self.supervisor.path
        key = node_key(ranks)
        known = distributed.gather_objects([key, self._first, path])
        nodes = sorted({node for node, _, _ in known})
        path = next(board for node, first, board in known if node == key and first)
        port = 0
        if len(nodes) > 1 and distributed.is_main():
            self._store = distributed.host_store()
            port = self._store.port
        port = distributed.broadcast_object(port)
        if self._first:
            settings = WorkerSettings(
                node=nodes.index(key),
                nodes=len(nodes),
                store=f"{ranks.address}:{port}" if port else "",
                ranks=sum(node == key for node, _, _ in known),
                rows=config.bank_rows,
                width=width,
                clusters=count,
                seed=seed,
                ring_bytes=EmbeddingRing.size(config.bank_rows, width),
                config=asdict(config),
            )
            Board(path).publish(settings)
        distributed.barrier()
        board = Board(path)
        board.read_settings()
        return board

    @property
    def staleness(self) -> int:
        """Steps since the last swap, or since training (re)started without a table."""
        return 0 if self._swapped is None else self._step - self._swapped

    @property
    def stale(self) -> bool:
        """Whether the table is older than `prototypes.max_staleness` steps."""
        limit = self.config.max_staleness
        return self.staleness > (STALE_PERIODS * self.config.refresh_steps if limit is None else limit)

    @property
    def usable_table(self) -> PrototypeTable | None:
        """See `PrototypeService`."""
        return None if self.stale and self.config.stale == "drop_loss" else self.table

    def refresh_due(self, step: int) -> bool:
        """Whether `step` steps end a period of `refresh_steps` and no request is open."""
        return not self._request and super().refresh_due(step)

    def refresh(self, step: int, anchors: Tensor | None = None) -> dict[str, float]:
        """Ask this node's worker for a refresh of what is in the ring now, by the number `step`."""
        self.rows.flush()
        if self._first:
            self._board.set_anchors(None if anchors is None else anchors.detach().float().cpu().numpy())
        self._request = step
        self._board.request(self._local_rank, step, self.rows.ring.written)
        return {}

    def proposal(self, step: int) -> list[int]:
        """What this rank sees of the open request.

        Returns:
            Number and fingerprint of a table that is ready (0, 0: none), each with its negative beside it,
            because only a maximum is formed; numbers of a request put off and of one that failed (0: none);
            restarts of this node's worker, embeddings dropped by this rank.
        """
        self._step = step
        if self._swapped is None:
            self._swapped = step - 1
        put_off, failed = self._look()
        number, fingerprint = 0, 0
        if self._candidate is not None:
            number, fingerprint = self._candidate.request, self._candidate.table.fingerprint_number
        counts = [self._board.restarts, self.rows.ring.dropped]
        return [number, -number, fingerprint, -fingerprint, put_off, failed, *counts]

    def _look(self) -> tuple[int, int]:
        """Read a table that is ready; else whether the open request was put off, or failed."""
        number, outcome = self._board.answered()
        if not self._request or number != self._request or self._candidate is not None:
            return 0, 0
        if outcome == READY:
            try:
                self._candidate = _Candidate(number, *read_table(self._board, self._board.other_slot))
            except BoardError as error:
                logger.warning("clusters of request %d are not taken: %s", number, error)
                return 0, number
        return number * (outcome == PUT_OFF), number * (outcome == FAILED)

    def agree(self, greatest: list[int], step: int) -> bool:
        """Swap, discard or go on, as all ranks do; see `proposal`.

        The proposals may be some steps old: a request made since then has another number than they speak of.

        Returns:
            False while a request is open, the table is stale and `prototypes.stale` is "block".
        """
        self._step = step
        number, negative, fingerprint, negative_fingerprint, put_off, failed, restarts, dropped = greatest
        self._greatest = {
            "prototypes/worker_restarts": float(restarts),
            "prototypes/dropped_rows": float(dropped),
        }
        # All ranks read the same maxima, so all take the same branch: that is what keeps tables equal.
        if self._request:
            # One node's word is enough to end a request: without it no table can be there on all nodes. It
            # comes first, because a node may say so while others have a table.
            if failed == self._request:
                self._end_request("failed_refreshes")
            elif put_off == self._request:
                self._end_request("put_off")
            # `-negative` is the smallest number proposed: with the greatest it says that all ranks have read
            # a table of this request (a rank without one proposes 0). Until then nobody swaps.
            elif number == -negative == self._request:
                # In the same way: smallest and greatest fingerprint are one, so all tables are.
                if fingerprint == -negative_fingerprint:
                    self._swap()
                else:
                    self._end_request("mismatches")
        self._warn_once()
        return not (self.config.stale == "block" and self.stale and self._request)

    def _end_request(self, reason: str) -> None:
        self._counts[reason] += 1
        if reason == "mismatches" and distributed.is_main():
            logger.warning(
                "the nodes' clusters of request %d differ; all ranks keep the old ones", self._request
            )
        self._request, self._candidate = 0, None

    def _swap(self) -> None:
        assert self._candidate is not None  # all ranks have proposed one
        self.table, self._news = self._candidate.table, self._candidate.metrics
        if self._first:
            self._board.use(self._board.other_slot)
        self._swapped, self._request, self._candidate = self._step, 0, None
        self._warned = False

    def _warn_once(self) -> None:
        if self.stale and not self._warned and distributed.is_main():
            does = {"continue": "training goes on with them", "block": "training waits for new ones"}
            logger.warning(
                "the clusters are %d steps old; %s (prototypes.stale, prototypes.max_staleness)",
                self.staleness,
                does.get(self.config.stale, "their losses are left out"),
            )
        self._warned = self._warned or self.stale

    def metrics(self) -> dict[str, float]:
        """Version, staleness and counts of what went wrong; at a swap also what the refresh reported.

        `worker_restarts` and `dropped_rows` are those of the node or rank with the most.
        """
        news, self._news = self._news, {}
        counts = {
            f"prototypes/{name}": float(self._counts[name])
            for name in ("mismatches", "put_off", "failed_refreshes")
        }
        version = 0 if self.table is None else self.table.version
        own = {"prototypes/version": float(version), "prototypes/staleness": float(self.staleness)}
        return news | own | counts | self._greatest

    def state_dict(self) -> dict[str, Any]:
        """The table and its age. A request on its way is forgotten; the ring refills."""
        table = None if self.table is None else self.table.state_dict()
        return {"table": table, "swapped": self._swapped, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a stored table, also of a synchronous service; before the first request."""
        table = state["table"]
        self.table = None if table is None else PrototypeTable.from_state_dict(table)
        self._swapped = state.get("swapped")
        # Older states lack the step, a synchronous service's lack both: the age begins anew.
        self._step = state.get("step", self._swapped or 0)
        if self.table is not None and self._first:
            put_table(self._board, self.table)

    def close(self) -> None:
        """End the worker, where this process has started it."""
        if self.supervisor is not None:
            self.supervisor.close()
            self.supervisor = None

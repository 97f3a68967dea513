"""Prototype tables on a board: written with their fingerprint, and checked against it when they are read."""

from __future__ import annotations

import numpy as np
import torch

from medvlp.prototypes.board import Board, BoardError
from medvlp.prototypes.table import PrototypeTable


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

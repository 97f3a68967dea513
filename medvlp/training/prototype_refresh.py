"""Runs the prototype service for methods that use one: remember embeddings, refresh, hand over the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medvlp.methods.base import Method
from medvlp.prototypes.service import PrototypeService
from medvlp.training.callbacks import BaseCallback, StepRecord


class PrototypeRefresh(BaseCallback):
    """Feeds the service after every micro-batch and refreshes it inline, between two steps.

    Args:
        method: one with `uses_service`.
        service: what clusters its embeddings.
        device: where the method reads the table.
        log: takes the figures of a refresh.
    """

    name = "prototypes"

    def __init__(
        self,
        method: Method,
        service: PrototypeService,
        device: torch.device,
        log: Callable[[dict[str, float]], None],
    ):
        self.method, self.service, self.device, self.log = method, service, device, log
        self._embeddings: list[tuple[dict[str, Tensor], Tensor, int]] = []
        method.prototype_user.keep_embeddings = True

    def on_micro_batch(self, sample: Tensor, step: int) -> None:
        """Keep the method's last embeddings until it is known whether the step was a good one."""
        self._embeddings.append((self.method.prototype_user.last_embeddings, sample, step))

    def on_step(self, record: StepRecord) -> None:
        """Remember the step's embeddings; refresh when due. All ranks swap tables at the same step."""
        if record.applied:
            for embeddings, sample, step in self._embeddings:
                self.service.update(embeddings, sample, step)
        self._embeddings.clear()
        if self.service.refresh_due(record.step):
            self.log(self.service.refresh())
            self._hand_over()

    def _hand_over(self) -> None:
        self.method.prototype_user.prototype_table = self.service.table and self.service.table.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """The service's state: the table, and this rank's bank."""
        return self.service.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.service.load_state_dict(state)
        self._hand_over()

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """The table is the same on all ranks; the banks held other ranks' samples and fill again."""
        self.load_state_dict({name: value for name, value in states[0].items() if name != "bank"})

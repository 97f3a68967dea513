"""Runs the prototype service for methods that use one: remember embeddings, refresh, hand over the table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medvlp.data.batch import Batch
from medvlp.methods.base import StepOutput
from medvlp.prototypes.ring import label_bits
from medvlp.prototypes.running_bias import RunningBias
from medvlp.prototypes.service import PrototypeService
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.callbacks import Callback, StepRecord


class PrototypeRefresh(Callback):
    """Feeds the service after every good step, has it refresh when due, and swaps tables between two steps.

    Args:
        service: what clusters its embeddings.
        device: where the method reads the table.
        log: takes metrics.
        follows: with `balance: bias`, the bias follows what the method assigns in training (see
            `PrototypeUser.assigns_softly`); else each table has its own.
        anchors: gives the [A, D] embeddings that hold the first clusters at a refresh, the same on all ranks.

    Attributes:
        table: of the service, for the next step (on the device); None: there is none, or it may not be used.
        version: of the clusters the last step was made with; 0: without any.
    """

    name = "prototypes"

    def __init__(
        self,
        service: PrototypeService,
        device: torch.device,
        log: Callable[[dict[str, float]], None],
        follows: bool,
        anchors: Callable[[], Tensor | None] = lambda: None,
    ):
        self.service, self.device, self.log = service, device, log
        self.follows, self.anchors = follows, anchors
        self.table: PrototypeTable | None = None
        self.version = 0
        self._embeddings: list[tuple[dict[str, Tensor], Tensor, int, Tensor]] = []
        self._handed_over: object = None
        self._bias: RunningBias | None = None

    def on_micro_batch(self, batch: Batch, output: StepOutput, step: int) -> None:
        """Keep the method's embeddings until it is known whether the step was a good one."""
        self.version = 0 if self.table is None else self.table.version
        self._embeddings.append((output.embeddings, batch.sample, step, label_bits(batch.labels)))

    def proposal(self, step: int) -> list[int]:
        """See `PrototypeService`."""
        return self.service.proposal(step)

    def agree(self, greatest: list[int], step: int) -> bool:
        """See `PrototypeService`."""
        return self.service.agree(greatest, step)

    def on_step(self, record: StepRecord) -> None:
        """Remember the step's embeddings; refresh when due. All ranks swap tables at the same step."""
        if record.applied:
            for embeddings, sample, step, labels in self._embeddings:
                self.service.update(embeddings, sample, step, labels)
        self._embeddings.clear()
        if self._bias is not None:
            self._bias.step(record.applied)
        metrics = self.service.metrics()
        if self.service.refresh_due(record.step):
            metrics |= self.service.refresh(record.step, self.anchors())
        if metrics:
            self.log(metrics)
        self._hand_over()

    def _hand_over(self) -> None:
        table = self.service.usable_table
        if table is not self._handed_over:
            self.table = None if table is None else self._balanced(table.to(self.device))
            self._handed_over = table

    def _balanced(self, table: PrototypeTable) -> PrototypeTable:
        if table.balance != "bias" or not self.follows:
            return table
        if self._bias is None:
            self._bias = RunningBias(len(table.counts), self.device)
        return table.balanced_by(self._bias)

    def on_end(self) -> None:
        """End the service's worker, if it is this process's."""
        self.service.close()

    def state_dict(self) -> dict[str, Any]:
        """The service's state: the table and, in synchronous mode, this rank's ring; and the running bias."""
        bias = None if self._bias is None else self._bias.state_dict()
        return self.service.state_dict() | {"running_bias": bias}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.service.load_state_dict({name: value for name, value in state.items() if name != "running_bias"})
        if self.follows and state.get("running_bias") is not None:
            self._bias = RunningBias(len(state["running_bias"]["log_bias"]), self.device)
            self._bias.load_state_dict(state["running_bias"])
        self._hand_over()

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """The table is the same on all ranks; the rings held other ranks' samples and fill again."""
        self.load_state_dict({name: value for name, value in states[0].items() if name != "ring"})

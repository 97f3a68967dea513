"""What the trainer tells its callbacks, and what a callback is."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medvlp.data.batch import Batch
from medvlp.methods.base import StepOutput
from medvlp.training.consensus import Party
from medvlp.training.engine import Engine


@dataclass
class StepRecord:
    """One finished optimiser step, as every callback sees it.

    Attributes:
        step: number of the step, from 1.
        epoch: epoch it belongs to, from 0.
        last: training ends after this step, finished or interrupted.
        finished: it is the last step of the schedule.
        save: a checkpoint of this step is wanted.
        applied: the weights were updated; false for a bad step, which leaves no trace in them.
        logged: metrics are read at this step (reading waits for the device).
        losses: "loss" and the method's terms, 0-d, detached, mean over this rank's micro-batches.
        keys: sample keys of this rank's micro-batches.
        learning_rate: scheduled value, before the groups' factors.
        samples: samples of the global batch.
        skipped: corrupt samples replaced in this rank's micro-batches.
        seconds: wall time of the step, `data_seconds` of it waiting for data (this rank).
    """

    step: int
    epoch: int
    last: bool
    applied: bool
    logged: bool
    losses: dict[str, Tensor]
    keys: list[str]
    learning_rate: float
    samples: int
    skipped: int
    seconds: float
    data_seconds: float
    engine: Engine
    finished: bool = False
    save: bool = False


class Callback(Party):
    """Something that happens between steps; does nothing by itself, subclasses override what they need.

    All ranks have the same callbacks in the same order. What `proposal` says is agreed on after a later
    step (`medvlp.training.consensus`).
    """

    #: Key of this callback's state in a checkpoint.
    name = ""

    def on_start(self, step: int) -> None:
        """Training goes on after `step` finished steps (0: a new run)."""

    def on_micro_batch(self, batch: Batch, output: StepOutput, step: int) -> None:
        """A micro-batch, on the CPU, went forward and backward; `step` finished steps lie before it."""

    def on_step(self, record: StepRecord) -> None:
        """A step is finished."""

    @property
    def finished(self) -> bool:
        """Whether training is over, whatever the schedule says; the same on all ranks."""
        return False

    def on_end(self) -> None:
        """Training has ended, in whatever way; release what is held. Errors here hide no earlier one."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values a resumed run needs (of this rank)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Take over from a run of another number of ranks; `states` are those of its ranks, in order.

        What is the same on all ranks needs no more than rank 0's.
        """
        self.load_state_dict(states[0])

"""Stops a run whose loss or gradient is no longer finite, before a checkpoint could store the damage."""

from __future__ import annotations

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.training.callbacks import BaseCallback, StepRecord
from medvlp.training.errors import NotFiniteError

#: Sample keys named in the message.
_NAMED_KEYS = 8


class FiniteCheck(BaseCallback):
    """Notes on the device at every step whether the numbers are finite; reads the notes with the metrics.

    Args:
        every: the notes are also read at every step that is a multiple of one of these (where checkpoints are
            written), besides logged steps and the last one.
        gradient: also check the gradient norm (not in fp16, where an overflow skips the step by design).
        advice: what the message tells the user to do.
    """

    name = "finite"

    def __init__(self, every: list[int], gradient: bool, advice: str):
        self.every = [interval for interval in every if interval > 0]
        self.gradient = gradient
        self.advice = advice
        self._notes: list[tuple[int, list[str], Tensor]] = []

    def on_step(self, record: StepRecord) -> None:
        """Note this step; where due, tell the other ranks and raise `NotFiniteError` on all of them."""
        finite = torch.isfinite(record.losses["loss"])
        if self.gradient:
            finite = finite & record.engine.gradient_is_finite()
        self._notes.append((record.step, record.keys, finite))
        if not (record.logged or record.last or any(record.step % interval == 0 for interval in self.every)):
            return
        flags = torch.stack([note[2] for note in self._notes]).tolist()
        bad = [(step, keys) for (step, keys, _), good in zip(self._notes, flags, strict=True) if not good]
        self._notes.clear()
        if distributed.greatest_over_ranks([float(bool(bad))])[0]:
            self._raise(bad)

    def _raise(self, bad: list[tuple[int, list[str]]]) -> None:
        everywhere = distributed.gather_objects(bad[:1])
        first = min(found[0][0] for found in everywhere if found)
        places = []
        for rank, found in enumerate(everywhere):
            if found and found[0][0] == first:
                keys = found[0][1]
                more = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
                places.append(f"rank {rank} (samples {', '.join(keys[:_NAMED_KEYS])}{more})")
        raise NotFiniteError(
            f"the loss or its gradient is not finite at step {first} on {'; '.join(places)}. {self.advice}"
        )

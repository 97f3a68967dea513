"""What all ranks agree on between two steps: to stop, and to use new clusters. One small reduction."""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from medvlp import distributed
from medvlp.training.interrupts import Interrupts

#: Seconds between two rounds while some party has training wait.
PAUSE = 0.05


class Party(Protocol):
    """Something whose ranks have to do the same thing at the same step. By default it has nothing to say."""

    def proposal(self, step: int) -> list[int]:
        """This rank's numbers after `step` steps, 64 bits, as many on every rank."""
        return []

    def agree(self, greatest: list[int], step: int) -> bool:
        """Take the greatest of all ranks' latest numbers after `step` steps; false: training has to wait."""
        return True


class Consensus:
    """Lets all ranks agree after every so many steps, on what they proposed the time before.

    The reduction travels behind the steps in between, so that nobody waits for it unless it takes longer than
    they do. One process has nothing to wait for and agrees with itself at once. Only maxima travel: add -x to
    a proposal for a minimum.

    Args:
        interrupts: a request to stop ends any waiting.
        parties: the same on all ranks, in the same order.
        every: steps from one agreement to the next.
        alive: called before every round, so that nobody takes this rank for dead.
    """

    def __init__(
        self,
        interrupts: Interrupts,
        parties: Sequence[Party] = (),
        every: int = 1,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.interrupts = interrupts
        self.parties: list[Party] = [interrupts, *parties]
        self.every = every
        self.alive = alive
        self._proposed: list[list[int]] = []
        self._greatest: Callable[[], list[int]] | None = None

    def reach(self, step: int, last: bool = False) -> bool:
        """Whether training stops after `step` steps; all ranks call this together, after every step.

        Args:
            last: what is proposed now is agreed on at once: there is no later step for it.
        """
        if step % self.every and not last:
            return False
        self.alive()
        settled = self._greatest is None or self._hear(step)
        at_once = last or not settled or distributed.world_size() == 1
        while at_once and self.interrupts.stopped_by is None:
            self._propose(step)
            if self._hear(step):
                break
            self.alive()
            time.sleep(PAUSE)
        if self.interrupts.stopped_by is None and not last and distributed.world_size() > 1:
            self._propose(step)
        return self.interrupts.stopped_by is not None

    def _propose(self, step: int) -> None:
        self._proposed = [party.proposal(step) for party in self.parties]
        numbers = [number for proposal in self._proposed for number in proposal]
        self._greatest = distributed.greatest_integers_later(numbers)

    def _hear(self, step: int) -> bool:
        """Give every party the greatest of what it proposed; whether all can go on."""
        assert self._greatest is not None  # there was a proposal
        numbers, self._greatest = iter(self._greatest()), None
        settled = [
            party.agree(list(islice(numbers, len(proposal))), step)
            for party, proposal in zip(self.parties, self._proposed, strict=True)
        ]
        return all(settled)

"""What all ranks agree on between two steps: to stop, and to use new clusters. One small reduction a step."""

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

    def agree(self, greatest: list[int]) -> bool:
        """Take the greatest of all ranks' numbers; false: training has to wait, ask again."""
        return True


def reach(
    interrupts: Interrupts,
    parties: Sequence[Party] = (),
    step: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> bool:
    """Let all ranks agree; they call this together. Only maxima travel: add -x to a proposal for a minimum.

    Args:
        interrupts: a request to stop ends any waiting.
        parties: the same on all ranks, in the same order.
        step: finished steps.
        alive: called in every round of waiting, so that nobody takes this rank for dead.

    Returns:
        Whether training stops here.
    """
    asked: list[Party] = [interrupts, *parties]
    while True:
        proposals = [party.proposal(step) for party in asked]
        numbers = iter(distributed.greatest_integers([n for proposal in proposals for n in proposal]))
        settled = [
            party.agree(list(islice(numbers, len(proposal))))
            for party, proposal in zip(asked, proposals, strict=True)
        ]
        if interrupts.stopped_by is not None or all(settled):
            return interrupts.stopped_by is not None
        alive()
        time.sleep(PAUSE)

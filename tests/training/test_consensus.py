"""What the ranks agree on between two steps."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from medvlp import distributed
from medvlp.training.consensus import reach
from medvlp.training.interrupts import Interrupts
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, train


class Votes:
    """A party that says given numbers, remembers what it heard, and waits for some rounds."""

    def __init__(self, numbers: list[int], rounds: int = 0):
        self.numbers, self.rounds = numbers, rounds
        self.heard: list[list[int]] = []

    def proposal(self, step: int) -> list[int]:
        return [number + step for number in self.numbers]

    def agree(self, greatest: list[int]) -> bool:
        self.heard.append(greatest)
        return len(self.heard) > self.rounds


def agree_over_ranks(big: int) -> tuple[list[list[int]], list[list[int]], list[list[int]], bool, int]:
    own = distributed.rank()
    pair, nothing, single = Votes([big + own, -big - own]), Votes([]), Votes([own], rounds=2)
    waited: list[int] = []
    with Interrupts() as interrupts:
        stopped = reach(interrupts, [pair, nothing, single], 0, lambda: waited.append(1))
    return pair.heard, nothing.heard, single.heard, stopped, len(waited)


@pytest.mark.dist
def test_all_ranks_hear_the_same_and_wait_together(gloo_pool: Pools) -> None:
    big = 2**61 + 1  # more than float64 can tell from its neighbour
    for pair, nothing, single, stopped, waited in gloo_pool(2).run(agree_over_ranks, big):
        assert pair == 3 * [[big + 1, -big]]
        assert nothing == 3 * [[]]
        assert single == 3 * [[1]]
        assert not stopped
        assert waited == 2


def test_the_step_is_told() -> None:
    votes = Votes([0])
    with Interrupts() as interrupts:
        reach(interrupts, [votes], 7)
    assert votes.heard == [[7]]


def test_a_request_to_stop_ends_the_waiting() -> None:
    votes = Votes([], rounds=10**9)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert reach(interrupts, [votes])
    assert interrupts.stopped_by == "SIGTERM"


def steps_with_agreement(overrides: list[str]) -> list[int]:
    from medvlp.training import trainer

    module: Any = trainer
    steps: list[int] = []

    def noting(interrupts: Interrupts, parties: Any, step: int, alive: Any) -> bool:
        steps.append(step)
        return reach(interrupts, parties, step, alive)

    before, module.reach = module.reach, noting
    try:
        train(overrides)
    finally:
        module.reach = before
    return steps


@pytest.mark.dist
def test_ranks_may_agree_in_some_steps_only(gloo_pool: Pools, overrides: Overrides) -> None:
    found = gloo_pool(2).run(steps_with_agreement, overrides("train.steps=5", "train.agree_every=2"))
    assert found == [[2, 4, 5], [2, 4, 5]]

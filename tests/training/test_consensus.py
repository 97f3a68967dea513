"""What the ranks agree on between two steps."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from medvlp import distributed
from medvlp.training.consensus import Consensus
from medvlp.training.interrupts import Interrupts
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, train
from tests.training.test_stopping import wait_until


class Votes:
    """A party that says given numbers, remembers what it heard, and waits for some rounds."""

    def __init__(self, numbers: list[int], rounds: int = 0):
        self.numbers, self.rounds = numbers, rounds
        self.heard: list[tuple[int, list[int]]] = []

    def proposal(self, step: int) -> list[int]:
        return [number + step for number in self.numbers]

    def agree(self, greatest: list[int], step: int) -> bool:
        self.heard.append((step, greatest))
        return len(self.heard) > self.rounds


def heard_over_ranks(big: int) -> tuple[list[tuple[int, list[int]]], list[tuple[int, list[int]]]]:
    own = distributed.rank()
    pair, nothing = Votes([big + own, -big - own]), Votes([])
    with Interrupts() as interrupts:
        consensus = Consensus(interrupts, [pair, nothing])
        for step in range(1, 4):
            assert not consensus.reach(step)
        assert not consensus.reach(4, last=True)
    return pair.heard, nothing.heard


@pytest.mark.dist
def test_ranks_hear_what_all_proposed_a_step_before_and_at_the_end_at_once(gloo_pool: Pools) -> None:
    big = 2**61 + 1  # more than float64 can tell from its neighbour
    for pair, nothing in gloo_pool(2).run(heard_over_ranks, big):
        # Heard after which step, proposed after which: the greatest are what rank 1 and what rank 0 said.
        told = [(2, 1), (3, 2), (4, 3), (4, 4)]
        assert pair == [(heard, [big + 1 + step, -big + step]) for heard, step in told]
        assert nothing == [(heard, []) for heard, _ in told]


def reach_while_the_other_rank_is_elsewhere(folder: Path) -> list[bool]:
    """Rank 1 comes to the agreement after step 1 only when rank 0 has left it."""
    left = folder / "left"
    with Interrupts() as interrupts:
        consensus = Consensus(interrupts)
        if distributed.rank() == 1:
            wait_until(left.exists)
        stops = [consensus.reach(1)]
        left.touch()
        stops.append(consensus.reach(2))
    return stops


@pytest.mark.dist
def test_nobody_waits_in_the_step_of_the_proposal(gloo_pool: Pools, tmp_path: Path) -> None:
    assert gloo_pool(2).run(reach_while_the_other_rank_is_elsewhere, tmp_path) == 2 * [[False, False]]


def wait_over_ranks() -> tuple[list[tuple[int, list[int]]], int]:
    waited: list[int] = []
    waiting = Votes([distributed.rank()], rounds=3)
    with Interrupts() as interrupts:
        consensus = Consensus(interrupts, [waiting], alive=lambda: waited.append(1))
        consensus.reach(1)
        consensus.reach(2)
    return waiting.heard, len(waited)


@pytest.mark.dist
def test_ranks_wait_together_for_a_party_that_asks_for_it(gloo_pool: Pools) -> None:
    for heard, alive in gloo_pool(2).run(wait_over_ranks):
        assert heard == [(2, [2]), (2, [3]), (2, [3]), (2, [3])]
        assert alive == 4  # a call, and a round that waited, each; the last two rounds are one call


def test_one_process_agrees_with_itself_at_once() -> None:
    votes = Votes([0])
    with Interrupts() as interrupts:
        Consensus(interrupts, [votes]).reach(7)
    assert votes.heard == [(7, [7])]


def test_a_request_to_stop_ends_the_waiting() -> None:
    votes = Votes([], rounds=10**9)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert Consensus(interrupts, [votes]).reach(1)
    assert interrupts.stopped_by == "SIGTERM"


def hear_every_other_step() -> list[tuple[int, list[int]]]:
    votes = Votes([0])
    with Interrupts() as interrupts:
        consensus = Consensus(interrupts, [votes], every=2)
        for step in range(1, 6):
            consensus.reach(step, last=step == 5)
    return votes.heard


@pytest.mark.dist
def test_a_message_may_travel_for_several_steps(gloo_pool: Pools) -> None:
    assert gloo_pool(2).run(hear_every_other_step) == 2 * [[(4, [2]), (5, [4]), (5, [5])]]


def steps_with_agreement(overrides: list[str]) -> list[int]:
    steps: list[int] = []
    agree = Interrupts.agree

    def noting(self: Interrupts, greatest: list[int], step: int) -> bool:
        steps.append(step)
        return agree(self, greatest, step)

    with mock.patch.object(Interrupts, "agree", noting):
        train(overrides)
    return steps


@pytest.mark.dist
def test_ranks_may_agree_in_some_steps_only(gloo_pool: Pools, overrides: Overrides) -> None:
    found = gloo_pool(2).run(steps_with_agreement, overrides("train.steps=5", "train.agree_every=2"))
    assert found == 2 * [[4, 5, 5]]

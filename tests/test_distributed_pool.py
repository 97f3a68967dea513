"""The pool itself: results in order, errors with tracebacks, recovery after a rank died."""

import os

import pytest
import torch

from medvlp import distributed
from tests.distributed_pool import GlooPool, RankError

pytestmark = pytest.mark.dist


def total(value: float) -> tuple[int, float]:
    return distributed.rank(), float(distributed.sum_over_ranks(torch.tensor(value)))


def fail_on_rank_one() -> None:
    if distributed.rank() == 1:
        raise ValueError("rank one says no")
    distributed.sum_over_ranks(torch.ones(1))


def die_on_rank_zero() -> None:
    if distributed.rank() == 0:
        os._exit(7)


def test_pool_runs_reports_and_recovers(gloo_pool):
    pool = gloo_pool(2)
    assert pool.run(total, 2.0) == [(0, 4.0), (1, 4.0)]
    with pytest.raises(RankError, match="rank one says no") as caught:
        pool.run(fail_on_rank_one)
    assert caught.value.errors[1] == "ValueError"
    with pytest.raises(RankError, match="code 7"):
        pool.run(die_on_rank_zero)
    assert pool.run(total, 3.0) == [(0, 6.0), (1, 6.0)]


def test_processes_are_kept_between_calls():
    pool = GlooPool(2)
    try:
        assert pool.run(os.getpid) == pool.run(os.getpid)
    finally:
        pool.close()

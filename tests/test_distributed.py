"""Collectives on one process without a group, and on two and four ranks."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from medvlp import distributed


def test_without_a_group_everything_is_the_identity():
    rows = torch.arange(6.0).reshape(3, 2)
    assert distributed.world_size() == 1
    assert torch.equal(distributed.gather_with_gradient(rows), rows)
    assert torch.equal(distributed.sum_over_ranks(rows), rows)
    assert distributed.gather_objects({"a": [1, None]}) == [{"a": [1, None]}]
    assert distributed.mean_over_ranks([1.5]) == distributed.greatest_over_ranks([1.5]) == [1.5]
    distributed.barrier()


def exchange() -> tuple:
    distributed.initialize()
    rank = distributed.rank()
    objects = distributed.gather_objects({"rank": rank, "text": "ü" * rank})
    return (
        objects,
        distributed.broadcast_object([rank]),
        distributed.mean_over_ranks([float(rank), 1.0]),
        distributed.greatest_over_ranks([float(rank)]),
    )


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_bookkeeping(gloo_pool, ranks):
    results = gloo_pool(ranks).run(exchange)
    assert results == [results[0]] * ranks
    objects, broadcast, mean, greatest = results[0]
    assert objects == [{"rank": rank, "text": "ü" * rank} for rank in range(ranks)]
    assert broadcast == [0]
    assert mean == [(ranks - 1) / 2, 1.0]
    assert greatest == [ranks - 1]


def contrast_gradient(rows: torch.Tensor) -> torch.Tensor:
    """Gradient, with respect to this rank's rows, of a loss over gathered rows averaged over local rows."""
    ranks, rank = distributed.world_size(), distributed.rank()
    share = rows.chunk(ranks)[rank].clone().requires_grad_()
    everyone = distributed.gather_with_gradient(share)
    centre = distributed.sum_with_gradient(share.sum(0))
    loss = torch.logsumexp(share @ everyone.T + (share @ centre)[:, None], 1).mean()
    loss.backward()
    return share.grad / ranks


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_equal_those_of_one_process(gloo_pool, ranks):
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = contrast_gradient(rows)
    found = torch.cat(gloo_pool(ranks).run(contrast_gradient, rows))
    torch.testing.assert_close(found, expected)


#: A group that does not come about, then one that does, in one process.
TEMPORARY = """
from datetime import timedelta
import torch
from medvlp import distributed

for size in (2, 1):
    try:
        with distributed.temporary_group(distributed.host_store(), 0, size, timedelta(seconds=1)):
            print(distributed.world_size(), distributed.sum_on_host(torch.tensor(5)).item())
    except RuntimeError:
        print("nobody came")
    print(distributed.is_initialized())
"""


def test_a_group_that_failed_leaves_nothing_behind():
    ended = subprocess.run([sys.executable, "-c", TEMPORARY], capture_output=True, text=True, check=True)
    assert ended.stdout.split("\n") == ["nobody came", "False", "1 5", "False", ""]


def test_a_group_that_could_not_be_formed_leaves_nothing_behind() -> None:
    """It failed in this process alone; the other one has never tried."""
    with (
        pytest.raises(RuntimeError),
        distributed.temporary_group(distributed.host_store(), 0, 2, timedelta(seconds=1)),
    ):
        pytest.fail("nobody else is there")
    store = distributed.host_store()
    program = (
        "import torch\n"
        "from datetime import timedelta\n"
        "from medvlp import distributed\n"
        "patience = timedelta(seconds=100)\n"
        f"store = distributed.connect_store('127.0.0.1', {store.port}, patience)\n"
        "with distributed.temporary_group(store, 1, 2, patience):\n"
        "    distributed.sum_on_host(torch.ones(1))\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program])
    try:
        with distributed.temporary_group(store, 0, 2, timedelta(seconds=100)):
            assert distributed.sum_on_host(torch.ones(1)).item() == 2
        assert other.wait(100) == 0
    finally:
        other.kill()
        other.wait()

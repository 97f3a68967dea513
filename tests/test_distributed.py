"""Collectives on one process without a group, and on two and four ranks."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from medvlp import distributed
from medvlp.config import DataConfig
from medvlp.data.loader import _loader
from medvlp.ranks import LAUNCHER_LOCAL_RANK, detect, tell_deepspeed
from medvlp.runs.randomness import random_state


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


@pytest.mark.parametrize("public", [True, False])
def test_time_limits_change_on_every_torch(monkeypatch, public):
    """`dist.set_timeout` exists since torch 2.14."""
    if not public:
        monkeypatch.delattr(distributed.dist, "set_timeout", raising=False)
    with distributed.temporary_group(distributed.host_store(), 0, 1, timedelta(seconds=30)):
        distributed.set_timeout(5)
        group = distributed.dist.distributed_c10d._get_default_group()
        limit = group._get_backend(torch.device("cpu")).options._timeout
    assert limit == timedelta(seconds=5 + distributed._SPARE_SECONDS)


def test_nccl_leaves_the_watchdog_time_to_speak(monkeypatch):
    limits = []
    monkeypatch.setattr(distributed.dist, "get_backend", lambda group=None: "nccl")
    monkeypatch.setattr(
        distributed.dist, "set_timeout", lambda limit, group=None: limits.append(limit), raising=False
    )
    with distributed.temporary_group(distributed.host_store(), 0, 1, timedelta(seconds=30)):
        distributed.set_timeout(5)
    assert limits == [timedelta(seconds=125)]


def test_what_nccl_remembers_is_written(monkeypatch, tmp_path):
    functions = torch._C._distributed_c10d
    monkeypatch.setattr(functions, "_dump_nccl_trace", lambda: b"collectives", raising=False)
    distributed.write_flight_record(tmp_path)
    assert not list(tmp_path.iterdir())  # no group, nothing to remember
    monkeypatch.setattr(distributed.dist, "get_backend", lambda group=None: "nccl")
    with distributed.temporary_group(distributed.host_store(), 0, 1, timedelta(seconds=30)):
        distributed.write_flight_record(tmp_path)
    assert (tmp_path / "flight-0").read_bytes() == b"collectives"


@pytest.mark.parametrize("visible", [1, 4])
def test_deepspeed_is_told_the_gpu_and_the_launcher_keeps_its_number(monkeypatch, visible):
    """A task of `srun --gpus-per-task=1` sees one GPU, number 0, whatever its place on the node."""
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv(LAUNCHER_LOCAL_RANK, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    device = distributed.choose_device(2)
    tell_deepspeed(detect(), device.index)
    assert os.environ["LOCAL_RANK"] == str(device.index) == str(2 % visible)
    assert detect().local_rank == 2


def test_a_run_on_the_cpu_beside_a_gpu_leaves_it_alone(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("this makes a CUDA context"))
    assert "cuda" not in random_state()
    loader = _loader([], [], DataConfig(), 0)
    assert not loader.pin_memory

"""Collectives on one process without a group, and on two and four ranks."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from medvlp import device, distributed
from medvlp.config import DataConfig
from medvlp.data.workers import WorkerLoader
from medvlp.ranks import LAUNCHER_LOCAL_RANK, Ranks, detect, tell_deepspeed
from medvlp.runs.randomness import random_state
from shards.errors import DataError
from tests.distributed_pool import imported


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


def backward_with_sums_forbidden(rows: torch.Tensor) -> torch.Tensor:
    """The gradient that each row gets from all ranks, in a backward pass that must not sum all rows."""
    share = rows.clone().requires_grad_()
    everyone = distributed.gather_with_gradient(share)
    factor = torch.arange(float(len(everyone)))[:, None] * (distributed.rank() + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", None)
        (everyone * factor).sum().backward()
    return share.grad


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows_send_back_each_rank_its_own(gloo_pool, dtype):
    rows = torch.ones(2, 3, dtype=dtype)
    for rank, gradient in enumerate(gloo_pool(3).run(backward_with_sums_forbidden, rows)):
        expected = torch.tensor([[12.0 * rank], [12.0 * rank + 6]]).expand(2, 3)
        assert torch.equal(gradient.float(), expected)


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable]:
    """`fresh(function, *args)` calls it in a process of this file's own.

    Here an earlier test may have trained, and the group of one process that DeepSpeed then has stays.
    """
    with ProcessPoolExecutor(1, mp_context=imported()) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(100)


def alone(seconds: int = 30, ranks: int = 1):
    """The temporary group that rank 0 of `ranks` enters, in a store of its own."""
    return distributed.temporary_group(distributed.host_store(), 0, ranks, timedelta(seconds=seconds))


def fail_then_form() -> tuple[bool, int, float, bool]:
    with pytest.raises(RuntimeError), alone(1, ranks=2):
        pytest.fail("nobody else is there")
    left = distributed.is_initialized()
    with alone():
        size, total = distributed.world_size(), distributed.sum_on_host(torch.tensor(5)).item()
    return left, size, total, distributed.is_initialized()


def test_a_group_that_failed_leaves_nothing_behind(fresh):
    assert fresh(fail_then_form) == (False, 1, 5, False)


def fail_then_meet() -> tuple[float, int]:
    with pytest.raises(RuntimeError), alone(1, ranks=2):
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
            total = distributed.sum_on_host(torch.ones(1)).item()
        return total, other.wait(100)
    finally:
        other.kill()
        other.wait()


def test_a_group_that_could_not_be_formed_leaves_nothing_behind(fresh):
    """It failed in this process alone; the other one has never tried."""
    assert fresh(fail_then_meet) == (2, 0)


def enter_twice() -> int:
    with alone():
        with pytest.raises(RuntimeError, match="group already"), alone():
            pytest.fail("it took the place of the other")
        return distributed.world_size() if distributed.is_initialized() else 0


def test_a_temporary_group_leaves_the_group_of_a_run_alone(fresh):
    assert fresh(enter_twice) == 1


def limit_of_gloo(public: bool) -> timedelta:
    with pytest.MonkeyPatch.context() as patch, alone():
        if not public:
            patch.delattr(distributed.dist, "set_timeout", raising=False)
        distributed.set_timeout(5)
        group = distributed.dist.distributed_c10d._get_default_group()
        return group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.parametrize("public", [True, False])
def test_time_limits_change_on_every_torch(fresh, public):
    """`dist.set_timeout` exists since torch 2.14."""
    assert fresh(limit_of_gloo, public) == timedelta(seconds=5 + distributed._SPARE_SECONDS)


def limits_of_nccl() -> list[timedelta]:
    limits: list[timedelta] = []
    with pytest.MonkeyPatch.context() as patch, alone():
        patch.setattr(distributed.dist, "get_backend", lambda group=None: "nccl")
        patch.setattr(
            distributed.dist, "set_timeout", lambda limit, group=None: limits.append(limit), raising=False
        )
        distributed.set_timeout(5)
    return limits


def test_nccl_leaves_the_watchdog_time_to_speak(fresh):
    assert fresh(limits_of_nccl) == [timedelta(seconds=125)]


def device_bound_by(release: tuple[int, int, int]) -> str:
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_TORCH", release)
        patch.setattr(device, "uses_cuda", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(distributed.dist, "new_group", lambda **named: None)
        patch.setattr(
            distributed.dist,
            "init_process_group",
            lambda kind, **named: found.append(f"{named['device_id']}"),
        )
        distributed.initialize(Ranks("torchrun", 1, 2, 1, 2, "127.0.0.1", 1))
    return found[0]


def test_nccl_is_told_its_gpu_where_that_does_not_hang(fresh):
    assert fresh(device_bound_by, (2, 6, 0)) == "cuda:1"
    assert fresh(device_bound_by, (2, 7, 0)) == "None"
    assert fresh(device_bound_by, (2, 7, 1)) == "cuda:1"


def record_of_nccl(folder: Path) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        functions = torch._C._distributed_c10d
        patch.setattr(functions, "_dump_nccl_trace", lambda: b"collectives", raising=False)
        distributed.write_flight_record(folder)
        without_group = any(folder.iterdir())
        patch.setattr(distributed.dist, "get_backend", lambda group=None: "nccl")
        with alone():
            distributed.write_flight_record(folder)
    return without_group


def test_what_nccl_remembers_is_written(fresh, tmp_path):
    assert not fresh(record_of_nccl, tmp_path), "no group, nothing to remember"
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
    chosen = device.choose_device(2)
    tell_deepspeed(detect(), chosen.index)
    assert os.environ["LOCAL_RANK"] == str(chosen.index) == str(2 % visible)
    assert detect().local_rank == 2


def test_a_run_on_the_cpu_beside_a_gpu_leaves_it_alone(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("this makes a CUDA context"))
    assert "cuda" not in random_state()
    assert not WorkerLoader([], [], DataConfig(), 0, 1)._loader.pin_memory


class Closed:
    """A dataset that cannot be pickled."""

    def __init__(self) -> None:
        self.name = lambda request: f"sample {request[0]}"

    def __getitem__(self, request: list[int]) -> None:
        raise DataError(self.name(request))


def loaded_where_processes_start_by(method: str) -> list[str]:
    multiprocessing.set_start_method(method, force=True)
    errors = []
    for request in ([1, 2], [3]):
        with pytest.raises(DataError) as raised:
            list(WorkerLoader(Closed(), [request], DataConfig(), 1, 2))
        errors.append(str(raised.value))
    return errors


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_data_workers_are_forks_whatever_python_would_do(fresh, method):
    assert fresh(loaded_where_processes_start_by, method) == ["sample 1", "sample 3"]

"""What a launcher tells ranks: their environment, and which of them has died."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import local
from launcher.placement import Node
from medvlp import distributed
from medvlp.device import choose_device, device_named
from medvlp.evaluation.evaluate import EvaluationOptions
from medvlp.ranks import FIRST_ERROR, LaunchError, claim_first_error, first_error
from medvlp.training.hangs import lost_rank
from shards.errors import UsageError


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (lambda process: process.kill(), "rank 5 (node 2), which was killed by SIGKILL"),
        (lambda process: process.communicate(b"3"), "rank 5 (node 2), which ended with code 3"),
    ],
)
def test_the_rank_that_died_is_named_in_the_store(
    ending: Callable[[subprocess.Popen[bytes]], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_LOOK_SECONDS", 0.02)
    store, ended = distributed.host_store(), threading.Event()
    command = [sys.executable, "-c", "import sys; sys.exit(int(sys.stdin.read()))"]
    processes = {rank: subprocess.Popen(command, stdin=subprocess.PIPE) for rank in (4, 5, 6, 7)}
    try:
        processes[4].communicate(b"0")
        processes[6].communicate(b"75")
        node = Node(3, 2, "127.0.0.1", store.port)
        thread = threading.Thread(target=local.announce_death, args=(processes, node, ended))
        thread.start()
        assert lost_rank(store) == ""
        ending(processes[5])
        thread.join(60)
        assert lost_rank(store) == said
    finally:
        ended.set()
        for process in processes.values():
            process.kill()
            process.communicate()


def test_no_rank_has_died_when_all_end_well() -> None:
    store, ended = distributed.host_store(), threading.Event()
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    thread = threading.Thread(
        target=local.announce_death, args=({0: done}, Node(1, 0, "127.0.0.1", store.port), ended)
    )
    thread.start()
    thread.join(2 * local._LOOK_SECONDS)
    assert thread.is_alive()  # it goes on looking
    ended.set()
    thread.join(60)
    assert not thread.is_alive()
    assert lost_rank(store) == ""


def test_signals_are_the_ranks_as_long_as_there_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that has trained hears Slurm's warning again, and `nohup` keeps a launcher too."""
    numbers = (*local.FORWARDED, signal.SIGHUP, signal.SIGQUIT)
    during: dict[int, Any] = {}
    start = local.start_processes

    def watched(**given: Any) -> Any:
        context = start(**given)
        wait = context.wait
        context.wait = lambda period: (
            during.update({number: signal.getsignal(number) for number in numbers}) or wait(period=period)
        )
        return context

    monkeypatch.setattr(local, "start_processes", watched)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert local.launch(["--help"], 1, has_cuda=False) == 0
        assert during[signal.SIGHUP] == signal.SIG_IGN
        assert during[signal.SIGQUIT] == before[signal.SIGQUIT]
        forwarded = {during[number] for number in local.FORWARDED}
        assert len(forwarded) == 1
        assert not forwarded & set(before.values())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert {number: signal.getsignal(number) for number in local.FORWARDED} == {
            number: before[number] for number in local.FORWARDED
        }
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("command", ["--help", "--no-such-option"])
def test_a_launch_leaves_nothing_in_the_temporary_folder(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor has it anything there that would stay when it is killed: jobs share the node's /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[list[str]] = []
    run = local._run_processes

    def looked(*arguments: Any) -> Any:
        failures = run(*arguments)
        seen.append([str(path) for path in tmp_path.rglob("*")])
        return failures

    monkeypatch.setattr(local, "_run_processes", looked)
    assert (local.launch([command], 2, has_cuda=False) == 0) == (command == "--help")
    assert seen == [[]]


def test_of_ranks_that_fail_at_once_one_shows_its_error(tmp_path: Path) -> None:
    """The claim is made under a lock, which the one that writes holds for a moment."""
    file = tmp_path / "first"
    environment = {FIRST_ERROR: str(file), "LOCAL_RANK": "1"}
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not claim_first_error(environment, 3)
    start, claims = threading.Barrier(8), []

    def claim(rank: int) -> None:
        start.wait()
        claims.append(claim_first_error(environment | {"LOCAL_RANK": str(rank)}, 10 + rank))

    threads = [threading.Thread(target=claim, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(claims) == 1
    found = first_error(file)
    assert found is not None
    assert found[1] == 10 + found[0]


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [local.ranks_here(asked) for asked in (None, 1, 4)] == [(4, True), (1, True), (4, True)]
    with pytest.raises(UsageError, match="--nproc 8: this machine has 4 GPUs"):
        local.ranks_here(8)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert [local.ranks_here(asked) for asked in (None, 8)] == [(1, False), (8, False)]


def test_gpus_that_slurm_gave_and_torch_does_not_find_are_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choices: list[Callable[[], object]] = [
        lambda: local.ranks_here(8),
        lambda: choose_device(0),  # ranks that srun or torchrun has started
        lambda: device_named("auto"),
        EvaluationOptions(Path("run")).check,
    ]
    for choose in choices:
        with pytest.raises(LaunchError, match=r"8 GPUs on .*, and torch finds none"):
            choose()
    assert device_named("cpu").type == "cpu"
    EvaluationOptions(Path("run"), device="cpu").check()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for choose in choices:
        choose()
    assert local.ranks_here(8) == (8, False)


def test_what_shall_not_use_a_gpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert [device_named(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_named("auto").type == "cpu"
    for ask in (lambda: device_named("cuda"), EvaluationOptions(Path("run"), device="cuda").check):
        with pytest.raises(UsageError, match="--device cuda: DS_ACCELERATOR=cpu forbids it"):
            ask()


def test_settings_of_the_allocator_are_the_users_if_there_are_any() -> None:
    kinds = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    found = local.library_environment(2, True, {})
    assert [found[name] for name in kinds if name in found] == ["expandable_segments:True"]
    for name in kinds:
        assert not set(kinds) & local.library_environment(2, True, {name: "max_split_size_mb:64"}).keys()
    assert not set(kinds) & local.library_environment(2, False, {}).keys()


@pytest.fixture
def two_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        (tmp_path / f"node{number}").mkdir()
    (tmp_path / "online").touch()
    monkeypatch.setattr(local, "_NUMA_NODES", tmp_path)
    monkeypatch.setattr(local.shutil, "which", {"numactl": "/usr/bin/numactl"}.get)


@pytest.mark.usefixtures("two_sockets")
def test_ranks_are_bound_to_the_socket_of_their_gpu_where_torch_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch.numa.binding", reason="torch binds from 2.9 on")
    options = local._near_their_gpus()["numa_options"]
    assert options.affinity_mode.value == "node"
    assert options.should_fall_back_if_binding_fails
    monkeypatch.setattr(local.shutil, "which", {}.get)
    assert local._near_their_gpus() == {}
    assert "numactl" in caplog.text
    caplog.clear()
    (tmp_path / "node1").rmdir()
    assert local._near_their_gpus() == {}, "a single socket"
    monkeypatch.setitem(sys.modules, "torch.numa.binding", None)
    assert local._near_their_gpus() == {}, "torch before 2.9"
    assert not caplog.text


@pytest.mark.usefixtures("two_sockets")
def test_a_rank_that_cannot_be_bound_costs_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Torch says it with the traceback, twice, for each rank; here it finds no GPU to ask for its place."""
    binding = pytest.importorskip("torch.numa.binding", reason="torch binds from 2.9 on")
    options = local._near_their_gpus()["numa_options"]
    wrap = binding._maybe_wrap_command_args_with_numa_binding
    assert wrap(("medvlp",), device_index=0, numa_options=options) == ("medvlp",)
    [record] = caplog.records
    assert record.exc_info is None
    assert record.getMessage().startswith("a rank runs on any core: No accelerator")

"""What a user sees of a mistake: one line, the documented exit code, and one rank that speaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launcher import local, main
from launcher.commands import pretrain
from medvlp import distributed
from medvlp.config import Config
from medvlp.ranks import FIRST_ERROR, LostPeerError, first_error
from medvlp.runs.errors import CheckpointError
from shards.errors import DataError
from tests.distributed_pool import GlooPool, RankError


@pytest.fixture(autouse=True)
def _the_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with an error has half a minute to end its process, which here runs further tests."""
    monkeypatch.setattr(main, "end_within", lambda seconds, code: None)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("pretrain /nowhere.yaml data.root=x run.dir=y", 2, "error: /nowhere.yaml: cannot be read"),
        ("pretrain data.root=x run.dir=y train.step=3", 2, "did you mean 'train.steps'?"),
        ("pretrain data.root=x run.dir=y train.steps=many", 2, "train.steps: Value 'many'"),
        ("pretrain train.steps=1", 2, "error: no value for data.root, run.dir"),
        ("pretrain data.root=x run.dir=y method.name=mcga", 2, "did you mean 'mgca'?"),
        ("pretrain data.root=x run.dir=y precision=fp16 train.global_batch=16", 2, "needs a CUDA device"),
        ("pretrain data.root=x run.dir=y train.global_batch=16 precision=fp32 --nproc 3", 2, "15 or 18"),
        ("config train.seed=x", 2, "train.seed"),
        ("evaluate /nowhere --data x", 4, "neither a run folder"),
        ("evaluate /nowhere --task zeroshot", 2, "--task zeroshot: there are "),
        ("export /nowhere --out x", 4, "neither a run folder"),
        ("compare /nowhere", 3, "run `medvlp evaluate` first"),
        ("shards info /nowhere", 3, "/nowhere does not exist"),
        ("shards build phantom --out /dev/null/x --image-size 64", 3, "cannot create /dev/null/x"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_its_exit_code(
    command: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["medvlp", *command.split()])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == code
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_no_arguments_show_the_usage_and_are_a_wrong_command_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("pretrain", "evaluate", "compare", "shards view"):
        monkeypatch.setattr(sys, "argv", ["medvlp", *command.split()])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert ended.value.code == 2
        told = capfd.readouterr().err
        assert f" {command} " in told.splitlines()[0]
        assert "Missing argument" in told or "Missing option" in told


def test_the_first_rank_with_an_error_shows_it(tmp_path: Path) -> None:
    environment = {FIRST_ERROR: str(tmp_path / "first"), "LOCAL_RANK": "1"}
    assert not local.may_show_error(LostPeerError("rank 1 ended"), environment)
    assert first_error(tmp_path / "first") is None
    assert local.may_show_error(DataError("broken"), environment)
    assert first_error(tmp_path / "first") == (1, 3)
    assert not local.may_show_error(DataError("also broken"), environment)
    assert local.may_show_error(DataError("no launcher"), {})
    assert local.may_show_error(DataError("x"), {FIRST_ERROR: "/nowhere/first"})


def failing(code: int, timestamp: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> ProcessFailure:
    failure = ProcessFailure(local_rank=rank, pid=0, exitcode=code, error_file="")
    monkeypatch.setattr(failure, "timestamp", timestamp)
    return failure


def test_the_exit_code_is_that_of_the_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, cause = (failing(code, time, rank, monkeypatch) for code, time, rank in [(6, 1, 0), (3, 2, 1)])
    assert local._exit_code([], None) == 0
    assert local._exit_code([lost, cause], (1, 3)) == 3
    assert capsys.readouterr().err == ""
    assert local._exit_code([lost], None) == 6
    assert "lost the connection" in capsys.readouterr().err
    for shown in (None, (0, 3)):
        assert local._exit_code([lost, failing(-9, 2, 1, monkeypatch)], shown) == 137
        assert "rank 1 was killed by SIGKILL" in capsys.readouterr().err


#: Rank 1 shows its error and takes long to end; rank 0 loses it and ends first.
SLOW_END = """
import os, sys, time
from pathlib import Path
from launcher.local import may_show_error
from shards.errors import DataError
said = Path(sys.argv[-1])
if os.environ["RANK"] == "1":
    assert may_show_error(DataError("broken"), os.environ)
    print("error: broken", file=sys.stderr, flush=True)
    said.touch()
    time.sleep(100)
while not said.exists():
    time.sleep(0.05)
os._exit(6)
"""


@pytest.mark.dist
def test_a_rank_that_is_ended_while_it_closes_has_the_code_of_its_error(tmp_path: Path) -> None:
    """Else a broken dataset looks to the job script like a preemption, after which it begins again."""
    (tmp_path / "slow.py").write_text(SLOW_END)
    rank = tmp_path / "python"
    rank.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/slow.py "$@"\n')
    rank.chmod(0o755)
    launch = (
        "import sys\nfrom launcher import local\n"
        f"sys.executable = {str(rank)!r}\n"
        f"sys.exit(local.launch([{str(tmp_path / 'said')!r}], 2, has_cuda=False))\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", launch], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.count("error: ") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_an_agreed_error_is_shown_by_rank_0(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise CheckpointError("full")

    monkeypatch.setattr("medvlp.training.run.train", fail)
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(CheckpointError if rank == 0 else SystemExit) as ended:
        pretrain._train_rank(Config(), fresh=False)
    assert rank == 0 or ended.value.code == 4  # type: ignore[attr-defined]


def leave_or_wait() -> None:
    """Rank 1 ends without a word, rank 0 waits for it and tells by an error what it made of that."""
    group = dist.new_group(backend="gloo")
    if dist.get_rank() == 1:
        os._exit(0)
    try:
        dist.barrier(group=group)
    except RuntimeError as error:
        if distributed.is_lost_peer(error):
            raise LostPeerError("rank 1 has ended") from error
        raise


@pytest.mark.dist
def test_a_rank_that_left_is_recognised() -> None:
    pool = GlooPool(2, timeout=60)
    try:
        with pytest.raises(RankError) as failed:
            pool.run(leave_or_wait)
    finally:
        pool.close()
    assert failed.value.errors[0] == "LostPeerError"

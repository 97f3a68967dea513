"""`medvlp pretrain` as a user starts it: processes, signals, exit codes, errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from torch.distributed import rendezvous
from typer.testing import CliRunner

from launcher.local import free_port, meet_here
from launcher.main import app
from launcher.placement import Node
from medvlp.config_files import ConfigError
from medvlp.ranks import LaunchError, LostPeerError
from tests.drawn_once import phantoms
from tests.launcher.forked_command import ForkedCommand, environment
from tests.training.runs import TINY, read_metrics

#: Seconds until a command counts as hanging, reached by nothing but a fault: machines may be busy.
PATIENCE = 400
pytestmark = [pytest.mark.dist, pytest.mark.timeout(3 * PATIENCE)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms") / "data", studies=60, image_size=64)


def medvlp(*arguments: str) -> tuple[int | None, str]:
    """Exit code and output of a command."""
    command = ForkedCommand(*arguments, environment=environment())
    output = command.communicate(timeout=PATIENCE)[0]
    return command.returncode, output


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher.main", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str] | ForkedCommand) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(
            (run / "metrics.jsonl").read_text().splitlines()
        ) >= steps:
            return
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"no {steps} steps in time: {process.communicate()[0]}")


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    return ["pretrain", *TINY, f"data.root={data}", f"run.dir={run}", *more]


def test_two_ranks_are_stopped_resumed_and_leave_a_whole_run_folder(data, tmp_path):
    run = tmp_path / "run"
    command = arguments(data, run, "train.steps=400", "monitor.wandb=offline", "zero.stage=2", "--nproc", "2")
    process = start(*command)
    wait_for_steps(run, 3, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 75, output
    assert "stopped by SIGTERM after a checkpoint" in output
    lines = read_metrics(run)
    stopped = lines[-1]["step"]
    assert 3 <= stopped < 400
    assert (run / "checkpoints/latest").read_text().strip() == f"step-{stopped:08d}"

    code, output = medvlp(*command[:-2], f"train.steps={stopped + 2}", "--nproc", "2")
    assert code == 0, output
    assert f"after step {stopped} of {stopped + 2}" in output
    assert "config differs from the last start" in output
    assert [line["step"] for line in read_metrics(run)] == list(range(1, stopped + 3))
    told = json.loads((run / "environment.json").read_text())
    assert told["world_size"] == 2
    assert "torch" in told["packages"]
    assert "pretrain" in told["command"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["train.global_batch=15", "--nproc", "2"], "train.global_batch=15 does not divide over 2 ranks"),
        (["train.micro_batch=3"], "train.micro_batch=3 does not divide"),
        (["precision=fp16"], "precision=fp16 needs a CUDA device"),
        (["optimizer.learning_rate=1"], "unknown key"),
    ],
)
def test_mistakes_in_the_config_end_before_anything_starts(tmp_path, more, message):
    result = CliRunner().invoke(app, arguments(tmp_path / "data", tmp_path / "run", *more))
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_a_mistake_found_by_the_ranks_is_one_clear_line(data, tmp_path):
    code, output = medvlp(*arguments(data, tmp_path / "run", "data.root=/nowhere", "--nproc", "2"))
    assert code == 3, output
    assert output.strip().splitlines() == ["error: data folder /nowhere does not exist"]
    assert not (tmp_path / "run").exists()


def test_inside_another_launcher_nproc_is_refused(tmp_path, monkeypatch):
    srun = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    for name, value in srun.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "run", "--nproc", "2"))
    assert isinstance(result.exception, LaunchError)
    assert "--nproc 2 inside srun" in str(result.exception)
    result = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "run", "--nodes", "2"))
    assert "--nodes, --node-rank and --meet inside srun" in str(result.exception)


def test_two_launchers_are_two_nodes_of_a_run(data, tmp_path):
    meet = f"127.0.0.1:{free_port()}"
    command = arguments(
        data, tmp_path / "run", "train.steps=2", "--nproc", "1", "--nodes", "2", "--meet", meet
    )
    nodes = [
        ForkedCommand(*command, "--node-rank", str(index), environment=environment()) for index in (1, 0)
    ]
    outputs = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert len(read_metrics(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2


def test_torchrun_is_joined(data, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "launcher.main",
        *arguments(data, tmp_path / "run", "train.steps=2"),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment())
    assert finished.returncode == 0, finished.stderr
    assert len(read_metrics(tmp_path / "run")) == 2
    told = json.loads((tmp_path / "run/environment.json").read_text())
    assert told["world_size"] == 2


def torchrun_of_node(node: int, port: int, *pretrain: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank", str(node),
        "-m", "launcher.main", *pretrain,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def test_a_killed_rank_is_named_on_the_other_node_of_torchrun(data, tmp_path):
    """Its agents tell each other nothing, and rank 0 takes the store along in which the ranks met."""
    run, port = tmp_path / "run", free_port()
    pretrain = arguments(data, run, "train.steps=100000", "train.max_minutes=15")
    agents = [torchrun_of_node(node, port, *pretrain) for node in range(2)]
    try:
        wait_for_steps(run, 2, agents[0])
        [first] = psutil.Process(agents[0].pid).children()
        first.kill()
        outputs = [agent.communicate(timeout=PATIENCE)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # and with it its rank, which would train for hours
            agent.wait(PATIENCE)
    assert [agent.returncode for agent in agents] == [1, 1], outputs
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert outputs[1].count("error: ") == 1, outputs[1]
    assert f"error: rank 1 lost rank 0 on {socket.gethostname()}, which is gone" in outputs[1]
    assert f"exitcode  : {LostPeerError.exit_code} " in outputs[1]


def test_the_port_of_a_run_is_nobody_elses_before_its_ranks_are_up() -> None:
    """Rank 0 imports torch for seconds; a port that is only remembered goes to whoever asks meanwhile."""
    store, node, meeting = meet_here(Node())
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("0.0.0.0", node.port))
    address = {"MASTER_ADDR": node.address, "MASTER_PORT": str(node.port)}
    with mock.patch.dict(os.environ, address | meeting):
        joined, rank, _ = next(rendezvous("env://", rank=0, world_size=1))
    joined.set("met", "here")
    assert (store.get("met"), rank) == (b"here", 0)

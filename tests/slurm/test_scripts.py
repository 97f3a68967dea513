"""Job scripts as bash runs them: what a signal leads to. Small programs stand for Slurm's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launcher.commands.submit_evaluate import finished_units
from launcher.slurm.attempts import request_cancel
from launcher.slurm.cluster_config import ClusterConfig
from launcher.slurm.command_jobs import CommandJob
from launcher.slurm.render import SlurmRequest
from launcher.slurm.submit import PretrainJob
from tests.slurm.cluster import attempts

#: srun starts one task here, and as Slurm's passes SIGUSR1 on, and ends it at SIGTERM.
SRUN = f"""#!{sys.executable}
import signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
task = subprocess.Popen(words)
signal.signal(signal.SIGUSR1, lambda *_: task.send_signal(signal.SIGUSR1))
signal.signal(signal.SIGTERM, lambda *_: task.kill())
code = task.wait()
sys.exit(128 - code if code < 0 else code)
"""


class Script:
    """A job script below `folder`, whose Slurm says `left` of the time that is left.

    `work` is what stands for the training or the command: lines of bash.
    """

    def __init__(self, folder: Path):
        # A name that looks like that of a unit, and holds a pattern.
        self.folder, self.run = folder, folder / "seed-1-[a]"
        (self.run / "slurm").mkdir(parents=True)
        self.left("7 1:00:00")
        self._program("srun", SRUN)
        self._program("squeue", f"#!/bin/bash\ncat {folder}/left\n")
        self._program("scontrol", f'#!/bin/bash\necho "$@" >>{folder}/requeued\n')
        self.processes: list[subprocess.Popen[bytes]] = []

    def _program(self, name: str, text: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def left(self, text: str) -> None:
        """What squeue answers from now on: job and time left, a line for each component."""
        (self.folder / "left").write_text(f"{text}\n")

    def site(self, work: str, setup: Sequence[str] = (), modules: Sequence[str] = ()) -> ClusterConfig:
        real = f'case "$1" in attempt) exec {sys.executable} -m launcher.main "$@" ;; esac'
        program = self._program("program", f"#!/bin/bash\n{real}\n{work}\n")
        return ClusterConfig(command=[str(program)], setup=list(setup), modules=list(modules))

    def pretrain(self, work: str, setup: Sequence[str] = (), modules: Sequence[str] = ()) -> str:
        request = SlurmRequest("a", Path("/out"), signal_seconds=4)
        site = self.site(work, setup, modules)
        return PretrainJob(request, site, self.run, "a: 1", 1, max_requeues=3).script()

    def evaluation(self, work: str, setup: Sequence[str] = (), unit: Sequence[str] = ()) -> str:
        request = SlurmRequest("a", Path("/out"), signal_seconds=4)
        finished = [finished_units(self.run, ["--task", "probe", *unit])]
        site = self.site(work, setup)
        return CommandJob("evaluate", self.run, request, site, [["evaluate"]], finished=finished).script()

    def start(self, text: str) -> subprocess.Popen[bytes]:
        path = self.folder / "job.sbatch"
        path.write_text(text)
        given = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", str(path)], stdout=log, stderr=log, env=os.environ | given, start_new_session=True
            )
        self.processes.append(process)
        return process

    def await_word(self, word: str, count: int = 1) -> None:
        """Until the log holds a word so often."""
        deadline = time.monotonic() + 120
        while (text := (self.folder / "log").read_text()).count(word) < count:
            assert time.monotonic() < deadline, text
            time.sleep(0.05)

    @property
    def requeues(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    made = Script(tmp_path)
    yield made
    for process in made.processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


#: Says that it works; asked, it saves for so long and ends as a training does.
SAVES = "trap 'echo saving; sleep {}; exit 75' USR1; echo working; while true; do sleep 0.1; done"
Render = Callable[[Script, str, Sequence[str]], str]


@pytest.mark.parametrize("render", [Script.pretrain, Script.evaluation])
def test_a_job_that_is_preempted_while_modules_are_loaded_is_requeued(script: Script, render: Render) -> None:
    job = script.start(render(script, "echo working", ["echo loading", "sleep 2"]))
    script.await_word("loading")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert script.requeues == ["requeue 7"]
    assert "working" not in (script.folder / "log").read_text()


#: As the shell function of Lmod, or of Environment Modules before version 4, which always ends with 0.
MODULE = """module() {{
    [ "$1" = load ] || return 0
    [ "$2" = python/3.11 ] || {{ echo "unknown: $2" >&2; return {code}; }}
    export LOADEDMODULES=${{LOADEDMODULES:-}}:$2
}}"""


@pytest.mark.parametrize(
    ("setup", "modules", "code", "said"),
    [
        ([MODULE.format(code=1)], ["python/3.11", "cuda/99"], 2, "the module 'cuda/99' (modules of the"),
        ([MODULE.format(code=0)], ["python/3.11", "cuda/99"], 0, "'cuda/99' was loaded already, or is not"),
        ([MODULE.format(code=1)], ["python/3.11"], 0, ""),
        (["unset -f module"], ["python/3.11"], 2, "no command 'module'"),
    ],
)
def test_a_module_that_is_not_there_ends_the_job(
    script: Script, setup: Sequence[str], modules: Sequence[str], code: int, said: str
) -> None:
    assert script.start(script.pretrain("echo working", setup, modules)).wait(120) == code
    log = (script.folder / "log").read_text()
    assert ("working" in log) is (code == 0)
    assert said in log
    assert ("module" in log) is bool(said)


def test_ranks_that_save_longer_than_the_warning_have_the_time_that_is_left(script: Script) -> None:
    job = script.start(script.pretrain(SAVES.format(5)))
    script.await_word("working")
    request_cancel(script.run, 7)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    (attempt,) = attempts(script.run)
    assert (attempt["exit_code"], attempt["decision"]) == (75, "stop")


def test_ranks_that_still_save_at_the_time_limit_are_ended_before_it(script: Script) -> None:
    script.left("7 0:01")
    job = script.start(script.pretrain(SAVES.format(600)))
    script.await_word("working")
    job.send_signal(signal.SIGUSR1)
    job.wait(120)
    (attempt,) = attempts(script.run)
    assert (attempt["exit_code"], attempt["decision"]) == (None, "requeue")


@pytest.mark.parametrize(
    ("left", "answer"),
    [
        ("7 9:08", "548 0"),
        ("7 01:00:09", "3609 0"),
        ("7 2-03:00:00", "183600 0"),
        ("7   0:00", "0 0"),
        ("7 UNLIMITED", " 0"),
        ("7 INVALID", " 1"),
        ("7 NOT_SET", " 1"),
        ("", " 1"),
        ("8 2:52\n7 5:52", "352 0"),
        ("8 UNLIMITED\n7 5:52", "352 0"),
        ("8 2:52", " 1"),
    ],
)
def test_the_time_left_is_read_as_slurm_writes_it(script: Script, left: str, answer: str) -> None:
    script.left(left)
    function = "seconds_left() {" + script.pretrain("").partition("seconds_left() {")[2].partition("\n}\n")[0]
    command = ["bash", "-c", f'{function}\n}}\nleft=$(seconds_left); echo "$left $?"']
    environment = {"PATH": f"{script.folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    assert subprocess.check_output(command, text=True, env=environment) == f"{answer}\n"


def play(script: Script, text: str, starts: int) -> list[int]:
    """Exit codes of a job whose every start is warned, as often as it is requeued or so often."""
    codes: list[int] = []
    while len(codes) < starts and len(script.requeues) == len(codes):
        job = script.start(text)
        script.await_word("working", len(codes) + 1)
        job.send_signal(signal.SIGUSR1)
        codes.append(job.wait(120))
    return codes


def test_an_evaluation_whose_time_is_too_short_for_a_unit_is_started_twice(script: Script) -> None:
    script.left("7 0:50")
    text = script.evaluation("echo working; exec sleep 60", unit=["--unit", "seed-1"])
    assert play(script, text, 4) == [138, 138]
    assert "2 starts up to the time limit finished nothing" in (script.folder / "log").read_text()
    assert not list((script.run / "slurm").glob("starts-*"))


@pytest.mark.parametrize(
    ("place", "starts"),
    [
        ("seed-1-0f/result.json", 3),
        ("seed-1-0f/trained/checkpoints/step-1/manifest.json", 3),
        ("seed-10-0f/result.json", 2),
        ("seed-1-0f/trained/events.jsonl", 2),
    ],
)
def test_an_evaluation_goes_on_as_long_as_its_starts_finish_something(
    script: Script, place: str, starts: int
) -> None:
    script.left("7 0:50")
    file = script.run / "evaluation-units/probe" / place
    work = f"sleep 0.1; mkdir -p {file.parent}; touch {file}; echo working; exec sleep 60"
    assert len(play(script, script.evaluation(work, unit=["--unit", "seed-1"]), 3)) == starts


def test_starts_that_finish_nothing_count_in_a_row(script: Script) -> None:
    script.left("7 0:50")
    file, count = script.run / "evaluation-units/probe/whole-0f/result.json", script.folder / "count"
    second = f"sleep 0.1; mkdir -p {file.parent}; touch {file}"
    work = f"echo >>{count}; [ $(wc -l <{count}) -ne 2 ] || {{ {second}; }}; echo working; exec sleep 60"
    assert len(play(script, script.evaluation(work), 5)) == 4


def test_an_evaluation_that_is_preempted_early_is_not_too_long(script: Script) -> None:
    script.left("7 30:00")
    assert len(play(script, script.evaluation("echo working; exec sleep 60"), 3)) == 3

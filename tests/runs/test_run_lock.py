"""One writer for a run folder: who is refused, and from whom the lock is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from medvlp.runs import run_lock
from medvlp.runs.errors import RunFolderError
from medvlp.runs.run_lock import LOCK, Holder, RunLock, release_after, this_process

fork = multiprocessing.get_context("fork")

HOLD = """
import sys, time
from medvlp.runs.run_lock import RunLock, this_process
RunLock(sys.argv[1], this_process(None)).acquire()
print("held", flush=True)
time.sleep(600)
"""


def hold(run_dir: Path) -> subprocess.Popen[str]:
    """Another program that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(**changes: object) -> Holder:
    """A holder that cannot be looked at from here."""
    return replace(this_process(None, {}), host="gpu07", place="gpu07 another boot", **changes)  # type: ignore[arg-type]


def write_holder(run_dir: Path, holder: Holder, seconds_ago: float = 0.0, number: int = 1) -> Path:
    path = run_dir / LOCK / str(number)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def newest(run_dir: Path) -> dict:
    """The holder in the lock file that counts."""
    path = max((run_dir / LOCK).iterdir(), key=lambda path: int(path.name))
    return json.loads(path.read_text())


def acquire(run_dir: Path, environment: dict[str, str] | None = None, over: bool | None = None) -> RunLock:
    lock = RunLock(run_dir, this_process(None, environment or {}), lambda job, uid: over)
    lock.acquire()
    return lock


def race(run_dir: str, start: object, end: object, results: object) -> None:
    lock = RunLock(run_dir, this_process(None, {}))
    start.wait(60)  # type: ignore[attr-defined]
    try:
        lock.acquire()
        results.put("won")  # type: ignore[attr-defined]
    except RunFolderError as error:
        results.put(str(error))  # type: ignore[attr-defined]
    end.wait(60)  # type: ignore[attr-defined]  # as long as the others try


@pytest.mark.parametrize(
    "change",
    [
        {"processes": {"x": "1"}}, {"processes": {"9" * 5000: "1"}}, {"processes": []}, {"restart": "0"},
        {"user": "a\x1b[2Jb"}, {"user": "\ud800"}, {"released": 1}, {"since": [[]] * 3},
    ],
)  # fmt: skip
def test_a_holder_that_no_run_writes_has_no_name_and_counts_by_its_age(tmp_path, caplog, change):
    path = write_holder(tmp_path, this_process(None, {}), 1000)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    os.utime(path, (0, 0))
    acquire(tmp_path).release()
    assert "a process that left no name gave no sign of life" in caplog.text


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b'{"host": NaN}', b"1", b" " * (1 << 17)])
def test_a_lock_file_that_is_no_record_counts_by_its_age(tmp_path, content):
    path = write_holder(tmp_path, elsewhere(), 1000)
    path.write_bytes(content)
    os.utime(path, (0, 0))
    acquire(tmp_path).release()


def test_a_pipe_and_a_strange_number_in_the_lock_folder_hold_nobody_up(tmp_path):
    (tmp_path / LOCK).mkdir()
    os.mkfifo(tmp_path / LOCK / "1")
    (tmp_path / LOCK / "²").touch()
    acquire(tmp_path).release()
    assert json.loads((tmp_path / LOCK / "2").read_text())["released"]


@pytest.mark.parametrize("before", ["nothing", "released", "dead", "dead elsewhere"])
def test_of_many_starts_at_one_moment_exactly_one_wins(tmp_path, before):
    if before == "released":
        acquire(tmp_path).release()
    if before == "dead":
        process = hold(tmp_path)
        process.kill()
        process.wait()
    if before == "dead elsewhere":
        write_holder(tmp_path, elsewhere(), seconds_ago=1000)
    count = 16
    start, end, results = fork.Barrier(count), fork.Barrier(count), fork.Queue()
    processes = [fork.Process(target=race, args=(str(tmp_path), start, end, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(60)
    assert found.count("won") == 1, found
    assert all("is being written by process" in text for text in found if text != "won")
    acquire(tmp_path).release()  # the winner has ended


def test_a_living_holder_is_named_and_its_end_by_any_signal_frees_the_folder_at_once(tmp_path):
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = hold(tmp_path)
        with pytest.raises(RunFolderError) as caught:
            acquire(tmp_path)
        text = str(caught.value)
        assert caught.value.exit_code == 4
        for part in (f"run.dir={tmp_path}", f"process {process.pid} of", os.uname().nodename, ", since 20"):
            assert part in text
        process.send_signal(number)
        process.wait()
        started = time.monotonic()
        acquire(tmp_path).release()
        assert time.monotonic() - started < 5
        assert [path.name for path in (tmp_path / LOCK).iterdir()] != []


def test_a_stopped_holder_still_holds(tmp_path):
    process = hold(tmp_path)
    process.send_signal(signal.SIGSTOP)
    path = next((tmp_path / LOCK).iterdir())
    os.utime(path, (1, 1))  # no sign of life for years
    with pytest.raises(RunFolderError, match=f"process {process.pid} of"):
        acquire(tmp_path)
    process.kill()
    process.wait()


def test_a_recycled_process_id_holds_nothing(tmp_path):
    holder = this_process(None, {})
    pid = str(os.getpid())
    write_holder(tmp_path, replace(holder, processes={pid: str(int(holder.processes[pid]) - 1)}))
    with_lock = acquire(tmp_path)
    assert newest(tmp_path)["processes"] == this_process(None, {}).processes
    with_lock.release()


def test_a_launcher_that_still_ends_its_ranks_is_waited_for(tmp_path):
    launcher = subprocess.Popen(["sleep", "2"])
    here = this_process(launcher.pid, {})
    ranks = {"4194304": "1", str(launcher.pid): here.processes[str(launcher.pid)]}  # rank 0 has ended
    write_holder(tmp_path, replace(here, processes=ranks))
    threading.Thread(target=launcher.wait, daemon=True).start()
    started = time.monotonic()
    acquire(tmp_path).release()
    assert time.monotonic() - started > 1
    assert launcher.poll() is not None


def test_a_holder_elsewhere_that_gives_signs_of_life_is_refused(tmp_path):
    path = write_holder(tmp_path, elsewhere(), seconds_ago=1)
    threading.Timer(1.0, os.utime, (path,)).start()
    with pytest.raises(RunFolderError, match="on gpu07, since"):
        acquire(tmp_path)


def test_a_silent_holder_elsewhere_is_taken_over_at_once_or_after_the_limit(tmp_path, monkeypatch):
    write_holder(tmp_path, elsewhere(), seconds_ago=run_lock.DEAD_SECONDS + 1)
    acquire(tmp_path).release()
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 2.0)
    write_holder(tmp_path, elsewhere(), number=9)
    started = time.monotonic()
    acquire(tmp_path).release()
    assert time.monotonic() - started > 1


def test_a_requeued_job_and_the_end_of_a_job_need_no_waiting(tmp_path):
    slurm = {"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "site"}
    beating = elsewhere(job="site/17", restart=0)
    write_holder(tmp_path, beating)
    started = time.monotonic()
    acquire(tmp_path, slurm | {"SLURM_RESTART_COUNT": "1"}).release()
    write_holder(tmp_path, beating, number=5)
    acquire(tmp_path, slurm | {"SLURM_JOB_ID": "18"}, over=True).release()
    assert time.monotonic() - started < 5
    path = write_holder(tmp_path, beating, number=10)
    threading.Timer(1.0, os.utime, (path,)).start()
    with pytest.raises(RunFolderError, match="in Slurm job 17, since"):
        acquire(tmp_path, slurm | {"SLURM_JOB_ID": "18"}, over=False)


def test_a_holder_that_was_taken_over_ends(tmp_path):
    program = HOLD.replace(
        "RunLock(sys", "from medvlp.runs import run_lock\nrun_lock.BEAT_SECONDS = 0.2\nRunLock(sys"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    write_holder(tmp_path, elsewhere(), number=2)
    assert process.wait(60) == 4
    assert process.stderr is not None
    said = process.stderr.read()
    assert "on gpu07, since" in said
    assert "took this process for dead" in said
    assert re.search(r"The last sign of life it gave was [0-5] s ago; it ends", said)


def test_a_damaged_lock_is_judged_by_its_age(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 1.0)
    for content in ("", "[1, 2", '{"host": 3}'):
        (tmp_path / LOCK).mkdir(exist_ok=True)
        number = max((int(path.name) for path in (tmp_path / LOCK).iterdir()), default=0) + 50
        (tmp_path / LOCK / str(number)).write_text(content)
        started = time.monotonic()
        with_lock = acquire(tmp_path)
        assert time.monotonic() - started > 0.5, "a young one may be half written"
        assert newest(tmp_path)["processes"] == this_process(None, {}).processes
        with_lock.release()


def test_a_launcher_gives_back_what_its_rank_held(tmp_path):
    write_holder(tmp_path, replace(this_process(None, {}), processes={"4194304": "1", str(os.getpid()): "x"}))
    release_after(tmp_path, os.getpid() + 1)
    assert not json.loads((tmp_path / LOCK / "1").read_text())["released"]
    release_after(tmp_path, os.getpid())
    assert json.loads((tmp_path / LOCK / "1").read_text())["released"]
    release_after(tmp_path / "nowhere", 1)

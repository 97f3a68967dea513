"""Full, slow and failing disks: a tmpfs that runs full, fsyncs that are delayed, fsyncs that fail.

strace tampers with the system calls of the real processes on a real file system; no code of ours is replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.manifest import step_folder
from tests.drills.outcomes import Case, DrillError, expect
from tests.drills.process import Pretraining, read_lines
from tests.drills.workplace import SAVE_EVERY, STEPS, Workplace

#: Seconds by which every fsync is delayed. A checkpoint of two ranks takes a dozen of them.
_DELAY = 0.3


def cases(place: Workplace) -> list[Case]:
    """Full disks, one with room again later; slow fsyncs; failing ones, for a while and for good."""
    return [
        Case("disk", "ENOSPC on a tmpfs", lambda: _full(place)),
        Case("disk", "ENOSPC until there is room again", lambda: _full_for_a_while(place)),
        Case("disk", f"every fsync takes {_DELAY:g} s", lambda: _slow(place)),
        Case("disk", "fsync fails twice (EIO)", lambda: _failing_for_a_while(place)),
        Case("disk", "fsync fails for good (EIO)", lambda: _failing(place)),
    ]


@contextmanager
def _tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `folder`."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "medvlp-drill", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if mounted.returncode:
        raise DrillError(
            f"no tmpfs ({mounted.stderr.strip()}): run as root, or as "
            "`unshare --map-root-user --mount make drill`"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _checkpoint_bytes(place: Workplace) -> int:
    folder = place.whole_folder / "checkpoints" / step_folder(STEPS)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _full(place: Workplace) -> str:
    keep = "checkpoint.keep_last=0"
    retries = ("checkpoint.retries=1", "checkpoint.retry_seconds=0.2")
    folder = place.folder / "full"
    with _tmpfs(folder / "checkpoints", int(3.5 * _checkpoint_bytes(place))) as disk:
        with place.start(folder, keep, *retries) as run:
            code, text = run.end(), run.output()
        expect(code == 4, f"ended with code {code}: {text[-300:]}")
        expect("No space left on device" in text and "Earlier checkpoints are untouched" in text, text[-300:])
        last = step_folder(3 * SAVE_EVERY)
        newest = Checkpoint.find(folder)
        expect(newest is not None and newest.name == last, f"the newest good checkpoint is {newest}")
        expect(not list(disk.glob(".*.partial")), "something half-written was left")
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        place.resume_and_compare(folder, keep)
    return f"code 4, {last} is good, nothing half-written left; with more room resumed, bit-identical"


def _full_for_a_while(place: Workplace) -> str:
    folder = place.folder / "full-for-a-while"
    with _tmpfs(folder / "checkpoints", 5 * _checkpoint_bytes(place)) as disk:
        filler = disk / "filler"
        with place.start(folder, "checkpoint.retries=8", "checkpoint.retry_seconds=0.5") as run:
            run.wait_for_step(SAVE_EVERY + 1)
            _fill(filler)
            run.wait_until(lambda: "trying again in" in run.output(), "a failed write", pause=0.05)
            filler.unlink()
            run.finish()
            text = run.output()
        expect("No space left on device" in text, f"it was not full: {text[-300:]}")
        place.compare(folder)
    return f"{text.count('trying again in')} failed writes, went on when there was room, bit-identical"


def _fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def _strace(inject: str, path: Path | None = None) -> tuple[str, ...]:
    """strace as a command's prefix: tampers with fsync, of all files or of one, and writes nothing down."""
    program = shutil.which("strace")
    if program is None:
        raise DrillError("needs strace: apt-get install strace")
    only = () if path is None else ("-P", str(path))
    return (
        program, "-f", "-qq", "--seccomp-bpf", "-o", os.devnull, *only,
        "-e", "trace=fsync", "-e", f"inject=fsync:{inject}",
    )  # fmt: skip


def _slow(place: Workplace) -> str:
    folder = place.folder / "slow"
    with place.start(folder, prefix=_strace(f"delay_enter={int(1e6 * _DELAY)}")) as run:
        run.finish()
        meanwhile = _steps_during_first_save(run)
    place.compare(folder)
    waits = [line["checkpoint/wait_seconds"] for line in read_lines(folder / "metrics.jsonl")
             if "checkpoint/wait_seconds" in line]  # fmt: skip
    expect(meanwhile > 0, "the loop stood still during a save")
    expect(max(waits) > _DELAY, f"it reports waits of {waits} s only")
    return (
        f"{meanwhile} steps during the first save, the next saves waited up to {max(waits):.1f} s and "
        "reported it; bit-identical"
    )


def _steps_during_first_save(run: Pretraining) -> int:
    """Steps that were logged between the step of the first save and the message that it is finished."""
    before = run.output().split(f"checkpoint {step_folder(SAVE_EVERY)}:")[0]
    return before.count(" step ") - SAVE_EVERY


def _weights(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f".{step_folder(step)}.partial" / "weights.safetensors"


def _failing_for_a_while(place: Workplace) -> str:
    folder, step = place.folder / "failing-for-a-while", 2 * SAVE_EVERY
    # strace counts per thread, and each save has a thread of its own.
    prefix = _strace("error=EIO:when=1..2", _weights(folder, step))
    with place.start(folder, "checkpoint.retry_seconds=0.2", prefix=prefix) as run:
        run.finish()
        failures = run.output().count("writing the checkpoint failed (Input/output error); trying again")
    expect(failures == 2, f"{failures} failed writes were reported: {run.tail()}")
    place.compare(folder)
    return (
        f"save of step {step}: {failures} failures reported, third try durable; run finished, bit-identical"
    )


def _failing(place: Workplace) -> str:
    folder, step = place.folder / "failing", 2 * SAVE_EVERY
    prefix = _strace("error=EIO", _weights(folder, step))
    options = ("checkpoint.retries=2", "checkpoint.retry_seconds=0.1")
    with place.start(folder, *options, prefix=prefix) as run:
        code, text = run.end(), run.output()
    expect(code == 4, f"ended with code {code}: {text[-300:]}")
    expect(f"the checkpoint of step {step} cannot be written" in text, f"unclear: {text[-300:]}")
    expect("Input/output error after 3 tries (rank 0)" in text, f"unclear: {text[-300:]}")
    newest = Checkpoint.find(folder)
    good = step_folder(step - SAVE_EVERY)
    expect(newest is not None and newest.name == good, f"the newest good checkpoint is {newest}")
    place.resume_and_compare(folder)
    return f"code 4 after 3 tries, {good} is good; resumed on a healthy disk, bit-identical"

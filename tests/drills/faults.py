"""Poisoned batches, and ranks and data workers that are stopped or killed: what is documented must happen.

The documentation is medvlp/training/README.md, "Exit codes" and "Guarantees".
"""

from __future__ import annotations

import math
import os
import signal
import time
from functools import partial
from pathlib import Path

from tests.drills.outcomes import Case, expect
from tests.drills.process import Pretraining, read_lines
from tests.drills.workplace import BATCH, RUN, SAVE_EVERY, STEPS, STUDIES, Workplace

_POISON = Path(__file__).parent / "poison"
#: Longest time from the death of a data worker to the end of all ranks.
WORKER_SECONDS = 15.0
#: Step (from 1) one of whose images is NaN.
_POISONED_STEP = 5


def cases(place: Workplace) -> list[Case]:
    """Every fault once, and the resume after those that end a run."""
    return [
        Case("fault", "one NaN image", lambda: _poisoned(place)),
        Case("fault", "every step bad (a NaN image in each batch)", lambda: _all_bad(place)),
        Case("fault", "SIGSTOP to a rank", lambda: _stopped(place)),
        Case("fault", "SIGKILL to a rank", lambda: _killed(place)),
        *[
            Case(
                "fault", f"data worker: {how}, ranks {ranks}, workers {workers}",
                partial(action, place, ranks, workers),
            )
            for how, action in (("SIGKILL", _worker_killed), ("an error nobody foresaw", _worker_failed))
            for ranks in (1, 2)
            for workers in (1, 2)
        ],
    ]  # fmt: skip


def _poisoned(place: Workplace) -> str:
    line = read_lines(place.whole_folder / "samples.jsonl")[_POISONED_STEP - 1]
    rank, key = 1, line["keys"][1][0]
    folder = place.folder / "poisoned"
    path = os.pathsep.join(filter(None, [str(_POISON), os.environ.get("PYTHONPATH", "")]))
    with place.start(folder, PYTHONPATH=path, MEDVLP_DRILL_POISON=key) as run:
        run.finish()
    events = [e for e in read_lines(folder / "events.jsonl") if e["kind"] == "loss_not_finite"]
    seen = STEPS * BATCH // STUDIES  # the sample comes once an epoch
    expect(len(events) >= 1 and events[0]["step"] == _POISONED_STEP, f"events: {events}")
    named = [(entry["rank"], key in entry["keys"]) for entry in events[0]["ranks"]]
    expect((rank, True) in named, f"rank {rank} and sample {key} are not named: {events[0]}")
    lines = read_lines(folder / "metrics.jsonl")
    expect(len(events) == seen == lines[-1]["train/bad_steps"], f"{len(events)} events, {lines[-1]}")
    bad = [event["step"] for event in events]
    others = [line["loss"] for line in lines if line["step"] not in bad]
    expect(all(loss is not None and math.isfinite(loss) for loss in others), "NaN in other steps")
    before = [line["loss"] for line in lines[: _POISONED_STEP - 1]]
    expect(before == place.whole.losses[: _POISONED_STEP - 1], "the steps before differ")
    return f"steps {bad} skipped on both ranks, sample and rank in events.jsonl, run finished with code 0"


def _all_bad(place: Workplace) -> str:
    folder = place.folder / "all-bad"
    with place.start(folder, f"train.steps={SAVE_EVERY}") as run:
        run.finish()
    path = os.pathsep.join(filter(None, [str(_POISON), os.environ.get("PYTHONPATH", "")]))
    poison = {"PYTHONPATH": path, "MEDVLP_DRILL_POISON": "*"}
    with place.start(folder, "checkpoint.every_steps=0", **poison) as run:
        code, text = run.end(), run.output()
    expect(code == 5, f"ended with code {code}: {text[-300:]}")
    good = folder / "checkpoints" / f"step-{SAVE_EVERY:08d}"
    expect("4 skipped steps in a row" in text and str(good) in text, f"unclear: {text[-400:]}")
    return f"code 5 after 4 bad steps in a row, message points at {good.name}"


def _started(place: Workplace, name: str, *more: str) -> Pretraining:
    run = place.start(place.folder / name, *more)
    run.wait_for_step(SAVE_EVERY + 2)
    return run


def _stopped(place: Workplace) -> str:
    with _started(place, "stopped", "train.step_timeout_seconds=4") as run:
        run.rank(1).send_signal(signal.SIGSTOP)
        seconds = _end(run, 7, "error: rank 0 has waited 4 s", "rank 1 does not answer")
        kinds = [event["kind"] for event in read_lines(run.folder / "events.jsonl")]
    expect(kinds == ["start", "hang"], f"events: {kinds}")
    place.resume_and_compare(run.folder)
    return f"code 7 after {seconds:.0f} s, rank 1 named; resumed, bit-identical"


def _killed(place: Workplace) -> str:
    with _started(place, "killed") as run:
        run.rank(1).kill()
        seconds = _end(run, 128 + signal.SIGKILL, "error: rank 1 was killed by SIGKILL")
    place.resume_and_compare(run.folder)
    return f"code 137 after {seconds:.0f} s, rank 1 named; resumed, bit-identical"


def _worker_killed(place: Workplace, ranks: int, workers: int) -> str:
    options = (*RUN, f"data.root={place.data}", f"data.workers={workers}")
    folder = place.folder / f"worker-killed-{ranks}-{workers}"
    with Pretraining(folder, options, ranks) as run:
        run.wait_for_step(SAVE_EVERY + 2)
        victim = run.data_workers(ranks - 1)[-1]
        victim.kill()
        named = f"rank {ranks - 1}: data worker {workers - 1} (process {victim.pid}) was killed by SIGKILL"
        seconds = _end(run, 3, named, "lower data.workers", within=WORKER_SECONDS)
    if ranks == 2:  # the uninterrupted run has two
        place.resume_and_compare(folder, f"data.workers={workers}")
    return f"code 3 after {seconds:.0f} s, worker and signal named" + ("; resumed" if ranks == 2 else "")


def _worker_failed(place: Workplace, ranks: int, workers: int) -> str:
    options = (*RUN, f"data.root={place.data}", f"data.workers={workers}")
    path = os.pathsep.join(filter(None, [str(_POISON), os.environ.get("PYTHONPATH", "")]))
    folder = place.folder / f"worker-failed-{ranks}-{workers}"
    failed = folder.with_suffix(".failed")
    variables = {"PYTHONPATH": path, "MEDVLP_DRILL_FAIL": "7", "MEDVLP_DRILL_FAILED": str(failed)}
    with Pretraining(folder, options, ranks, (), variables) as run:
        _end(run, 3, "failed: MemoryError in", ": data worker ")
        seconds = time.time() - failed.stat().st_mtime
    expect(seconds < WORKER_SECONDS, f"ended only {seconds:.0f} s after the error")
    return f"code 3 {seconds:.0f} s after the error, worker and error named"


def _end(run: Pretraining, code: int, *messages: str, within: float = 120.0) -> float:
    """Wait for an end with this code and these messages; the seconds until then."""
    started = time.monotonic()
    found = run.end(within)
    seconds = time.monotonic() - started
    text = run.output()
    expect(found == code, f"ended with code {found}: {text[-300:]}")
    for message in messages:
        expect(message in text, f"no {message!r} in: {text[-300:]}")
    return seconds

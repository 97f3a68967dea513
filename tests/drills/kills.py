"""Runs killed with SIGKILL at seeded random moments; every one must end like the one nobody killed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medvlp.runs.manifest import step_folder
from tests.drills.opens import Opens
from tests.drills.outcomes import Case, Listing, Outcome, expect
from tests.drills.process import Pretraining
from tests.drills.workplace import SAVE_EVERY, STEPS, Workplace

#: Seconds up to which a kill comes later than what it waits for: about two steps, or one save.
_LATER = 0.15
#: Two ranks open files of a checkpoint 31 times before they say that they resume: 7 to verify, 8 for the
#: weights, then, after the engine is made, 16 for all other state.
_OPENS = 28


@dataclass
class Kill:
    """One planned kill.

    Attributes:
        kind: "start" (before the first step), "step", "save" or "load".
        moment: what is waited for: the share of the time of a start; a step; the step of a save; how many
            times a file of a checkpoint has been opened.
        later: seconds from then to the kill.
    """

    kind: str
    moment: float
    later: float

    def __str__(self) -> str:
        texts = {
            "start": f"{100 * self.moment:.0f} % of a start",
            "step": f"step {self.moment:.0f} + {1000 * self.later:.0f} ms",
            "save": f"save of step {self.moment:.0f} + {1000 * self.later:.0f} ms",
            "load": f"open {self.moment:.0f} of a checkpoint file + {1000 * self.later:.0f} ms",
        }
        return texts[self.kind]


#: What happens to run i is entry i modulo their number.
_PATTERNS = [
    ("step",), ("save",), ("step", "load"), ("save",), ("save", "load"), ("step", "step"), ("start",),
    ("step",), ("save", "save"), ("step", "load"),
]  # fmt: skip


def plan(seed: int, number: int) -> list[Kill]:
    """The kills of run `number`; the same for the same seed."""
    draw = random.Random(f"{seed}/{number}")
    kills: list[Kill] = []
    reached = 0
    pattern = _PATTERNS[number % len(_PATTERNS)]
    # What is to be loaded must have been saved: the save of step 6 has waited for that of step 3.
    earliest = 2 * SAVE_EVERY + 1 if "load" in pattern else 1
    for kind in pattern:
        later = _LATER * draw.random() ** 2  # the sooner the more often: files are written at once
        if kind == "start":
            kills.append(Kill(kind, draw.uniform(0.1, 0.95), 0.0))
        elif kind == "load":
            kills.append(Kill(kind, draw.randint(1, _OPENS), later / 10))
        else:
            # Far enough from the end that the run is still there.
            first = max(reached + 1, earliest)
            step = draw.randint(first, max(first, STEPS - (7 if reached else 10)))
            if kind == "save":
                step = -(-step // SAVE_EVERY) * SAVE_EVERY
            kills.append(Kill(kind, step, later))
            reached = step
    return kills


class Kills:
    """All runs that are killed, and what was seen of their kills.

    Args:
        place: where.
        runs: how many.
    """

    def __init__(self, place: Workplace, runs: int):
        self.place, self.runs = place, runs
        self._seen: list[list[str]] = [[] for _ in range(runs)]

    def cases(self) -> list[Case]:
        """Each run with its kills and resumes."""
        return [Case("kill -9", f"run {n + 1}", partial(self._run, n)) for n in range(self.runs)]

    def _run(self, number: int) -> str:
        _kill_and_resume(self.place, number, self._seen[number])
        return "; ".join(self._seen[number])

    def summary(self, outcomes: Sequence[Outcome]) -> tuple[Outcome, Listing]:
        """All runs in one row, and a table of every kill; `outcomes` are those of `cases`, in order."""
        same = sum(outcome.passed for outcome in outcomes)
        kills = [kill for seen in self._seen for kill in seen]
        saves, loads = (sum(f"inside a {what}" in kill for kill in kills) for what in ("save", "load"))
        twice = sum(len(seen) > 1 for seen in self._seen)
        told = (
            f"{same} of {self.runs} bit-identical; {len(kills)} kills, {saves} inside a save, {loads} inside "
            f"a load, {twice} runs killed twice; samples exactly once per epoch in each"
        )
        shown = same == self.runs and (self.runs < len(_PATTERNS) or min(saves, loads, twice) > 1)
        seconds = sum(outcome.seconds for outcome in outcomes)
        rows = [
            (
                str(n + 1),
                "; ".join(map(str, plan(self.place.seed, n))),
                "; ".join(self._seen[n]),
                "bit-identical" if outcome.passed else f"FAILED: {outcome.seen}",
            )
            for n, outcome in enumerate(outcomes)
        ]
        title = f"kills of seed {self.place.seed}"
        return (
            Outcome("kill -9", f"{self.runs} runs killed at random moments", shown, told, seconds),
            Listing(title, ("run", "planned", "seen", "result"), rows),
        )


def _kill_and_resume(place: Workplace, number: int, seen: list[str]) -> None:
    folder = place.folder / "kills" / f"{number + 1:02d}"
    workers = f"data.workers={number % 2}"
    for kill in plan(place.seed, number):
        with place.start(folder, workers) as run:
            opened = _wait(place, run, kill)
            expect(run.kill(), f"the run was over before the kill at {kill}: {run.tail()}")
            seen.append(_where(run, kill, opened))
    place.resume_and_compare(folder, workers)


def _wait(place: Workplace, run: Pretraining, kill: Kill) -> str:
    """Wait for the moment of a kill; the file of a checkpoint that was opened last, for one in a load."""
    opened = ""
    if kill.kind == "start":
        time.sleep(kill.moment * place.start_seconds)
    elif kill.kind == "step":
        run.wait_for_step(int(kill.moment))
    elif kill.kind == "save":
        folder = run.folder / "checkpoints" / f".{step_folder(int(kill.moment))}.partial"
        run.wait_until(folder.exists, f"the save of step {kill.moment:.0f}", pause=0.0005)
    else:
        with Opens(_folders(run.folder / "checkpoints")) as opens:
            run.wait_until(
                lambda: opens.wait(0.05) >= kill.moment, f"open {kill.moment:.0f} of a file", pause=0
            )
            opened = opens.names[-1]
    time.sleep(kill.later)
    return opened


def _where(run: Pretraining, kill: Kill, opened: str) -> str:
    """What disk and output tell about where the kill hit."""
    text = run.output()
    trained = ": no step" if " step " not in text else f" after step {run.steps()}"
    if kill.kind == "load":
        inside = "resuming" not in text
        return f"inside a load (at {opened})" if inside else f"behind a load{trained}"
    partial = _partial(run.folder)
    if partial and trained != ": no step":
        files = sum(path.is_file() for path in partial[-1].rglob("*"))
        closed = " with its manifest" if (partial[-1] / "manifest.json").exists() else ""
        return f"inside a save ({files} of 5 files{closed}){trained}"
    return ("in the start" if kill.kind == "start" else "between saves") + trained


def _partial(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob(".step-*.partial"))


def _folders(checkpoints: Path) -> list[Path]:
    """The folders of all checkpoints, with those in them."""
    tops = sorted(checkpoints.glob("step-*"))
    return [*tops, *(path for top in tops for path in top.iterdir() if path.is_dir())]

"""`python -m tests.drills`: kill, starve and damage real runs; one table, and code 1 if anything was lost."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from tests.drills import damage, disks, elastic, faults, hostile, prototypes
from tests.drills.kills import Kills
from tests.drills.outcomes import Case, Outcome, attempt, markdown, show
from tests.drills.process import stopping
from tests.drills.workplace import Workplace

DRILLS = ("kills", "elastic", "damage", "disks", "faults", "hostile", "prototypes")


def main() -> int:
    """Run the drills; the exit code."""
    arguments = _arguments()
    logging.getLogger("medvlp").addHandler(logging.NullHandler())  # damage is told in the table
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    place = Workplace(arguments.out, arguments.seed)
    whole = attempt(Case("whole", "uninterrupted run", lambda: _train_whole(place)))
    outcomes, listings = [whole], []
    if whole.passed:
        wanted = arguments.only or DRILLS
        killed = Kills(place, arguments.kills if "kills" in wanted else 0)
        cases = killed.cases()
        modules = (elastic, damage, disks, faults, hostile, prototypes)
        for name, module in zip(DRILLS[1:], modules, strict=True):
            cases += module.cases(place) if name in wanted else []
        found = _attempt_all(cases, arguments.parallel)
        if killed.runs:
            outcome, listing = killed.summary(found[: killed.runs])
            outcomes, listings = [*outcomes, outcome], [listing]
        outcomes += found[killed.runs :]
    seconds = time.monotonic() - started
    show(outcomes, listings, Console())
    (place.folder / "results.md").write_text(markdown(outcomes, listings, seconds), encoding="utf-8")
    print(f"{seconds / 60:.1f} minutes; {place.folder / 'results.md'}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _attempt_all(cases: Sequence[Case], parallel: int) -> list[Outcome]:
    """Run cases some at a time: a start of a run is mostly one core importing, or ranks waiting."""
    with ThreadPoolExecutor(parallel) as pool:
        try:
            return list(pool.map(attempt, cases))
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise


def _train_whole(place: Workplace) -> str:
    place.train_whole()
    return f"{len(place.whole.losses)} steps on 2 ranks, each sample exactly once per epoch"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/drill"), help="a new folder, or that of earlier drills"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kills and of the data")
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed")
    parser.add_argument("--parallel", type=int, default=3, help="runs at a time")
    parser.add_argument("--only", action="append", choices=DRILLS, help="drills to run; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""One run on 2, then 1, then 3 ranks, at ZeRO 2, then 3, then 1: nothing but rounding may change."""

from __future__ import annotations

import signal

from tests.drills.outcomes import Case, expect
from tests.drills.process import Pretraining, read_lines
from tests.drills.workplace import ELASTIC_RUN, STUDIES, Workplace, check_epochs, finished

#: (ranks, ZeRO stage, after which step it is ended by what); the last one finishes.
PARTS = [(2, 2, (10, signal.SIGTERM)), (1, 3, (19, signal.SIGKILL)), (3, 1, None)]
TOLERANCE = 1e-4


def cases(place: Workplace) -> list[Case]:
    """The run, and an uninterrupted one on 2 ranks at ZeRO 2."""
    return [Case("elastic", "2 -> 1 -> 3 ranks with ZeRO 2 -> 3 -> 1 in one run", lambda: _run(place))]


def _run(place: Workplace) -> str:
    base = [*ELASTIC_RUN, f"data.root={place.data}"]
    whole, folder = place.folder / "elastic-whole", place.folder / "elastic"
    with Pretraining(whole, [*base, "zero.stage=2"]) as run:
        run.finish()
    for ranks, stage, part_end in PARTS:
        with Pretraining(folder, [*base, f"zero.stage={stage}"], ranks) as run:
            if part_end is None:
                run.finish()
                continue
            step, ended_by = part_end
            run.wait_for_step(step)
            if ended_by == signal.SIGKILL:
                expect(run.kill(), f"it was over before the kill: {run.tail()}")
            else:
                run.process.send_signal(ended_by)
                code = run.end()
                expect(code == 75, f"{ended_by.name} ended it with code {code}: {run.tail()}")
    expected, found = finished(whole), finished(folder)
    expect(found.samples == expected.samples, "another sequence of samples")
    check_epochs(folder, STUDIES, 12)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True))
    expect(worst <= TOLERANCE, f"the loss curves differ by {worst:.1e} relative, allowed are {TOLERANCE:g}")
    starts = [e for e in read_lines(folder / "events.jsonl") if e["kind"] in ("start", "resume")]
    expect([e["ranks"] for e in starts] == [2, 1, 3], f"it did not run on these ranks: {starts}")
    at = ", ".join(f"on {e['ranks']} from step {e['step'] + 1}" for e in starts)
    return f"{at}; samples in the same order, losses of {len(found.losses)} steps within {worst:.1e} relative"

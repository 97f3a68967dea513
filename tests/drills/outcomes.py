"""What a drill found, and the tables it is shown in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


class DrillError(Exception):
    """Something is not as it is promised; the message says what."""


@dataclass
class Case:
    """One thing to try: `action` returns what was seen, or raises `DrillError`."""

    drill: str
    name: str
    action: Callable[[], str]


@dataclass
class Outcome:
    """One row of the results: what was done, whether it went as promised, and what was seen."""

    drill: str
    case: str
    passed: bool
    seen: str
    seconds: float


@dataclass
class Listing:
    """A table beside the results, for example of every kill."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def expect(condition: object, text: str) -> None:
    """Raise `DrillError` with `text` unless `condition` holds."""
    if not condition:
        raise DrillError(text)


def attempt(case: Case) -> Outcome:
    """Run one case; any error is a failed row, not the end."""
    started = time.monotonic()
    try:
        seen, passed = case.action(), True
    except DrillError as error:
        seen, passed = str(error), False
    except Exception as error:
        seen, passed = f"{type(error).__name__}: {error}", False
    outcome = Outcome(case.drill, case.name, passed, " ".join(seen.split())[:400], time.monotonic() - started)
    print(f"[{case.drill}] {case.name}: {'ok' if passed else 'FAILED'}: {outcome.seen}", flush=True)
    return outcome


def show(outcomes: Sequence[Outcome], listings: Sequence[Listing], console: Console) -> None:
    """Print the listings and the results."""
    for listing in listings:
        _print(console, listing.title, listing.columns, listing.rows)
    rows = [
        (o.drill, o.case, "[green]ok[/]" if o.passed else "[red]FAILED[/]", o.seen, f"{o.seconds:.0f} s")
        for o in outcomes
    ]
    _print(console, "drills", _COLUMNS, rows)


def markdown(outcomes: Sequence[Outcome], listings: Sequence[Listing], seconds: float) -> str:
    """The same as Markdown, with the time it all took."""
    rows = [
        (o.drill, o.case, "ok" if o.passed else "**FAILED**", o.seen, f"{o.seconds:.0f} s") for o in outcomes
    ]
    failed = sum(not outcome.passed for outcome in outcomes)
    head = f"{len(outcomes) - failed} of {len(outcomes)} drills passed in {seconds / 60:.1f} minutes.\n"
    return "\n".join(
        [head, _table(_COLUMNS, rows), *(f"\n## {x.title}\n\n{_table(x.columns, x.rows)}" for x in listings)]
    )


_COLUMNS = ("drill", "case", "result", "seen", "time")


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)

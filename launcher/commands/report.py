"""`medvlp report`: one HTML file about a run, or about several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands.evaluate import RESULT_NAME
from launcher.console import Console, echo
from shards.errors import UsageError

if TYPE_CHECKING:
    from medvlp.run_page.page import RunPart


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folders")],
    out: Annotated[Path, typer.Option("--out", metavar="HTML", help="file to write")],
    samples: Annotated[int, typer.Option("--samples", min=0, help="test images a run; 0: none")] = 4,
    data: Annotated[
        str | None, typer.Option("--data", help="where the evaluated data are now; default: as evaluated")
    ] = None,
    include_samples: Annotated[
        bool, typer.Option("--include-samples", help="images and reports also of data that are no phantoms")
    ] = False,
) -> None:
    """Write a page that opens from disk: results with baselines, curves, config, data, versions.

    Images and report texts stand in it only where the data are phantoms, or with --include-samples: it is
    then as confidential as the data. The page loads nothing and can be mailed.
    """
    from medvlp.run_page.collect import collect
    from medvlp.run_page.page import render
    from medvlp.run_page.showable import Asked
    from shards.atomic import atomic_write

    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice")
    console = Console(stderr=True)
    asked = Asked(samples, data, include_samples)
    parts: list[RunPart] = []
    for run in runs:
        part = collect(run, run / RESULT_NAME, asked, {other.history.name for other in parts})
        for reason in _missing(part):
            console.print(
                f"{part.history.name}: {reason}", style="dim", markup=False, highlight=False, soft_wrap=True
            )
        parts.append(part)
    atomic_write(out, render(parts).encode())
    echo(str(out))


def _missing(part: RunPart) -> list[str]:
    """What of a run is not on the page, and why."""
    lines = [f"no samples: {part.no_samples}"] if part.no_samples else []
    lines += [f"{task}: {of.remark}" for task, of in part.examples.items() if of.remark]
    return lines + ([f"clusters: {line}" for line in part.clusters.remarks] if part.clusters else [])

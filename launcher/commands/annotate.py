"""`medvlp shards annotate`: give the samples of a dataset their entities."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from shards.entities.annotate import annotate as annotate_dataset
from shards.errors import UsageError
from shards.workers import default_workers


def annotate(
    dataset: Annotated[Path, typer.Argument(metavar="DIR", help="dataset folder; it is not changed")],
    out: Annotated[Path, typer.Option("--out", help="new dataset; an unfinished one in it goes on")],
    radgraph: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON output of a RadGraph model, by study id")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="read the reports with the built-in rules")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace entities that samples have already")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
) -> None:
    """Fill the entities of all samples, from a RadGraph file or by rules, in a new dataset."""
    if rules == (radgraph is not None):
        raise UsageError("choose one of --radgraph FILE and --rules")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("shards", total=None)
        summary = annotate_dataset(
            dataset,
            out,
            radgraph,
            overwrite,
            workers or default_workers(),
            on_shard=lambda finished, total: progress.update(bar, completed=finished, total=total),
        )
    typer.echo(f"{out}: {summary.annotated:,} of {summary.samples:,} samples have entities")
    if summary.unmatched:
        typer.echo(f"{summary.unmatched:,} samples have no report in {radgraph}")

"""`medvlp shards`: build, annotate, merge, verify, info, overlap and view datasets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from launcher.command_words import CommandGroup
from launcher.commands import shards_build
from launcher.console import Console, echo
from shards.atomic import atomic_write
from shards.entities.annotate import annotate as annotate_dataset
from shards.errors import DataError, UsageError
from shards.info import describe
from shards.merge import merge
from shards.overlap import overlap, shared_patients, write_pairs
from shards.page import dataset_page
from shards.reader import ShardReader
from shards.verify import verify
from shards.view import contact_sheet
from shards.workers import default_workers

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Build, check and look at datasets of image-report shards."
)
app.add_typer(shards_build.app, name="build")

MaxRejected = Annotated[float, typer.Option(min=0, max=1, help="largest tolerated share of rejected records")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")]
Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="dataset folder")]


@app.command("annotate")
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
    summary = annotate_dataset(dataset, out, radgraph, overwrite, workers or default_workers())
    echo(f"{out}: {summary.annotated:,} of {summary.samples:,} samples have entities")
    if summary.unmatched:
        echo(f"{summary.unmatched:,} samples have no report in {radgraph}")


@app.command("merge")
def merge_command(dataset: Dataset, max_rejected: MaxRejected = 0.05) -> None:
    """Complete a dataset whose parts (`build --part i/n`) are all built."""
    shards_build.report(merge(dataset), dataset, max_rejected)


@app.command("verify")
def verify_command(dataset: Dataset, workers: Workers = None) -> None:
    """Check hashes, offsets, images, metadata, duplicate keys, and patients and images in two splits."""
    problems = verify(dataset, workers or default_workers())
    for problem in problems:
        echo(problem)
    if problems:
        raise DataError(f"{dataset}: {len(problems)} problems")
    echo(f"{dataset}: ok")


@app.command("info")
def info_command(
    dataset: Dataset,
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML page to write, with pictures; opens from disk")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(min=0, max=200, help="samples of each split on the page; 0: no image, no text"),
    ] = 8,
) -> None:
    """Show splits, samples, patients, labels, licences and text lengths, as tables or as a page."""
    reader = ShardReader(dataset)
    if out is None:
        Console().print(describe(reader))
        return
    atomic_write(out, dataset_page(reader, samples).encode())
    shown = "it holds images and report text" if samples else "it holds no image and no report text"
    echo(f"{out}: {shown}")


@app.command("overlap")
def overlap_command(
    dataset: Annotated[Path, typer.Argument(metavar="A", help="dataset folder")],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="[B]", help="another; default: the splits of A against each other"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="CSV of what is shared, by split and key; holds no ids")
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(
            "--patients",
            help="list of A's patients to leave out (`shards build NAME --exclude`); holds their ids",
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Find patients, studies, images (also resized or recompressed) and reports that two datasets share."""
    found = overlap(dataset, other, workers or default_workers())
    table = Table("shared", "A", "B", title_justify="left")
    for common in found:
        table.add_row(
            common.kind,
            f"{len(common.samples):,} samples of {common.split}",
            f"{common.other_samples:,} of {common.other_split}",
        )
    if found:
        Console().print(table)
    else:
        echo("nothing is shared")
    if out is not None:
        write_pairs(out, found, dataset, other)
        echo(f"{out}: {sum(len(common.samples) for common in found):,} lines")
    if patients is not None:
        ids = shared_patients(found, dataset)
        atomic_write(patients, "".join(f"{patient}\n" for patient in ids).encode())
        echo(f"{patients}: {len(ids):,} patients; it holds their ids")


@app.command("view")
def view_command(
    dataset: Dataset,
    out: Annotated[Path, typer.Option("--out", help="PNG to write")],
    split: Annotated[str, typer.Option(help="split to choose from")] = "train",
    samples: Annotated[int, typer.Option(min=1, max=200, help="number of samples")] = 12,
    columns: Annotated[int, typer.Option(min=1, max=20, help="samples in a row")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the choice")] = 0,
) -> None:
    """Draw a contact sheet of samples with their boxes and text."""
    sheet = contact_sheet(ShardReader(dataset), split, samples, columns, seed)
    try:
        sheet.save(out, format="PNG")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error
    echo(f"{out}: {sheet.width} x {sheet.height} pixels")

"""`medvlp shards`: build, merge, verify, info and view datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launcher.commands.annotate import annotate
from shards.build import BuildOptions, build_shards
from shards.errors import DataError, UsageError
from shards.identifiers import KEY_VARIABLE, read_key
from shards.info import describe
from shards.merge import BuildSummary, merge
from shards.plan import Part
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.sources.base import Source
from shards.splits import DEFAULT_FRACTIONS, parse_fractions
from shards.verify import verify
from shards.view import contact_sheet
from shards.workers import default_workers

app = typer.Typer(no_args_is_help=True, help="Build, check and look at datasets of image-report shards.")
build_app = typer.Typer(no_args_is_help=True, help="Build a dataset from a source.")
app.add_typer(build_app, name="build")

Out = Annotated[Path, typer.Option("--out", help="dataset folder; an unfinished build in it goes on")]
ImageSize = Annotated[int, typer.Option(min=8, max=8192, help="side of the stored square images in pixels")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")]
PartOption = Annotated[
    str | None, typer.Option("--part", metavar="I/N", help="build only part i of n; then run `shards merge`")
]
Split = Annotated[str, typer.Option("--split", help="shares of patients, where the source names no split")]
PerShard = Annotated[int, typer.Option("--samples-per-shard", min=1, help="records that share a tar")]
MaxRejected = Annotated[float, typer.Option(min=0, max=1, help="largest tolerated share of rejected records")]
HashIds = Annotated[bool, typer.Option("--hash-ids", help="replace patient and study ids by keyed hashes")]
HashKey = Annotated[Path | None, typer.Option(help=f"file with the secret key; default: ${KEY_VARIABLE}")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="tokenizer folder or hub name; default: train one on the train split")
]
VocabSize = Annotated[int, typer.Option(min=100, help="largest vocabulary of a trained tokenizer")]
Format = Annotated[str, typer.Option("--image-format", help="jpg or png")]
Quality = Annotated[int, typer.Option("--jpeg-quality", min=1, max=100)]
Name = Annotated[str | None, typer.Option(help="name of the dataset; default: that of the source")]
Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="dataset folder")]

PerShardDefault = BuildOptions.records_per_shard
VocabDefault = BuildOptions.vocab_size


@build_app.command("phantom")
def build_phantom(
    out: Out,
    studies: Annotated[int, typer.Option(min=1, help="number of studies")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="seed of anatomy, findings and reports")] = 0,
    image_size: ImageSize = 256,
    workers: Workers = None,
    part: PartOption = None,
    split: Split = DEFAULT_FRACTIONS,
    samples_per_shard: PerShard = PerShardDefault,
    max_rejected: MaxRejected = 0.05,
    tokenizer: TokenizerOption = None,
    vocab_size: VocabSize = VocabDefault,
    image_format: Format = "jpg",
    jpeg_quality: Quality = 90,
    name: Name = None,
) -> None:
    """Build from generated chest-radiograph phantoms: no download, no licence, exact annotations."""
    from shards.sources.phantom import PhantomSource

    options = BuildOptions(
        name=name,
        image=_stored_image(image_size, image_format, jpeg_quality),
        records_per_shard=samples_per_shard,
        fractions=parse_fractions(split),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
    )
    source = PhantomSource(studies=studies, image_size=image_size, seed=seed)
    _build(source, out, options, workers, part, max_rejected)


@build_app.command("table")
def build_table(
    table: Annotated[Path, typer.Option(help="CSV, TSV, JSONL or Parquet file, one image a row")],
    images: Annotated[Path, typer.Option(help="folder that the table's image paths start from")],
    map_file: Annotated[Path, typer.Option("--map", help="YAML that says what the columns mean")],
    out: Out,
    image_size: ImageSize = 256,
    workers: Workers = None,
    part: PartOption = None,
    split: Split = DEFAULT_FRACTIONS,
    samples_per_shard: PerShard = PerShardDefault,
    max_rejected: MaxRejected = 0.05,
    hash_ids: HashIds = False,
    hash_key: HashKey = None,
    tokenizer: TokenizerOption = None,
    vocab_size: VocabSize = VocabDefault,
    image_format: Format = "jpg",
    jpeg_quality: Quality = 90,
    name: Name = None,
    entities: Annotated[
        str | None, typer.Option(metavar="rules", help="rules: extract entities from the reports")
    ] = None,
) -> None:
    """Build from a table of reports and a folder of images (see shards/sources/README.md)."""
    from shards.sources.table import TableSource

    if entities not in (None, "rules"):
        raise UsageError(f"--entities {entities!r}: choose rules, or leave it out")
    options = BuildOptions(
        name=name or table.stem,
        image=_stored_image(image_size, image_format, jpeg_quality),
        records_per_shard=samples_per_shard,
        fractions=parse_fractions(split),
        hash_key=read_key(hash_key) if hash_ids else None,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        entities="rules" if entities else None,
    )
    _build(TableSource(table, images, map_file), out, options, workers, part, max_rejected)


app.command("annotate")(annotate)


@app.command("merge")
def merge_command(dataset: Dataset, max_rejected: MaxRejected = 0.05) -> None:
    """Complete a dataset whose parts (`build --part i/n`) are all built."""
    _report(merge(dataset), dataset, max_rejected)


@app.command("verify")
def verify_command(dataset: Dataset, workers: Workers = None) -> None:
    """Check hashes, offsets, images, metadata, duplicate keys and patients in two splits."""
    problems = verify(dataset, workers or default_workers())
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise DataError(f"{dataset}: {len(problems)} problems")
    typer.echo(f"{dataset}: ok")


@app.command("info")
def info_command(dataset: Dataset) -> None:
    """Show splits, samples, patients, labels and text lengths."""
    Console().print(describe(ShardReader(dataset)))


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
    typer.echo(f"{out}: {sheet.width} x {sheet.height} pixels")


def _build(
    source: Source,
    out: Path,
    options: BuildOptions,
    workers: int | None,
    part: str | None,
    max_rejected: float,
) -> None:
    columns = (
        TextColumn("shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("shards", total=None)
        build_shards(
            source,
            out,
            options,
            workers=workers or default_workers(),
            part=_parse_part(part),
            on_shard=lambda finished, total: progress.update(bar, completed=finished, total=total),
        )
    if part is None:
        _report(merge(out), out, max_rejected)
    else:
        typer.echo(f"part {part} is built; when all are, run: medvlp shards merge {out}")


def _report(summary: BuildSummary, out: Path, max_rejected: float) -> None:
    """Print counts; fail above the tolerated share of rejected records."""
    table = Table(title=str(out), title_justify="left")
    for heading in ("split", "samples", "studies", "patients", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, totals in summary.splits.items():
        numbers = (totals.samples, totals.studies, totals.patients, totals.shards)
        table.add_row(split, *(f"{number:,}" for number in numbers))
    console = Console()
    console.print(table)
    rejected = sum(summary.rejected.values())
    console.print(f"{summary.records:,} records, {rejected:,} rejected (rejected.jsonl)", highlight=False)
    for reason, count in sorted(summary.rejected.items(), key=lambda item: (-item[1], item[0])):
        console.print(f"  {count:,} x {reason}", highlight=False, markup=False)
    if summary.leaking_patients:
        console.print(
            f"[yellow]warning:[/] {summary.leaking_patients:,} patients are in more than one split, as the "
            "source prescribes; `medvlp shards verify` will refuse the dataset",
            highlight=False,
        )
    if summary.rejected_share > max_rejected:
        raise DataError(
            f"{rejected:,} of {summary.records:,} records were rejected, more than --max-rejected "
            f"{max_rejected:g}; the dataset is complete without them"
        )


def _stored_image(size: int, image_format: str, quality: int) -> StoredImage:
    if image_format not in ("jpg", "png"):
        raise UsageError(f"--image-format {image_format!r}: choose jpg or png")
    return StoredImage(size, image_format, quality)


def _parse_part(text: str | None) -> Part:
    if text is None:
        return Part(0, 1)
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 0 <= int(number) <= int(count) and int(count) > 0):
        raise UsageError(f"--part {text!r}: write it as i/n, for example 0/4 to 3/4")
    return Part(int(number), int(count))

"""`medvlp shards build NAME`: a command for every registered source, and the options they all have."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from launcher.command_words import CommandGroup, options_of_dataclasses
from launcher.console import Console, echo
from shards.build import BuildOptions, build_shards
from shards.errors import DataError, UsageError
from shards.identifiers import KEY_VARIABLE, read_key
from shards.merge import BuildSummary, Vocabulary, merge
from shards.plan import Part
from shards.sample import StoredImage
from shards.sources import registry
from shards.sources.base import PublishedCount
from shards.splits import DEFAULT_FRACTIONS, parse_fractions
from shards.study import LabelValue
from shards.tokenizer import MIN_PATIENTS
from shards.workers import default_workers


class SourceCommands(CommandGroup):
    """A command for every registered source, made when it is asked for: sources are imported only then."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the sources, in alphabetical order."""
        return list(registry.sources())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a source; None for a name that is none."""
        entry = registry.sources().get(cmd_name)
        return None if entry is None else _command(cmd_name, entry)


app = typer.Typer(cls=SourceCommands, no_args_is_help=True, help="Build a dataset from a source.")


@app.callback()
def _sources() -> None:
    """Build a dataset from a source."""


@dataclass(frozen=True)
class BuildSettings:
    """What every build is told on the command line, whatever its source."""

    out: Annotated[Path, typer.Option("--out", help="dataset folder; an unfinished build in it goes on")]
    image_size: Annotated[
        int, typer.Option(min=8, max=8192, help="side of the stored square images in pixels")
    ] = 256
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="build only part i of n; then run `shards merge`"),
    ] = None
    split: Annotated[str, typer.Option(help="shares of patients, where the source names no split")] = (
        DEFAULT_FRACTIONS
    )
    samples_per_shard: Annotated[int, typer.Option(min=1, help="records that share a tar")] = (
        BuildOptions.records_per_shard
    )
    max_rejected: Annotated[
        float, typer.Option(min=0, max=1, help="largest tolerated share of rejected records")
    ] = 0.05
    hash_ids: Annotated[
        bool, typer.Option("--hash-ids", help="replace patient and study ids by keyed hashes")
    ] = False
    hash_key: Annotated[
        Path | None, typer.Option(help=f"file with the secret key; default: ${KEY_VARIABLE}")
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer folder or hub name; default: train one on the train split")
    ] = None
    vocab_size: Annotated[int, typer.Option(min=100, help="largest vocabulary of a trained tokenizer")] = (
        BuildOptions.vocab_size
    )
    min_patients: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"patients that must share a word of a trained vocabulary; default: {MIN_PATIENTS}, "
            "and 1 for generated reports",
        ),
    ] = None
    image_format: Annotated[Literal["jpg", "png"], typer.Option(help="how images are stored")] = "jpg"
    jpeg_quality: Annotated[int, typer.Option(min=1, max=100)] = 90
    name: Annotated[str | None, typer.Option(help="name of the dataset; default: that of the source")] = None
    entities: Annotated[
        Literal["rules"] | None, typer.Option(help="rules: extract entities from the reports")
    ] = None


def _command(name: str, entry: registry.Entry) -> Any:
    """The command `medvlp shards build NAME`, with the source's options before the shared ones."""

    def build(*, source: Any, settings: Any) -> None:
        if settings.hash_key is not None and not settings.hash_ids:
            raise UsageError("--hash-key without --hash-ids: ids would be stored as they are; give both")
        # Of the registered class, not of the one that typer reads: worker processes have to unpickle it.
        given = {field.name: getattr(source, field.name) for field in dataclasses.fields(entry.options)}
        _build(entry.open(entry.options(**given), settings.image_size), settings)

    build.__doc__ = entry.help
    build.__annotations__ = {"source": _with_typer_options(entry.options), "settings": BuildSettings}
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(options_of_dataclasses(build))
    command = typer.main.get_command(single)
    command.name = name
    return command


def _with_typer_options(options: type[Any]) -> type[Any]:
    """The dataclass with annotations that typer reads, made from `shards.sources.base.option`."""
    hints = typing.get_type_hints(options)
    annotated: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        said = field.metadata
        name = said["name"] or "--" + field.name.replace("_", "-")
        hint = typer.Option(name, help=said["help"], min=said["least"], max=said["most"])
        annotated[field.name] = Annotated[hints[field.name], hint]
    return type(options.__name__, (options,), {"__annotations__": annotated, "__doc__": options.__doc__})


def _build(source: Any, settings: BuildSettings) -> None:
    options = BuildOptions(
        name=settings.name or source.title,
        image=StoredImage(settings.image_size, settings.image_format, settings.jpeg_quality),
        records_per_shard=settings.samples_per_shard,
        fractions=parse_fractions(settings.split),
        hash_key=read_key(settings.hash_key) if settings.hash_ids else None,
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
        min_patients=settings.min_patients,
        entities=settings.entities,
    )
    workers = settings.workers or default_workers()
    build_shards(source, settings.out, options, workers, _parse_part(settings.part))
    if settings.part is None:
        report(merge(settings.out), settings.out, settings.max_rejected)
    else:
        echo(f"part {settings.part} is built; when all are, run: medvlp shards merge {settings.out}")


def report(summary: BuildSummary, out: Path, max_rejected: float) -> None:
    """Print counts; fail above the tolerated share of rejected records."""
    table = Table(title=Text(str(out)), title_justify="left")
    for heading in ("split", "samples", "studies", "patients", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, totals in summary.splits.items():
        numbers = (totals.samples, totals.studies, totals.patients, totals.shards)
        table.add_row(split, *(f"{number:,}" for number in numbers))
    console = Console()
    console.print(table)
    if summary.labels:
        console.print(_label_table(summary.labels))
    rejected = sum(summary.rejected.values())
    console.print(f"{summary.records:,} records, {rejected:,} rejected (rejected.jsonl)", highlight=False)
    for reason, count in sorted(summary.rejected.items(), key=lambda item: (-item[1], item[0])):
        line = summary.first_lines.get(reason)
        where = "" if line is None else f" (first in line {line:,})"
        console.print(f"  {count:,} x {reason}{where}", highlight=False, markup=False, soft_wrap=True)
    if summary.published_counts:
        console.print(_published_table(summary.published_counts))
    for remark in summary.remarks:
        console.print(f"warning: {remark}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if summary.vocabulary is not None:
        console.print(_vocabulary(summary.vocabulary), highlight=False)
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


def _label_table(labels: Mapping[str, Mapping[LabelValue, int]]) -> Table:
    """Samples of each value a label has."""
    table = Table(title="labels", title_justify="left")
    table.add_column("finding")
    columns: dict[str, LabelValue] = {"present": 1, "absent": 0, "uncertain": -1, "unknown": None}
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, values in labels.items():
        table.add_row(Text(name), *(f"{values.get(value, 0):,}" for value in columns.values()))
    return table


def _published_table(counts: Sequence[PublishedCount]) -> Table:
    """What is published of the source beside what was found; what differs is said."""
    table = Table(title="as published", title_justify="left")
    table.add_column("count")
    for heading in ("published", "found", ""):
        table.add_column(heading, justify="right")
    for count in counts:
        differs = "" if count.found == count.published else f"[yellow]{count.found - count.published:+,}[/]"
        table.add_row(Text(count.name), f"{count.published:,}", f"{count.found:,}", differs)
    return table


def _vocabulary(made: Vocabulary) -> str:
    text = (
        f"vocabulary of {made.size:,} pieces from {made.words:,} words of {made.patients:,} training patients"
    )
    if made.left_out:
        text += (
            f"; {made.left_out:,} words that fewer than {made.min_patients} patients share are left out and "
            "spelled by pieces"
        )
    if not made.words:
        text += (
            "\n[yellow]warning:[/] no word is shared by so many patients, so the vocabulary is single "
            "characters: use --tokenizer, more studies or a smaller --min-patients"
        )
    return text


def _parse_part(text: str | None) -> Part:
    if text is None:
        return Part(0, 1)
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 0 <= int(number) <= int(count) and int(count) > 0):
        raise UsageError(f"--part {text!r}: write it as i/n, for example 0/4 to 3/4")
    return Part(int(number), int(count))

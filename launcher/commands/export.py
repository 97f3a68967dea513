"""`medvlp export`: weights for plain timm and transformers, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands.evaluate import RESULT_NAME
from launcher.console import Console, echo

if TYPE_CHECKING:
    from medvlp.export.card import Results


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder or checkpoint folder")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="new or empty folder")],
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="NAME", help="like step-00001000; default: the newest good one"),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="where the training data are now; default: as in the config")
    ] = None,
) -> None:
    """Write image/ (timm), text/ (transformers), the heads and a model card to FOLDER, and check them."""
    from medvlp.export.run import export
    from medvlp.runs import saved_run

    console = Console(stderr=True)
    source = saved_run.locate(run if checkpoint is None else run / "checkpoints" / checkpoint)
    results = _results(source.run / RESULT_NAME)
    folder = export(
        source,
        out,
        lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True),
        data,
        results,
    )
    echo(str(folder))


def _results(file: Path) -> Results | None:
    """The run's stored evaluation as tables; None where it has none."""
    from medvlp.evaluation.report import results, tables
    from medvlp.export.card import Results

    if not file.is_file():
        return None
    found = results.read(file)
    named = {found.model["name"]: found}
    return Results(
        found.model["step"],
        "\n".join(tables.markdown_section(named, task) for task in found.results),
        found.model.get("weights", ""),
    )

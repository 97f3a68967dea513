"""`medvlp report`: one HTML file about a run, or about several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launcher.commands.evaluate import RESULT_NAME
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
    from medvlp.evaluation.report import results
    from medvlp.run_page.history import read_history
    from medvlp.run_page.page import RunPart, render
    from shards.atomic import atomic_write

    console = Console(stderr=True)
    parts: list[RunPart] = []
    for run in runs:
        history = read_history(run)
        if any(part.history.name == history.name for part in parts):
            folder = run.resolve()
            history.name = f"{history.name} ({folder.parent.name}/{folder.name})"
        evaluated = (run / RESULT_NAME).is_file()
        part = RunPart(history, results.read(run / RESULT_NAME) if evaluated else None)
        part.samples, why = _samples(part, run, data, samples, include_samples)
        if why:
            console.print(
                f"{history.name}: no samples: {why}",
                style="dim",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        parts.append(part)
    if len({part.history.name for part in parts}) < len(parts):
        raise UsageError("a run is named twice")
    atomic_write(out, render(parts).encode())
    typer.echo(str(out))


def _samples(part: RunPart, run: Path, data: str | None, count: int, meant: bool):  # type: ignore[no-untyped-def]
    """(samples to show, why there are none)."""
    import medvlp
    from medvlp.run_page.samples import is_phantom, shown_samples
    from shards.format import is_remote

    if count == 0:
        return (), ""
    if part.evaluation is None:
        return (), "the run was not evaluated"
    root = data or str(part.evaluation.data.get("root"))
    if data is None and (is_remote(root) or not Path(root).is_dir()):
        return (), f"the data are not at {root}; --data says where"
    dataset = medvlp.open_dataset(root, part.evaluation.data["split"])
    if dataset.fingerprint != part.evaluation.data["fingerprint"]:
        return (), f"{root} is not what was evaluated"
    if not (meant or is_phantom(dataset)):
        return (), "images and reports of patients stand in the page only with --include-samples"
    checkpoint = run / "checkpoints" / str(part.evaluation.model.get("checkpoint"))
    if not checkpoint.is_dir():
        return (), "the evaluated checkpoint is gone"
    return shown_samples(medvlp.load(checkpoint), dataset, count), ""

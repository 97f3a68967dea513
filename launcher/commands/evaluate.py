"""`medvlp evaluate` and `medvlp compare`: a run beside its baselines, and several runs side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from shards.errors import UsageError

if TYPE_CHECKING:
    from medvlp.evaluation.report.results import Evaluation

RESULT_NAME = "evaluation.json"
#: Below the run folder: a result file for each task that was evaluated by a job of its own.
PARTS_FOLDER = "evaluation-parts"


def evaluate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint folder")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="over the run's config")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="dataset folder or URL; default: the run's own")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="zero-shot, retrieval, linear-probe (repeat it); default: all that can be"
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="only this label (repeat it); default: all")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="split to evaluate; default: evaluation.split")
    ] = None,
    uncertain: Annotated[
        str, typer.Option("--uncertain", help="labels of -1: exclude, positive or negative")
    ] = "exclude",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help=f"result file; default: {RESULT_NAME} in the run folder")
    ] = None,
    findings: Annotated[
        bool, typer.Option("--findings", help="also print every metric of every finding")
    ] = False,
) -> None:
    """Evaluate a run and write evaluation.json: every number with a 95 % interval, beside two baselines."""
    from medvlp.evaluation.report import results
    from medvlp.evaluation.session import Request, evaluate
    from medvlp.runs import saved_run

    for text in overrides or []:
        if "=" not in text:
            raise UsageError(
                f"{text!r}: write section.key=value; one run or checkpoint is evaluated at a time"
            )
    changes = list(overrides or []) + ([f"evaluation.split={split}"] if split else [])
    console = Console(stderr=True)
    request = Request(source, data, task or (), label or (), changes, uncertain, device)  # type: ignore[arg-type]
    evaluation = evaluate(
        request, lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    )
    target = out or saved_run.locate(source).run / RESULT_NAME
    results.write(evaluation, target)
    _print_tables({evaluation.model["name"]: evaluation}, findings)
    typer.echo(str(target))


def compare(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="run folders or evaluation files, first one on top")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown with a row for each model")] = False,
    findings: Annotated[bool, typer.Option("--findings", help="also single findings")] = False,
    join: Annotated[
        bool, typer.Option("--join", help=f"first put RUN/{PARTS_FOLDER}/*.json together to {RESULT_NAME}")
    ] = False,
) -> None:
    """Show the stored results of several runs in one table; they must be of the same data and split."""
    from medvlp.evaluation.report import results

    for run in sources if join else []:
        _join_parts(run)
    evaluations: dict[str, Evaluation] = {}
    for source in sources:
        evaluation = results.read(source / RESULT_NAME if source.is_dir() else source)
        name = evaluation.model["name"]
        evaluations[f"{name} ({source})" if name in evaluations else name] = evaluation
    _print_tables(evaluations, findings, markdown)


def _join_parts(run: Path) -> None:
    from medvlp.evaluation.report import joining, results

    files = sorted((run / PARTS_FOLDER).glob("*.json"))
    if not files:
        raise UsageError(f"--join: there are no files {run / PARTS_FOLDER}/*.json")
    results.write(joining.join({file: results.read(file) for file in files}), run / RESULT_NAME)


def _print_tables(evaluations: dict[str, Evaluation], findings: bool, markdown: bool = False) -> None:
    from medvlp.evaluation.report import tables

    first = next(iter(evaluations.values()))
    if markdown:
        for task in first.results:
            typer.echo(tables.markdown_section(evaluations, task, findings))
        return
    title = tables.caption(evaluations)
    # A pipe or log file has no width; the tables need this much to stay on one line a row.
    console = Console() if sys.stdout.isatty() else Console(width=110)
    for task in first.results:
        grids = [tables.grid(evaluations, task)]
        if findings:
            grids.append(tables.grid(evaluations, task, findings=True))
        elif task == "zero-shot":
            grids.append(tables.auroc_by_finding(tables.grid(evaluations, task, findings=True)))
        for grid in grids:
            if grid.metrics:
                console.print(tables.console_table(grid, f"{task}: {title}"))
        # All evaluations are of the same data, so what one cannot say about it none can.
        for line in tables.remarks(first.notes[task]) + tables.unavailable(evaluations, task):
            typer.echo(f" {line}")
        typer.echo()

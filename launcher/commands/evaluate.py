"""`medvlp evaluate` and `medvlp compare`: a run beside its baselines, and several runs side by side."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from launcher.command_words import split_arguments
from launcher.commands.pretrain import train_config
from launcher.console import Console, echo, for_tables
from launcher.run_state import CONFIG, PARTS_FOLDER
from medvlp.runs.manifest import step_folders
from shards.errors import UsageError

if TYPE_CHECKING:
    from medvlp.config import Config
    from medvlp.evaluation.report.results import Evaluation

RESULT_NAME = "evaluation.json"
#: What the tables need to stay on one line a row.
_WIDTH = 110


Fractions = Annotated[
    list[float] | None,
    typer.Option(
        "--fraction", help="share of the training labels (repeat it), for tasks that learn from them"
    ),
]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", help="of what a task draws and trains (repeat it)")
]


def unit_words(
    names: Sequence[str], fractions: Sequence[float] | None, seeds: Sequence[int] | None
) -> list[str]:
    """Overrides that give the named tasks these units.

    Raises:
        UsageError: no task is named, or one has no such units.
    """
    from medvlp.evaluation.task import schemas

    words, known = [], schemas()
    for option, values in (("fraction", fractions), ("seed", seeds)):
        if values and not names:
            raise UsageError(f"--{option} is of a task: name it with --task")
        for name in names if values else ():
            keys = (
                {item.name for item in dataclasses.fields(known[name])} if name in known else {f"{option}s"}
            )
            if f"{option}s" not in keys:
                raise UsageError(f"--{option}: the task {name} has no key {option}s")
            words.append(f"evaluation.tasks.{name}.{option}s={json.dumps(list(values or ()))}")
    return words


class EvaluateCommand(TyperCommand):
    """Its help ends with the tasks there are."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from medvlp.evaluation.task import tasks

        lines = [
            f"{name}: {task.summary}{' (trains networks)' if task.trains else ''}"
            for name, task in tasks().items()
        ]
        self.epilog = "\n\n".join(["Tasks:", *lines])
        super().format_help(ctx, formatter)


def evaluate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint folder")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="over the run's config: YAML files, then overrides"),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="dataset folder or URL; default: the run's own")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="name of a task, see below (repeat it); default: all that train no network"
        ),
    ] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option(
            "--unit",
            help="only this unit of the task (repeat it); --out then holds a part, to be joined",
        ),
    ] = None,
    fraction: Fractions = None,
    seed: Seeds = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc", min=1, help="ranks that train what a task trains; default as `medvlp pretrain`"
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="only this label (repeat it); default: all")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="split to evaluate; default: evaluation.split")
    ] = None,
    uncertain: Annotated[
        str, typer.Option("--uncertain", help="labels of -1: exclude, positive, negative or per_class")
    ] = "exclude",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="evaluate again what is finished")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help=f"result file; default: {RESULT_NAME} in the run folder")
    ] = None,
    findings: Annotated[
        bool, typer.Option("--findings", help="also print every metric of every finding")
    ] = False,
) -> None:
    """Evaluate a run and write evaluation.json: every number with a 95 % interval, beside its baselines."""
    from medvlp.evaluation.evaluate import EvaluationOptions, evaluate

    def train(config: Config) -> int:
        return train_config(config, nproc, apart=True)

    files, overrides = split_arguments(arguments or [])
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"{file}: no YAML file and no section.key=value; one run or checkpoint is evaluated at a time"
            )
    target = _target(source, out, is_part=bool(unit))
    changes = [*overrides, *unit_words(task or (), fraction, seed)]
    changes += [f"evaluation.split={split}"] if split else []
    asked = EvaluationOptions(
        source, data, task or (), unit or (), label or (), files, changes, uncertain, device, fresh, train,  # type: ignore[arg-type]
        partial(_kept, target, with_earlier=out is None),
    )  # fmt: skip
    evaluation = evaluate(asked, _say)
    if unit and out is None:
        return
    if unit:
        _kept(target, evaluation, with_earlier=False)
    _print_tables({evaluation.model["name"]: evaluation}, findings)
    echo(str(target))


def _say(line: str) -> None:
    Console(stderr=True).print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _target(source: Path, out: Path | None, is_part: bool) -> Path:
    """Where the result goes; of a part only where the user says.

    Raises:
        UsageError: it cannot be written there, which is better known before hours of work.
    """
    from medvlp.runs import saved_run

    run = saved_run.run_of(source)
    target = out or run / RESULT_NAME
    is_written = out is not None or (not is_part and (run / CONFIG).is_file())
    if is_written and not os.access(target.parent, os.W_OK):
        raise UsageError(f"{target} cannot be written: name another file with --out")
    return target


def compare(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="run folders or evaluation files, first one on top")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown with a row for each model")] = False,
    findings: Annotated[bool, typer.Option("--findings", help="also single findings")] = False,
    published: Annotated[
        Path | None,
        typer.Option(
            "--published",
            metavar="FILE",
            help="also published numbers (configs/results/published.yaml) where protocol and data agree",
        ),
    ] = None,
    from_memory: Annotated[
        bool, typer.Option("--from-memory", help="with --published: also numbers that nobody has looked up")
    ] = False,
    join: Annotated[
        bool, typer.Option("--join", help=f"first put RUN/{PARTS_FOLDER}/*.json together to {RESULT_NAME}")
    ] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="RUN",
            help="ablation of the run at the same place, of the same seed (repeat it): show the differences, "
            "paired by patient and seed",
        ),
    ] = None,
) -> None:
    """Show the stored results of several runs in one table; they must be of the same data and split."""
    from medvlp.evaluation.report import results

    for run in [*sources, *(against or ())] if join else []:
        _join_parts(run)
    if against:
        if findings or from_memory or published is not None:
            raise UsageError("--against shows differences: leave --findings, --published, --from-memory out")
        _print_differences(sources, against, markdown)
        _tell_outdated([*sources, *against])
        return
    evaluations: dict[str, Evaluation] = {}
    for source in sources:
        evaluation = results.read(source / RESULT_NAME if source.is_dir() else source)
        name = evaluation.model["name"]
        evaluations[f"{name} ({source})" if name in evaluations else name] = evaluation
    if from_memory and published is None:
        raise UsageError("--from-memory chooses among published numbers: give --published FILE too")
    _print_tables(evaluations, findings, markdown)
    _tell_outdated(sources)
    if published is not None:
        _print_published(evaluations, published, from_memory, markdown)


def _tell_outdated(sources: Sequence[Path]) -> None:
    """Name the runs that were trained on after their evaluation: its numbers are not those of the run."""
    from medvlp.evaluation.report import results

    for run in filter(Path.is_dir, sources):
        step = results.read(run / RESULT_NAME).model["step"]
        newest = max((found for found, _ in step_folders(run / "checkpoints")), default=step)
        if newest > step:
            _say(
                f"{run} was evaluated at step {step} and has a checkpoint of step {newest} by now: "
                "`medvlp evaluate` measures that"
            )


def _print_differences(sources: Sequence[Path], against: Sequence[Path], markdown: bool) -> None:
    from medvlp.evaluation.report import comparison, differences, results, tables

    if len(sources) != len(against):
        raise UsageError(f"--against: {len(against)} runs for {len(sources)}; give one for each, in order")

    def measured(source: Path) -> differences.Measured:
        file = source / RESULT_NAME if source.is_dir() else source
        return differences.Measured(file.parent, results.read(file))

    pairs = [(measured(ours), measured(theirs)) for ours, theirs in zip(sources, against, strict=True)]
    groups = differences.groups(pairs)
    first = pairs[0][0].evaluation
    for task in dict.fromkeys(task for pair in pairs for of in pair for task in of.evaluation.results):
        found = {}
        for names, group in groups.items():
            reasons = differences.not_comparable(group, task)
            for reason in reasons:
                echo(f"- {reason}")
            if not reasons:
                found[names] = differences.rows(group, task)
        if not found:
            continue
        header, *rows = tables.difference_rows(found, comparison.reading_of(task))
        title = f"{task}: {first.data['name']}, split {first.data['split']}, with − without"
        if markdown:
            echo(f"{title}\n\n{tables.markdown_rows([header, *rows])}")
        else:
            for_tables(_WIDTH).print(tables.rows_table(header, rows, title))
        for (ours, theirs), of in found.items():
            if not of:
                echo(f"- {task} of {ours} − {theirs}: not available")
    for (ours, theirs), group in groups.items():
        keys = {key for pair in group for key in differences.different_keys(*(of.evaluation for of in pair))}
        echo(f"- {ours} − {theirs}: the configs differ in {', '.join(sorted(keys)) or 'nothing'}")
    echo(
        "- *: the 95 % interval, by patient and seed, excludes 0. One seed claims nothing: its interval is "
        "by patient alone. Of metrics that do not differ, about one in twenty gets a star."
    )


def _print_published(
    evaluations: dict[str, Evaluation], file: Path, from_memory: bool, markdown: bool
) -> None:
    from medvlp.evaluation.report import published, tables

    results = published.read(file)
    for name, evaluation in evaluations.items():
        compared = published.compare(evaluation, results, from_memory)
        rows = [tables.published_cells(*row) for row in compared.rows]
        header = ("task", "metric", name, "published", "by")
        if rows and markdown:
            echo(tables.markdown_rows([header, *rows]))
        elif rows:
            for_tables(_WIDTH).print(tables.published_table(header, rows))
        for line in compared.remarks:
            echo(f"{'- ' if markdown else ' '}{line}")


def _join_parts(run: Path) -> None:
    from medvlp.evaluation.report import joining, results

    files = sorted((run / PARTS_FOLDER).glob("*.json"))
    if not files:
        raise UsageError(f"--join: there are no files {run / PARTS_FOLDER}/*.json")
    _kept(run / RESULT_NAME, joining.join({file: results.read(file) for file in files}), with_earlier=True)


def _kept(target: Path, evaluation: Evaluation, with_earlier: bool) -> Evaluation:
    """Write an evaluation, with the tasks that the file holds from before or without; what was written."""
    from medvlp.evaluation.report import joining, results

    if with_earlier:
        return joining.store(evaluation, target, _say)
    results.write(evaluation, target)
    return evaluation


def _print_tables(evaluations: dict[str, Evaluation], findings: bool, markdown: bool = False) -> None:
    from medvlp.evaluation.report import comparison, tables

    title = tables.caption(evaluations)
    console = for_tables(_WIDTH)
    for task, (first, *others) in comparison.by_task(evaluations).items():
        having = [name for group in (first, *others) for name in group]
        without = [comparison.not_evaluated(name, task) for name in evaluations if name not in having]
        for group in (first, *others):
            lines = comparison.apart(first, group, task) + (without if group is first else [])
            if markdown:
                echo(tables.markdown_section(group, task, findings) + "".join(f"- {of}\n" for of in lines))
                continue
            single = comparison.grid(group, task, findings=True)
            for grid in (comparison.grid(group, task), single if findings else single.by_finding()):
                if grid is not None and grid.metrics:
                    console.print(tables.console_table(grid, f"{task}: {title}"))
            for line in [*tables.lines_under(group, task), *lines]:
                echo(f" {line}")
            echo()

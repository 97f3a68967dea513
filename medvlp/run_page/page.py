"""The page: what is in the run folders put into one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from medvlp.config_files import defaults
from medvlp.evaluation.report import comparison, tables
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import schemas
from medvlp.methods.registry import schemas as method_schemas
from medvlp.run_page.charts import line_chart
from medvlp.run_page.clusters import AGREEMENT, ClusterPart
from medvlp.run_page.curves import CurvePart, curve_part
from medvlp.run_page.examples import ExamplePart
from medvlp.run_page.history import History, chosen_values, differences, flat, without_places
from medvlp.run_page.samples import Shown
from medvlp.run_page.tables import Cell, TableOf

#: Charts of the page: heading -> first words of the metrics in it; what is in none has a chart of its own.
_GROUPS = {
    "loss": ("loss",),
    "validation": ("validation/", "valid/"),
    "retrieval inside the batch": ("retrieval/",),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "samples per second": ("samples_per_second",),
    "share of time waiting for data": ("data_wait",),
    "steps skipped": ("train/bad_steps", "skipped_samples"),
    "prototypes": ("prototypes/", "clusters/"),
}
#: Logged, and of no use as a curve.
_LEFT_OUT = ("step_seconds", "memory_gib", "checkpoint/", *AGREEMENT)


@dataclass
class RunPart:
    """One run on the page.

    Attributes:
        history: its folder's facts. evaluation: None for a run that was not evaluated.
        samples: test images, where they may be shown; `no_samples`: why there are none.
        examples: of the tasks that have some, by task. clusters: what its folder has of them.
    """

    history: History
    evaluation: Evaluation | None = None
    samples: Sequence[Shown] = ()
    no_samples: str = ""
    examples: Mapping[str, ExamplePart] = field(default_factory=dict)
    clusters: ClusterPart | None = None


def render(parts: Sequence[RunPart]) -> str:
    """The page about these runs as HTML; names must differ."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medvlp.run_page", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    histories = [part.history for part in parts]
    known = {
        part.history.name: (part.history.folder, part.evaluation)
        for part in parts
        if part.evaluation is not None
    }
    results = results_parts(known)
    for of in results:
        of.examples = [part.examples[of.task] for part in parts
                       if part.history.name in of.runs and of.task in part.examples]  # fmt: skip
    if len(histories) > 1:
        changed, caption = differences(histories), "config keys that differ between the runs"
    else:
        changed, caption = (
            chosen_values(histories[0], _defaults(histories[0])),
            "config keys that are not the default",
        )
    return environment.get_template("page.html.j2").render(
        parts=parts,
        names=[history.name for history in histories],
        results=results,
        charts=charts(histories),
        config=TableOf(caption, ["key", *(h.name for h in histories)],
                       [[Cell(key), *(Cell(without_places(str(value))) for value in values)]
                        for key, values in changed]),
        data=[data_table(history) for history in histories if history.data],
        packages=_packages(histories),
    )  # fmt: skip


def charts(histories: Sequence[History]) -> list[tuple[str, Markup]]:
    """(heading, SVG) of every group of metrics; with several runs one line a run and metric."""
    names = sorted(
        {name for history in histories for name in history.curves if not name.startswith(_LEFT_OUT)}
    )
    groups: dict[str, list[str]] = {}
    for name in names:
        heading = next((key for key, starts in _GROUPS.items() if name.startswith(starts)), name)
        groups.setdefault(heading, []).append(name)
    ordered = sorted(groups, key=lambda key: list(_GROUPS).index(key) if key in _GROUPS else len(_GROUPS))
    single, found = len(histories) == 1, []
    for heading in ordered:
        curves = {
            name
            if single
            else history.name
            if len(groups[heading]) == 1
            else f"{history.name}: {name}": curve
            for name in groups[heading]
            for history in histories
            if (curve := history.curves.get(name))
        }
        marks = histories[0].restarts if single else ()
        # matplotlib escapes every text it writes.
        found.append((heading, Markup(line_chart(f"{heading} by step", curves, marks))))
    return found


@dataclass
class TaskPart:
    """One task of runs that were evaluated alike: its tables, curves and examples."""

    task: str
    runs: list[str]
    tables: list[TableOf]
    curves: CurvePart | None
    examples: list[ExamplePart] = field(default_factory=list)


def results_parts(known: Mapping[str, tuple[Path, Evaluation]]) -> list[TaskPart]:
    """Every task; evaluations on other data, or against other texts, stand in parts of their own."""
    found: dict[str, list[TaskPart]] = {}
    for group in _alike(known):
        evaluations = {name: one for name, (_, one) in group.items()}
        for task, (first, *others) in comparison.by_task(evaluations).items():
            for alike in (first, *others):
                made = _task_tables(alike, task, comparison.apart(first, alike, task))
                curves = curve_part({name: group[name] for name in alike}, task)
                found.setdefault(task, []).append(TaskPart(task, list(alike), made, curves))
    return [part for parts in found.values() for part in parts]


def _alike(known: Mapping[str, tuple[Path, Evaluation]]) -> list[dict[str, tuple[Path, Evaluation]]]:
    groups: dict[str, dict[str, tuple[Path, Evaluation]]] = {}
    for name, (run, one) in known.items():
        groups.setdefault(comparison.truth_of(one), {})[name] = run, one
    return list(groups.values())


def _task_tables(evaluations: Mapping[str, Evaluation], task: str, remarks: Sequence[str]) -> list[TableOf]:
    whole, single = comparison.grid(evaluations, task), comparison.grid(evaluations, task, findings=True)
    caption = f"{task}: {tables.caption(evaluations)}"
    made = []
    for grid, folded in ((whole, ""), (single.by_finding() or single, "single findings")):
        if not grid.metrics:
            continue
        rows = []
        for metric in grid.metrics:
            cells = [Cell(tables.label(metric, grid.reading))]
            for metrics in grid.cells.values():
                estimate = metrics.get(metric)
                cells.append(
                    Cell(
                        tables.cell(estimate, metric, grid.reading),
                        None if estimate is None else estimate.value,
                    )
                )
            rows.append(cells)
        header = ["metric", *(tables.model_name(model) for model in grid.cells)]
        made.append(TableOf(f"{caption}, {folded}" if folded else caption, header, rows, folded=folded))
    if not made:
        made.append(TableOf(caption, [], []))
    made[0].remarks = [without_places(line) for line in [*tables.lines_under(evaluations, task), *remarks]]
    return made


def data_table(history: History) -> TableOf:
    """The splits of the dataset a run was last trained on."""
    record = history.data[-1]
    splits = record.get("splits") if isinstance(record.get("splits"), dict) else {}
    names = ("samples", "studies", "patients")
    rows = [
        [Cell(str(split)), *(Cell(f"{totals.get(name):,}", totals.get(name)) for name in names)]
        for split, totals in (splits or {}).items()
        if isinstance(totals, dict) and all(type(totals.get(name)) is int for name in names)
    ]
    licences = ", ".join(str(licence) for licence in record.get("licences", []) if licence) or "not stored"
    remark = (
        f"fingerprint {record.get('fingerprint')}; trained on {record.get('split')}; licences: {licences}"
    )
    return TableOf(f"{history.name}: dataset {record.get('name')}", ["split", *names], rows, [remark])


def _packages(histories: Sequence[History]) -> TableOf:
    """Versions that made each run, and where."""
    facts = []
    for history in histories:
        packages = history.environment.get("packages")
        known = dict(packages) if isinstance(packages, dict) else {}
        git = history.environment.get("git")
        if isinstance(git, dict):
            known["git"] = f"{str(git.get('commit'))[:12]}{' (modified)' if git.get('modified') else ''}"
        known |= {name: history.environment[name] for name in ("python", "platform", "world_size")
                  if name in history.environment}  # fmt: skip
        facts.append(known)
    names = list(dict.fromkeys(name for known in facts for name in known))
    rows = [[Cell(name), *(Cell(str(known.get(name, "–"))) for known in facts)] for name in names]
    return TableOf("versions that made the runs", ["what", *(history.name for history in histories)], rows)


def _defaults(history: History) -> dict[str, Any]:
    """Dotted key -> default value of the run's method."""
    tree = asdict(defaults(schemas()))
    schema = method_schemas().get(str(history.config.get("method.name")))
    if schema is not None:
        tree["method"] = asdict(schema(name=str(history.config["method.name"])))
    return dict(flat(tree))

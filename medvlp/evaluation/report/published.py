"""Published results beside a run's own, where task, protocol, dataset, metric and test set agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medvlp.config import key
from medvlp.config_files import load_schema
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.metrics.clinical import plain
from medvlp.evaluation.report.results import Evaluation

Evidence = Literal["paper", "requoted", "memory"]
_EVIDENCE = {"paper": "", "requoted": ", requoted", "memory": ", from memory"}


@dataclass
class PublishedResult:
    """One row of a paper's table.

    The values are of the metric `metric` with the share of the training labels in its first part
    ("auroc/macro" at 10% is "auroc@10%/macro"), or of the metric itself for "all".
    """

    method: str = key("", "name of the published model")
    dataset: str = key("", "source that builds the dataset (`medvlp shards build SOURCE`)")
    task: str = key("", "task, as in evaluation.json")
    protocol: str = key("", "protocol of the task (`evaluation.tasks.<task>.protocol`)")
    metric: str = key("", "metric, as in evaluation.json")
    findings: list[str] = key([], "that a mean (macro) is over; none: over all that the dataset has")
    values: dict[str, float] = key({}, "share of the training labels, or all -> value in the unit of ours")
    evidence: Evidence = key("memory", "where the value was read")
    source: str | None = key(None, "who requotes it")
    test_images: int | None = key(None, "of the published test set", 1, 10**9)
    note: str | None = key(None, "what else has to be known")

    def other_findings(self, metric: str, trained: Mapping[str, Estimate]) -> list[str]:
        """The findings whose mean a run's `metric` is, where they are not those of the published one."""
        head, _, last = metric.rpartition("/")
        if last != "macro" or not self.findings:
            return []
        own = [name.removeprefix(f"{head}/") for name in trained if name.startswith(f"{head}/")]
        own = [name for name in own if name != last]
        return [] if {plain(name) for name in own} == {plain(name) for name in self.findings} else own

    @property
    def said_by(self) -> str:
        """Method and evidence, as shown beside the value."""
        return f"{self.method} ({self.protocol}{_EVIDENCE[self.evidence]})"

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Paths of metrics in evaluation.json, and the published values."""
        head, _, rest = self.metric.partition("/")
        for share, value in self.values.items():
            name = head if share == "all" else f"{head}@{share}"
            yield (f"{name}/{rest}" if rest else name), value


@dataclass
class _Schema:
    results: list[PublishedResult] = key([], "one row of a table each")


@dataclass
class Comparison:
    """What is published about an evaluation.

    Attributes:
        rows: task, metric, the run's own value, published value, who says so.
        remarks: notes on rows, and why nothing stands beside a task.
    """

    rows: list[tuple[str, str, Estimate, float, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read(file: Path) -> list[PublishedResult]:
    """The published results in a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    return load_schema(file, _Schema).results


def compare(evaluation: Evaluation, published: Iterable[PublishedResult], from_memory: bool) -> Comparison:
    """Put published numbers beside an evaluation's.

    Args:
        evaluation: of one run. published: what `read` gave.
        from_memory: also numbers that nobody has looked up.
    """
    found = Comparison()
    source = evaluation.data.get("source")
    here = [row for row in published if row.dataset == source and (from_memory or row.evidence != "memory")]
    for task, models in evaluation.results.items():
        of_task = [row for row in here if row.task == task]
        reasons = [_add(found, row, evaluation, models.get("trained", {})) for row in of_task]
        others = sorted({reason for reason in reasons if reason})
        if not of_task:
            others = [f"nothing published is known of {source or 'a dataset of unknown source'}"]
        found.remarks += [f"{task}: {reason}" for reason in others]
    return found


def _add(
    found: Comparison, row: PublishedResult, evaluation: Evaluation, trained: Mapping[str, Estimate]
) -> str | None:
    """Add the row's comparable values; why there are none."""
    protocol = evaluation.settings.get("options", {}).get(row.task, {}).get("protocol")
    if protocol != row.protocol:
        return f"{row.protocol} is another protocol than {protocol or 'that of the task'}: {row.method}"
    images = evaluation.data["splits"].get(evaluation.data["split"], {}).get("samples")
    if row.test_images not in (None, images):
        return f"{row.method} was tested on {row.test_images} images, this run on {images}"
    values = [
        (metric, trained[metric], value)
        for metric, value in row.metrics()
        if metric in trained and not math.isnan(trained[metric].value)
    ]
    for metric, *_ in values:
        if other := row.other_findings(metric, trained):
            return (
                f"{row.method} reports the mean over {', '.join(row.findings)}, this run that over "
                f"{', '.join(other)} (medvlp evaluate --label)"
            )
    found.rows += [(row.task, metric, own, value, row.said_by) for metric, own, value in values]
    if values and row.note:
        return f"{row.method}: {row.note}"
    return (
        None
        if values
        else f"{row.method} reports {row.metric}, this run does not at the same share of labels"
    )

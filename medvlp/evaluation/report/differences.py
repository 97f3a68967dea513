"""Runs against their ablations: differences of stored results, paired by patient and by seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.metrics.paired import Difference, paired_difference
from medvlp.evaluation.report import resamples
from medvlp.evaluation.report.comparison import not_evaluated, options_of, other_truths, reading_of
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError

#: Sections of a run's config that change nothing that is learned or measured.
_BESIDES = ("run", "monitor", "checkpoint", "evaluation")


@dataclass(frozen=True)
class Measured:
    """A run folder and an evaluation of it."""

    run: Path
    evaluation: Evaluation

    @property
    def name(self) -> str:
        """What the run is called in tables."""
        return str(self.evaluation.model["name"])

    @property
    def seed(self) -> int:
        """Seed of the weights and of the order of samples.

        Raises:
            EvaluationError: the file does not say it.
        """
        seed = self.evaluation.config.get("train", {}).get("seed")
        if not isinstance(seed, int):
            raise EvaluationError(f"{self.run}: its evaluation does not say train.seed")
        return seed


Pair = tuple[Measured, Measured]


@dataclass(frozen=True)
class Row:
    """One metric: means over seeds of both sides, and their difference."""

    metric: str
    ours: float
    theirs: float
    difference: Difference


def groups(pairs: Sequence[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """The pairs of each two names, one a seed.

    Raises:
        EvaluationError: a pair is of two seeds, or two pairs of the same names are of one seed.
    """
    found: dict[tuple[str, str], list[Pair]] = {}
    for ours, theirs in pairs:
        if ours.seed != theirs.seed:
            raise EvaluationError(
                f"{ours.run} is of train.seed={ours.seed}, {theirs.run} of {theirs.seed}: give the runs and "
                "those after --against in the same order of seeds"
            )
        group = found.setdefault((ours.name, theirs.name), [])
        if any(ours.seed == other.seed for other, _ in group):
            raise EvaluationError(f"{ours.run}: another run of {ours.name} has train.seed={ours.seed} too")
        group.append((ours, theirs))
    return found


def not_comparable(pairs: Sequence[Pair], task: str) -> list[str]:
    """Why there are no differences of a task: runs that lack it, or measure it against something else."""
    every = [item for pair in pairs for item in pair]
    if lacking := [item for item in every if task not in item.evaluation.results]:
        return [not_evaluated(str(item.run), task) for item in lacking]
    others = {item.run: other_truths(every[0].evaluation, item.evaluation, task) for item in every}
    return [
        f"{task} of {run}: measured with other {', '.join(names)} than {every[0].run}, so no difference"
        for run, names in others.items()
        if names
    ]


def rows(pairs: Sequence[Pair], task: str) -> list[Row]:
    """The summary metrics of a task, as ours minus theirs; none where a method cannot do the task.

    Args:
        pairs: ours and theirs, one pair a seed.
        task: its name.

    Raises:
        EvaluationError: they are not measured alike on the same patients (see also `not_comparable`), or
            resamples are missing.
    """
    if reasons := not_comparable(pairs, task):
        raise EvaluationError(reasons[0])
    every = [item for pair in pairs for item in pair]
    for item in every:
        _check_alike(every[0], item, task)
    models = [item.evaluation.results[task].get("trained", {}) for item in every]
    if not all(models):
        return []
    drawn = [resamples.read(item.run, item.evaluation, task) for item in every]
    for item, of in zip(every, drawn, strict=True):
        if of.fingerprints != drawn[0].fingerprints:
            raise EvaluationError(f"{item.run}: {task} was measured on other patients than {every[0].run}")
    summary = reading_of(task).summary
    shared = [name for name in models[0] if summary(name) and all(name in of for of in models)]
    return [_row(name, models, [of.drawn.get("trained", {}) for of in drawn]) for name in shared]


def _row(metric: str, models: Sequence[Mapping[str, Estimate]], drawn: Sequence[Mapping[str, Any]]) -> Row:
    """`models` and `drawn` are of ours, theirs, ours, theirs ..."""
    values = np.array([of[metric].value for of in models])
    ours, theirs = values[::2], values[1::2]
    if all(metric in of for of in drawn):
        both = np.stack([of[metric] for of in drawn])
        difference = paired_difference(ours, theirs, both[::2], both[1::2])
    else:
        difference = Difference(float(np.mean(ours - theirs)), seeds=len(ours))
    return Row(metric, float(ours.mean()), float(theirs.mean()), difference)


def _check_alike(first: Measured, other: Measured, task: str) -> None:
    for section, keys in (("data", ("fingerprint", "split")), ("settings", ("uncertain", "blank", "labels"))):
        for key in keys:
            if getattr(first.evaluation, section).get(key) != getattr(other.evaluation, section).get(key):
                raise EvaluationError(f"{other.run}: has another {section}.{key} than {first.run}")
    one, two = (options_of(of.evaluation, task) for of in (first, other))
    if others := sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name)):
        raise EvaluationError(
            f"{other.run}: {task} was evaluated with another {', '.join(others)} than {first.run}"
        )


def different_keys(ours: Evaluation, theirs: Evaluation) -> list[str]:
    """Keys of the two configs that differ, of all that shapes what is learned."""
    one, two = dict(_flat(ours.config)), dict(_flat(theirs.config))
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not prefix and name in _BESIDES:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

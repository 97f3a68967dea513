"""A task that trains a network: everything of it but its head, its loss and its scores.

A unit is a fraction of the training patients and a seed. For each unit the network of the run and the
untrained one are trained by the trainer of pre-training, in run folders below the unit's own; the epoch is
chosen on the validation split by `Task.chooses`. Like every task, importing one imports no torch.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import Config, ConfigError, TaskConfig, key
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.task import EvaluationError, Facts, Needs, Role, Task, TaskResult, Unit
from shards.errors import UsageError

if TYPE_CHECKING:
    from medvlp.data.sample_store import SampleStore
    from medvlp.evaluation.heads.objective import SupervisedObjective
    from medvlp.evaluation.session import Session, View
    from medvlp.evaluation.supervised import Network
    from medvlp.methods.base import Method
    from medvlp.training.predictions import Predictions
    from medvlp.training.recipe import TrainingSet
    from shards.reader import ShardReader

#: What a training begins with: the run's weights, or those before its first step.
STARTS: tuple[Literal["trained", "untrained"], ...] = ("trained", "untrained")

#: Note of a joined result: unit -> those of its notes in which units differ.
BY_UNIT = "by_unit"
#: Notes that are put together in their own ways.
_JOINED = ("training", "not_evaluable")

#: Config of the training runs of every task, below its protocol.
DEFAULTS: dict[str, Any] = {
    # The rules by which reports are chosen for pre-training are not those of labels; and a pre-training may
    # flip because its entities change sides with the image, which no question, answer or report does.
    "data": {
        "split": "train",
        "transform": {"flip": 0.0},
        "tail": "wrap",
        "views": [],
        "min_sentences": 1,
        "min_tokens": 1,
        "images_per_study": "all",
        "shuffle_sentences": False,
    },
    "train": {"steps": None, "patience": 10, "spike_sigma": 0.0},
    "optimizer": {"phases": []},
    "prototypes": {"init": "random", "revive_below": 0.0, "anchors": []},
    "checkpoint": {"every_steps": 0, "every_minutes": 10.0, "keep_last": 1, "keep_every": 0},
    "validation": {"every_epochs": 1.0},
}


@dataclass
class TrainedTaskConfig(TaskConfig):
    fractions: list[float] = key(
        [0.01, 0.1, 1.0], "shares of the training patients, each a part of the larger ones", 1e-6, 1, (1, 100)
    )
    seeds: list[int] = key(
        [0], "seeds of draw, head and order; the mean over them is reported", 0, 2**32 - 1, (1, 100)
    )
    protocol: str = key("ours", "named settings of optimizer, schedule, head and views")
    labels: list[str] = key([], "labels that are learned; none: all of the dataset")
    uncertain: Literal["exclude", "positive", "negative", "per_class"] = key(
        "exclude", "what a label of -1 teaches: nothing, one side, or as published for CheXpert's five"
    )
    training: dict[str, Any] = key(
        {}, "sections of the config of its training runs, over the protocol's: {train: {epochs: 10}}"
    )

    def check(self, config: Config) -> None:
        for name in ("fractions", "seeds", "labels"):
            values = getattr(self, name)
            # Metrics are named after a share with six digits.
            names = {f"{value:g}" if name == "fractions" else value for value in values}
            if len(names) < len(values):
                raise ConfigError(f"{name}={values} of a task: one of them stands twice; remove it")


def with_labels_of(
    name: str, settings: TrainedTaskConfig, labels: Sequence[str], uncertain: str, blank: str
) -> TrainedTaskConfig:
    """The settings of a task with what an evaluation says of labels, which holds for all its tasks.

    Args:
        name, settings: of the task.
        labels, uncertain, blank: `--label`, `--uncertain` and `evaluation.blank`.

    Raises:
        UsageError: the task's own keys say something else.
    """
    changed: dict[str, Any] = {}
    for item, said, value, default in (
        ("labels", "--label", list(labels), []),
        ("uncertain", "--uncertain", uncertain, "exclude"),
        ("blank", "evaluation.blank", blank, "auto"),
    ):
        own = getattr(settings, item, value)
        if value == default or own == value:
            continue
        if own != default:
            raise UsageError(
                f"evaluation.tasks.{name}.{item}={own} and {said} ({value}) do not agree: leave one of them "
                "out"
            )
        changed[item] = value
    return replace(settings, **changed)


@dataclass
class Fitted:
    """What `fit` of a unit leaves for `measure`.

    Attributes:
        networks: "trained" and "untrained", each with the weights of its best validation.
        findings: the labels they have learned.
        chosen: what `TrainedTask.choose` chose there.
    """

    networks: dict[str, Network]
    findings: list[str]
    chosen: Any = None


class TrainedTask(Task):
    """See the module. A subclass writes `objective`, `metrics` and `score`.

    Attributes:
        teaches: what `learnable` looks for, in words.
        fields: batch fields that training and prediction read.
        chooses: metric of the validation that chooses the epoch: "loss", or a name that `metrics` gives.
        chooses_mode: whether the lowest or the highest is best.
        protocols: name -> sections of a run's config.
    """

    config = TrainedTaskConfig
    unit_keys = frozenset({"fractions", "seeds"})
    fits_to_labels = True
    trains = True
    teaches: ClassVar[str] = "a label of a finding"
    fields: ClassVar[frozenset[str]] = frozenset()
    chooses: ClassVar[str] = "loss"
    chooses_mode: ClassVar[Literal["min", "max"]] = "min"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ours": {}}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        if settings.protocol not in self.protocols:
            raise ConfigError(
                f"evaluation.tasks.{self.name}.protocol={settings.protocol}: there are "
                f"{', '.join(self.protocols)}"
            )
        if self.hedged and settings.uncertain != "exclude":
            raise UsageError(
                f"{self.name}: --uncertain or evaluation.tasks.{self.name}.uncertain={settings.uncertain} "
                f"would change nothing: {self.hedged}; leave it out"
            )

    @abc.abstractmethod
    def objective(self, method: Method, data: TrainingSet) -> SupervisedObjective:
        """What is trained: a head on the method, with a loss.

        Args:
            method: newly built; its weights are loaded later.
            data: what is learned from: `config`, `reader`, `samples` (positions in `config.data.split`),
                `tokenizer`. What has to be collected (a vocabulary, answers) comes from these samples only.
        """

    @abc.abstractmethod
    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """Cheap numbers of the validation split while training; NaN where there is none."""

    @abc.abstractmethod
    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        """Metrics of the evaluated split; baselines that need no training are added here.

        Args:
            view: sees the evaluated split; `view.patients("evaluated", sample)` for its `bootstrap`.
            unit: fraction and seed.
            predictions: of the networks "trained" and "untrained".
            fitted: with `chosen`.

        Returns:
            Plain metrics ("auroc/macro"); the fraction is put in by `measure` ("auroc@10%/macro").
        """

    def choose(self, view: View, unit: Unit, networks: Mapping[str, Network]) -> Any:
        """What `score` needs beside the networks: thresholds, taught baselines; by default nothing.

        Args:
            view: sees the training and the selection split.
            unit: fraction and seed.
            networks: "trained" and "untrained"; `network.predict(view, "selection")` costs a pass over it.
        """
        return None

    def protocol(self, config: Config) -> Mapping[str, Any]:
        """Sections of a run's config; `config` is that of the pre-training, its encoders described."""
        return self.protocols[self.settings.protocol]

    def learnable(self, reader: ShardReader, split: str, store: SampleStore) -> NDArray[np.bool_]:
        """[N] samples of a split that have something to learn or validate with; by default all."""
        return np.ones(len(store), dtype=bool)

    def findings(self, label_names: Sequence[str]) -> list[str]:
        """The labels that are learned, in this order.

        Raises:
            EvaluationError: the dataset has no such label.
        """
        for name in self.settings.labels:
            if name not in label_names:
                raise EvaluationError(
                    f"evaluation.tasks.{self.name}.labels: the dataset has no label {name!r}, it has "
                    f"{', '.join(label_names) or 'none'}"
                )
        return list(self.settings.labels or label_names)

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        return {role: Needs(fields=self.fields) for role in ("train", "selection", "evaluated")}

    def unavailable_on(self, facts: Facts) -> str | None:
        if not {"train", "selection"} <= facts.roles.keys():
            return (
                "needs the splits train and valid beside the evaluated one; "
                f"{facts.index.name} has {', '.join(facts.available)}"
            )
        return None

    def units(self) -> Sequence[Unit]:
        return [Unit(fraction, seed) for fraction in self.settings.fractions for seed in self.settings.seeds]

    def depends_on(self, session: Session, unit: Unit) -> Any:
        """The config of the training, without where and how fast it runs."""
        from medvlp.evaluation.supervised import unit_config

        values = asdict(unit_config(session, self, unit, "trained", Path()))
        del values["finetune"]["run"]
        sections = ("optimizer", "train", "image", "validation", "finetune", "precision", "checkpoint")
        kept = {name: values[name] for name in sections}
        kept |= {"deepspeed": values["deepspeed"]} if values["deepspeed"] else {}  # it may say anything
        return kept | {"views": values["data"]["transform"], "task": values["evaluation"]["tasks"][self.name]}

    def fit(self, view: View, unit: Unit) -> Fitted:
        """Train both networks, then choose."""
        networks: dict[str, Network] = {start: view.network(unit, start) for start in STARTS}
        findings = networks["trained"].task.findings(view.facts.index.label_names)
        return Fitted(networks, findings, self.choose(view, unit, networks))

    def measure(self, view: View, unit: Unit, fitted: Fitted) -> TaskResult:
        """Score the evaluated split."""
        assert unit.fraction is not None
        predictions = {name: network.predict(view, "evaluated") for name, network in fitted.networks.items()}
        result = self.score(view, unit, predictions, fitted)
        result.models = {
            model: {at_fraction(name, unit.fraction): value for name, value in metrics.items()}
            for model, metrics in result.models.items()
        }
        result.notes["training"] = {
            unit.name: {name: network.notes() for name, network in fitted.networks.items()}
        }
        return result

    def join(self, parts: Mapping[Unit, TaskResult]) -> TaskResult:
        """Fractions beside each other; of several seeds the mean, with its standard deviation beside it."""
        joined = TaskResult(notes=_joined_notes(parts) | {"training": {}})
        if listed := _not_evaluable(parts):
            joined.notes["not_evaluable"] = listed
        values: dict[tuple[str, str], list[Estimate]] = {}
        for part in parts.values():
            joined.notes["training"] |= part.notes["training"]
            for model, metrics in part.models.items():
                for name, estimate in metrics.items():
                    values.setdefault((model, name), []).append(estimate)
        for (model, name), found in values.items():
            of = joined.models.setdefault(model, {})
            of[name] = found[0] if len(found) == 1 else _mean(found)
            if len(found) > 1:
                kind, at, rest = name.partition("@")
                of[f"{kind}-sd{at}{rest}"] = Estimate(stdev(item.value for item in found))
        return joined


def _joined_notes(parts: Mapping[Unit, TaskResult]) -> dict[str, Any]:
    """What the notes of all units say alike, and under `BY_UNIT` what they do not."""
    first, *others = (part.notes for part in parts.values())
    alike = {
        key: value
        for key, value in first.items()
        if all(key in notes and notes[key] == value for notes in others)
    }
    apart = {
        unit.name: {key: value for key, value in part.notes.items() if key not in {*alike, *_JOINED}}
        for unit, part in parts.items()
    }
    return alike | ({BY_UNIT: apart} if any(apart.values()) else {})


def by_unit(notes: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The notes of each unit of a joined result, behind what a line about them begins with: "" where all
    units say the same."""
    for unit, own in notes.get(BY_UNIT, {"": {}}).items():
        yield f"{unit}: " if unit else "", {**notes, **own}


def _not_evaluable(parts: Mapping[Unit, TaskResult]) -> list[dict[str, str]]:
    """The findings that have no number in some unit, and why; the units, where others have one."""
    units: dict[tuple[str, str], list[str]] = {}
    for unit, part in parts.items():
        for item in part.notes.get("not_evaluable", []):
            units.setdefault((item["finding"], item["reason"]), []).append(unit.name)
    return [
        {"finding": finding, "reason": reason if len(of) == len(parts) else f"{reason} ({', '.join(of)})"}
        for (finding, reason), of in units.items()
    ]


def _mean(found: Sequence[Estimate]) -> Estimate:
    """Mean over seeds; the bounds are the means of theirs: a typical seed's interval by patient."""
    value = fmean(item.value for item in found)
    bounds = [(item.low, item.high) for item in found if item.low is not None and item.high is not None]
    if len(bounds) < len(found):
        return Estimate(value)
    return Estimate(value, fmean(low for low, _ in bounds), fmean(high for _, high in bounds))


def at_fraction(metric: str, fraction: float) -> str:
    """("auroc/edema", 0.1) -> "auroc@10%/edema"."""
    name, separator, finding = metric.partition("/")
    return f"{name}@{100 * fraction:g}%{separator}{finding}"

"""What a task is: the contract that every task keeps, and the registry it is found in.

A task says what it needs of each split, why it cannot be done, which units it falls into, and how its
numbers read. A unit is done in two steps, and each is handed only the splits it may see:

    fitted = task.fit(view, unit)                # trains and chooses; sees "train" and "selection"
    result = task.measure(view, unit, fitted)    # scores; sees "evaluated"

So nothing that is trained or chosen (epoch, penalty, threshold, prompt, vocabulary) has seen test data.
Importing a task imports no torch and no scikit-learn: commands that only name tasks answer at once.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from medvlp import config_files
from medvlp.config import TaskConfig
from medvlp.evaluation.examples import Examples
from medvlp.evaluation.metrics.bootstrap import Estimate
from shards.errors import MedvlpError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from medvlp.evaluation.session import Session, View
    from medvlp.methods.base import Method
    from shards.format import Index

#: "evaluated" is scored once; "selection" decides what has to be chosen; "train" teaches.
Role = Literal["evaluated", "selection", "train"]
Metrics = dict[str, Estimate]


class EvaluationError(MedvlpError):
    """An evaluation cannot be done or read; the message says what is missing and what to do."""

    exit_code = 3


@dataclass(frozen=True)
class Unit:
    """A part of a task that is done, resumed and sent to a cluster by itself.

    Attributes:
        fraction: share of the training labels, in (0, 1]; None: the task uses no part of them.
        seed: of the draw and of what is trained; None: the task draws nothing.
    """

    fraction: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """Its name in file names and after `--unit`: "whole", "fraction-0.1", "fraction-0.1-seed-2"."""
        said = {"fraction": self.fraction, "seed": self.seed}
        parts = [f"{name}-{_exactly(value)}" for name, value in said.items() if value is not None]
        return "-".join(parts) or "whole"


def _exactly(value: float) -> str:
    """A number as short as tells it from every other one: a seed of a date has eight digits."""
    short = f"{value:g}"
    return short if float(short) == value and "+" not in short else repr(value)


@dataclass(frozen=True)
class Needs:
    """What a task needs of a split beside its labels, reports, patients and 32x32 pixels.

    Attributes:
        image, text: embeddings. features: of the backbone, before any projection.
        prompts: sentences to which a method that scores pairs in its own way (`Method.score`) compares
            every image; the others are compared by `View.prompt_embeddings`.
        fields: of `Batch`, beside image and text; such a task reads the split itself with `View.batches`.
    """

    image: bool = False
    text: bool = False
    features: bool = False
    prompts: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Facts:
    """What is known before a sample is read.

    Attributes:
        index: of the dataset. available: names of its splits that hold samples.
        roles: the split of each role; a role that no split can play is missing.
        findings: the labels to be evaluated, in the order asked for; none: the dataset has no labels.
    """

    index: Index
    available: Sequence[str]
    roles: Mapping[Role, str]
    findings: Sequence[str]


@dataclass(frozen=True)
class Scores:
    """What curves are drawn from: scores of findings in the samples of the evaluated split.

    Attributes:
        sample: [N] positions in the split. findings: the C findings. truth: [N, C] labels 1, 0 or NaN.
        models: model -> [N, C] finite scores, higher where a finding is seen.
        thresholds: model -> finding -> the score from which on it is called.
        log_odds: models whose scores are log-odds (of `exclusive` findings: logits), so that they say
            probabilities. exclusive: each sample is of one of the findings, the one with the highest score.
    """

    sample: NDArray[np.int64]
    findings: Sequence[str]
    truth: NDArray[np.float64]
    models: Mapping[str, NDArray[np.float64]]
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    log_odds: frozenset[str] = frozenset()
    exclusive: bool = False


@dataclass
class TaskResult:
    """Metrics of each model ("trained", "untrained", baselines), and what stands beside them.

    Attributes:
        models: model -> metrics. notes: for people.
        scores: of the samples, of a unit of a task that classifies; kept beside its result.
        examples: for people to look at, of a unit of a task that has some; kept beside its result.
    """

    models: dict[str, Metrics] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    scores: Scores | None = None
    examples: Examples | None = None


@dataclass(frozen=True)
class Reading:
    """How the metrics of a task read.

    A metric is a path: "auroc/macro", "image_to_text/R@5", "auroc@10%/edema".

    Attributes:
        names: part of a path -> what people call it.
        summary: whether a metric stands in the short table; the others are those of single findings.
        by_finding: first part of the metrics that have a short table of single findings; None: no such table.
        whole: parts whose numbers are shown without decimals.
        remarks: lines under the tables, from the notes of the result.
        truth: what numbers are measured against beside the dataset, split and labels, by name, from the
            section `data` of the run's config and the notes. Runs with others stand in tables of their own.
        places: numbers are of places in what the network sees of an image.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    summary: Callable[[str], bool] = lambda metric: metric.endswith("/macro")
    by_finding: str | None = None
    whole: frozenset[str] = frozenset()
    remarks: Callable[[Mapping[str, Any]], list[str]] = lambda notes: []
    truth: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] = lambda data, notes: {}
    places: bool = False


class Task(abc.ABC):
    """One downstream task, with its own settings.

    Attributes:
        name: in options, config keys and results.
        summary: one line for `medvlp evaluate --help`.
        hedged: what becomes of uncertain labels whatever `--uncertain` says; "": what that says.
        own_files: keys of files that were made of this run's own output, so that every run has others; null
            before there is any. A unit is done again with them, and trains nothing again.
        version: raised when the same settings give other numbers than before, so that units are done again.
        config: class of its keys `evaluation.tasks.<name>.*`.
        unit_keys: keys that only list the units, so that the others stay finished when one is added.
        fits_to_labels: it fits something to the training labels, so "train" cannot be its selection split.
        keeps_scores: its units have `TaskResult.scores`. keeps_examples: they have `TaskResult.examples`.
        trains: it trains networks, which takes hours: done only where it is asked for by name.
        packages: modules it needs of the extra `evaluate`.
        reading: how its numbers read.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1
    hedged: ClassVar[str] = ""
    own_files: ClassVar[frozenset[str]] = frozenset()
    config: ClassVar[type[TaskConfig]] = TaskConfig
    unit_keys: ClassVar[frozenset[str]] = frozenset()
    fits_to_labels: ClassVar[bool] = False
    keeps_scores: ClassVar[bool] = False
    keeps_examples: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    reading: ClassVar[Reading] = Reading()

    def __init__(self, settings: Any) -> None:
        """`settings` is an instance of `config`."""
        self.settings = settings

    def check_packages(self) -> None:
        """Raise EvaluationError where a package is not installed: better now than after a training."""
        if missing := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            raise EvaluationError(f"{self.name} needs {', '.join(missing)}: pip install medvlp[evaluate]")

    @abc.abstractmethod
    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        """What each split has to give; a role that is missing is not read."""

    def unavailable_on(self, facts: Facts) -> str | None:
        """Why the dataset does not allow the task; None: it does, as far as can be told before reading it."""
        return None

    def unavailable_with(self, method: Method) -> str | None:
        """Why a pre-training method cannot do the task at all; None: it can."""
        return None

    def depends_on(self, session: Session, unit: Unit) -> Any:
        """What the numbers of a unit depend on beside its settings and the evaluated network, for JSON."""
        return None

    def units(self) -> Sequence[Unit]:
        """The units, in the order to be done; each by another name."""
        return (Unit(),)

    def fit(self, view: View, unit: Unit) -> Any:
        """Train and choose what `measure` needs; may leave its state in `view.folder` and go on from it."""
        return None

    @abc.abstractmethod
    def measure(self, view: View, unit: Unit, fitted: Any) -> TaskResult:
        """Score the evaluated split with what `fit` returned.

        Raises:
            EvaluationError: the split turns out not to allow it.
        """

    def join(self, parts: Mapping[Unit, TaskResult]) -> TaskResult:
        """One result of the results of all units."""
        (result,) = parts.values()
        return result


REGISTRY: dict[str, type[Task]] = {}
TaskType = TypeVar("TaskType", bound=type[Task])


def register(task: TaskType) -> TaskType:
    """Decorator of a task's class.

    Raises:
        ValueError: another task has the name.
    """
    known = REGISTRY.setdefault(task.name, task)
    if known is not task:
        raise ValueError(f"task {task.name!r} is registered twice, as {known} and {task}")
    return task


def tasks() -> dict[str, type[Task]]:
    """All tasks by name: those of the folder `tasks/`, then those registered from elsewhere."""
    from medvlp.evaluation import tasks as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    # By name and not by import: a program may have imported one of them before.
    own = f"{folder.__name__}."
    return dict(sorted(REGISTRY.items(), key=lambda item: (not item[1].__module__.startswith(own), item[0])))


def schemas() -> dict[str, type[TaskConfig]]:
    """Config class of every task by name (what `medvlp.config_files.load` checks `evaluation.tasks` with)."""
    return {name: task.config for name, task in tasks().items()}


#: Sections of a run's config that say how it was trained: what a task trains has its own.
_OF_TRAINING = ("train", "optimizer", "validation", "checkpoint", "finetune")
#: Of these the keys that the network before training depends on.
_USED = ("train.seed", "train.start")


def check_used(files: Sequence[config_files.File], overrides: Sequence[str], names: Sequence[str]) -> None:
    """Refuse keys that no evaluation reads, before one is started or queued.

    Args:
        files, overrides: over the config of the run. names: of the tasks that were asked for.

    Raises:
        UsageError: one was given.
    """
    for key, where in config_files.given_keys(files, overrides, schemas()).items():
        section, _, name = key.partition(".")
        if section in _OF_TRAINING and key not in _USED:
            trained = [task for task in names if tasks()[task].trains] or ["TASK"]
            own = "fractions" if section == "finetune" else f"training.{section}.{name}"
            raise UsageError(
                f"{where}: {key} of the run changes nothing that is evaluated; what a task trains is set by "
                f"evaluation.tasks.{trained[0]}.{own}"
            )

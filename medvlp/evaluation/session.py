"""What the tasks of one evaluation share: networks, dataset, and splits that are embedded once for all.

Everything heavy is made when it is first asked for. A task never holds the session: each step of a unit gets
a `View` that hands out only the splits this step may see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.dataset import EvaluationDataset
from medvlp.data.fields import FIELDS
from medvlp.data.loader import evaluation_dataset, evaluation_loader
from medvlp.data.report import report_sentences, report_text
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.evaluation.features import Wanted, embed, embed_texts, load_models
from medvlp.evaluation.labels import (
    Floats,
    Uncertain,
    binary,
    blank_side,
    check_uncertain,
    not_evaluable,
    sides,
)
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.splits import Split, check_apart, chosen_labels, selection_split
from medvlp.evaluation.task import EvaluationError, Facts, Needs, Role, Task, Unit
from medvlp.methods.base import Method
from medvlp.runs.saved_run import SavedRun
from shards.progress import tracked
from shards.reader import ShardReader

if TYPE_CHECKING:
    from medvlp.evaluation.supervised import Network


@dataclass
class Session:
    """One checkpoint on one dataset.

    Attributes:
        source: run and checkpoint. config: the run's, with overrides. tokenizer: the run's.
        device: of the networks.
        reader: the dataset.
        labels: those asked for; none: all.
        uncertain: what becomes of uncertain labels.
        say: receives one line of progress at a time.
        train: trains the run that a config describes; its exit code.
    """

    source: SavedRun
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    reader: ShardReader
    labels: Sequence[str]
    uncertain: Uncertain
    say: Callable[[str], None]
    train: Callable[[Config], int]
    _needs: dict[str, list[Needs]] = field(default_factory=dict)
    _splits: dict[str, Split] = field(default_factory=dict)
    _prompts: dict[tuple[str, ...], dict[str, NDArray[Any] | None]] = field(default_factory=dict)
    _apart: set[tuple[tuple[str, ...], bool]] = field(default_factory=set)
    _stores: dict[str, SampleStore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that there are such a split and such labels.

        Raises:
            DataError, UsageError: there are not.
        """
        self.reader.index.split_shards(self.config.evaluation.split)
        self.findings = chosen_labels(self.reader.index.label_names, self.labels)
        check_uncertain(self.uncertain, self.findings)

    @cached_property
    def models(self) -> dict[str, Method]:
        """The trained network and the untrained one, by these names."""
        return load_models(self.source, self.config, self.tokenizer, self.device)

    def facts(self, task: Task) -> Facts:
        """What is known before a sample is read, and which split plays which role for the task."""
        index, evaluated = self.reader.index, self.config.evaluation.split
        available = [name for name, totals in index.splits.items() if totals.samples]
        roles: dict[Role, str] = {"evaluated": evaluated}
        if selection := selection_split(available, evaluated, task.fits_to_labels):
            roles["selection"] = selection
        if "train" in available and evaluated != "train":
            roles["train"] = "train"
        return Facts(index, available, roles, self.findings)

    def expect(self, task: Task) -> None:
        """Note what a task needs of the splits, before the first of them is embedded.

        Raises:
            ValueError: the loader has no such batch field, or splits have been embedded.
        """
        if self._splits:
            raise ValueError("all tasks say what they need before the first split is embedded")
        facts = self.facts(task)
        for role, needs in task.needs(facts).items():
            if unknown := sorted(needs.fields - FIELDS.keys()):
                raise ValueError(
                    f"task {task.name} needs the batch field {unknown[0]}, which is never loaded"
                )
            if role in facts.roles:
                self._needs.setdefault(facts.roles[role], []).append(needs)

    def check(self, task: Task) -> None:
        """See to it that a task can be done, as far as can be told before hours of training.

        Raises:
            EvaluationError: a package is missing; splits share patients that it learns from; one of them has
                nothing to learn from, to choose by, or to measure on.
        """
        task.check_packages()
        facts = self.facts(task)
        roles = facts.roles.keys() if task.fits_to_labels else facts.roles.keys() & task.needs(facts).keys()
        splits = tuple(sorted({facts.roles[role] for role in roles}))
        # Where only a threshold or a baseline has seen a patient, most numbers are as good as before.
        allowed = self.config.evaluation.shared_patients or not task.fits_to_labels
        told = allowed and any(set(splits) <= set(known) for known, _ in self._apart)
        if not told and (splits, allowed) not in self._apart:
            check_apart(self.reader, splits, allowed, self.say)
            self._apart.add((splits, allowed))
        from medvlp.evaluation.learned_samples import learnable
        from medvlp.evaluation.trained import TrainedTask

        if not isinstance(task, TrainedTask):
            return
        for split in splits:
            store = SampleStore.open_or_build(self.reader, split, self.config.data, self.tokenizer)
            if not len(learnable(task, self.reader, split, store)):
                raise EvaluationError(f"{task.name}: no sample of split {split} has {task.teaches}")

    def view(self, task: Task, roles: Sequence[Role], folder: Path | None) -> View:
        """The session as a step of one of the task's units sees it."""
        return View(self, task, self.facts(task), frozenset(roles), folder)

    def split(self, name: str) -> Split:
        """A split with everything that the tasks need of it."""
        if name not in self._splits:
            self._splits[name] = self._load(name)
        return self._splits[name]

    def prompt_embeddings(self, sentences: tuple[str, ...]) -> dict[str, NDArray[Any] | None]:
        """See `View.prompt_embeddings`."""
        if sentences not in self._prompts:
            text = self.tokenised(sentences)
            self._prompts[sentences] = {
                name: embed_texts(method, text, self.device) if method.scores_by_embedding else None
                for name, method in self.models.items()
            }
        return self._prompts[sentences]

    def splits_used(self) -> dict[str, dict[str, int]]:
        """Samples, patients and corrupt samples of each split that has been read, embedded or by datasets."""
        found = {}
        for name, totals in self.reader.index.splits.items():
            if name not in self._splits and name not in self._stores:
                continue
            samples = self.reader.sample_count(name)
            if name in self._splits:
                patients = self._splits[name].patients
                read, known = len(patients), len(np.unique(patients))
            else:
                read, known = samples - len(self._stores[name].unreadable), totals.patients
            found[name] = {"samples": read, "patients": known, "corrupt": samples - read}
        return found

    def dataset(self, name: str, fields: Collection[str]) -> EvaluationDataset:
        """A split as tasks read it that embed nothing, with these batch fields."""
        dataset = evaluation_dataset(self.config, self.reader, self.tokenizer, name, sorted(fields))
        self._stores[name] = dataset.store
        return dataset

    def tokenised(self, sentences: Sequence[str]) -> Text:
        """See `View.tokenised`."""
        data = self.config.data
        return self.tokenizer.tokenize(
            [[sentence] for sentence in sentences], data.max_tokens, data.pad_to_max
        )

    def _load(self, name: str) -> Split:
        needs = self._needs[name]
        wanted = Wanted(
            image=any(of.image for of in needs),
            text=any(of.text for of in needs),
            features=any(of.features for of in needs),
            prompts={of.prompts: self.tokenised(of.prompts) for of in needs if of.prompts},
        )
        # Only prompts need no network of a method that compares embeddings.
        models = self.models if wanted.image or wanted.text or wanted.features or wanted.prompts else {}
        self.say(
            f"  embedding {self.reader.sample_count(name)} samples of {name} with {len(models)} networks "
            f"({', '.join(models)})"
            if models
            else f"  reading {self.reader.sample_count(name)} samples of {name}"
        )
        config, names = self.config, self.reader.index.label_names
        loader = evaluation_loader(config, self.reader, self.tokenizer, name, config.evaluation.batch)
        batches = tracked(
            loader, f"embedding {name}", self.reader.sample_count(name), size=lambda batch: len(batch.sample)
        )
        arrays = embed(models, batches, wanted, self.device)
        metadata = [self.reader.metadata(name, int(position)) for position in arrays.sample]
        labels = [[sample["labels"].get(label) for label in names] for sample in metadata]
        return Split(
            name,
            np.array([sample["patient_id"] for sample in metadata]),
            [report_text(sample, config.data) for sample in metadata],
            np.array(labels, dtype=np.float64).reshape(len(metadata), len(names)),
            arrays,
            [[phrase["text"] for phrase in sample["phrases"]] for sample in metadata],
            [
                report_sentences(sample["sections"], config.data.sections, config.data.cleaning)
                for sample in metadata
            ],
        )


@dataclass(frozen=True)
class View:
    """What a step of a unit may see: `Task.fit` the training and selection splits, `Task.measure` the rest.

    Attributes:
        facts: what is known before a sample is read.
        resamples: fingerprints of the resamples it has given.
    """

    _session: Session
    _task: Task
    facts: Facts
    _roles: frozenset[Role]
    _folder: Path | None
    resamples: set[str] = field(default_factory=set)

    def split(self, role: Role) -> Split | None:
        """The split that plays a role, embedded as the task needs it; None where the dataset has none.

        Raises:
            ValueError: this step may not see it, or the task has not said that it needs it.
        """
        name = self._name(role)
        return None if name is None else self._session.split(name)

    def batches(self, role: Role) -> Iterator[Batch]:
        """Read a split in order, with the batch fields the task needs of it; every sample once.

        Raises:
            ValueError: as for `split`.
        """
        name, session = self._name(role), self._session
        fields = self._task.needs(self.facts)[role].fields
        if name is not None:
            config = session.config
            batch = config.evaluation.batch
            yield from evaluation_loader(
                config, session.reader, session.tokenizer, name, batch, fields=sorted(fields)
            )

    def dataset(self, role: Role) -> EvaluationDataset:
        """The split that plays a role, with the batch fields the task needs of it; errors as `split`.

        Raises:
            EvaluationError: the dataset has no such split.
        """
        if (name := self._name(role)) is None:
            raise EvaluationError(f"{self._task.name}: the dataset has no split for {role!r}")
        return self._session.dataset(name, self._task.needs(self.facts)[role].fields)

    def patients(self, role: Role, sample: NDArray[np.int64]) -> NDArray[Any]:
        """[N] patients of samples [N] of a split; errors as `dataset`."""
        dataset = self.dataset(role)
        metadata = [dataset.reader.metadata(dataset.split, int(position)) for position in sample]
        return np.array([known["patient_id"] for known in metadata])

    def network(self, unit: Unit, start: Literal["trained", "untrained"]) -> Network:
        """The network of a unit of a task that trains, trained in a folder of its own.

        Raises:
            TrainingStoppedError: the training has ended otherwise than well.
        """
        from medvlp.evaluation.supervised import trained
        from medvlp.evaluation.trained import TrainedTask

        assert isinstance(self._task, TrainedTask)
        return trained(self._session, self._task, unit, start, self.folder)

    def drawn(self, unit: Unit) -> NDArray[np.int64]:
        """Positions of the samples that a unit of a task that trains learns from, ascending."""
        from medvlp.evaluation.learned_samples import draw
        from medvlp.evaluation.supervised import unit_config
        from medvlp.evaluation.trained import TrainedTask

        assert isinstance(self._task, TrainedTask)
        dataset = self.dataset("train")
        config = unit_config(self._session, self._task, unit, "trained", Path())
        return draw(self._task, dataset.reader, config, dataset.store)

    def truth(self, split: Split, findings: Sequence[str] | None = None) -> Floats:
        """[N, C] labels (1, 0, NaN) of some findings, by default of all that are evaluated."""
        names, session = self.facts.index.label_names, self._session
        findings = self.facts.findings if findings is None else findings
        blank = blank_side(session.config.evaluation.blank, names)
        columns = [names.index(name) for name in findings]
        return binary(split.labels[:, columns], sides(session.uncertain, findings), blank)

    def prompt_embeddings(self, sentences: tuple[str, ...]) -> dict[str, NDArray[Any] | None]:
        """[P, D] unit-norm embeddings of sentences by every network; None: it scores pairs in its own way."""
        return self._session.prompt_embeddings(sentences)

    def tokenised(self, sentences: Sequence[str]) -> Text:
        """Sentences as the run's tokenizer gives them to a text encoder, each a text of its own."""
        return self._session.tokenised(sentences)

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of token ids of the run's tokenizer."""
        return self._session.tokenizer.decode(ids)

    def bootstrap(self, patients: NDArray[Any]) -> PatientBootstrap:
        """The resamples of the intervals, for samples of these [N] patients."""
        resamples = PatientBootstrap(patients, self._session.config.evaluation.bootstrap, self.seed)
        self.resamples.add(resamples.fingerprint)
        return resamples

    @cached_property
    def evaluable(self) -> frozenset[str]:
        """Findings with both classes in the evaluated split: all that `fit` is told of it."""
        truth = self.truth(split := self._session.split(self.facts.roles["evaluated"]))
        out = {item.finding for item in not_evaluable(truth, self.facts.findings, split.name)}
        return frozenset(self.facts.findings) - out

    @property
    def seed(self) -> int:
        """Seed of resamples and draws."""
        return self._session.config.evaluation.seed

    @property
    def models(self) -> dict[str, Method]:
        """The networks "trained" and "untrained", in evaluation mode, on `device`."""
        return self._session.models

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._session.device

    @property
    def say(self) -> Callable[[str], None]:
        """Receives one line of progress at a time."""
        return self._session.say

    @property
    def folder(self) -> Path:
        """A folder of the unit's own, kept between calls until the unit is finished anew.

        Raises:
            ValueError: the run folder cannot be written.
        """
        if self._folder is None:
            raise ValueError(f"task {self._task.name} keeps files, and its run folder cannot be written")
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _name(self, role: Role) -> str | None:
        if role not in self._roles:
            raise ValueError(
                f"task {self._task.name}: this step may see {' and '.join(sorted(self._roles))}, not {role}: "
                "what is trained or chosen must not have seen the split that is evaluated"
            )
        if role not in self._task.needs(self.facts):
            raise ValueError(
                f"task {self._task.name} reads the split {role} without having said that it needs it"
            )
        return self.facts.roles.get(role)

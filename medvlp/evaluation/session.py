"""One evaluation from beginning to end: load, embed each split once, do the tasks, collect the results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from medvlp.config import Config
from medvlp.data.cache import open_reader
from medvlp.data.loader import evaluation_loader
from medvlp.data.report import report_sentences
from medvlp.data.text import Tokenizer
from medvlp.evaluation import prompts
from medvlp.evaluation.features import Wanted, embed, embed_texts
from medvlp.evaluation.labels import Uncertain
from medvlp.evaluation.loading import load_models
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.report.results import Evaluation, EvaluationError, TaskResult
from medvlp.evaluation.splits import Split, columns, selection_split
from medvlp.evaluation.tasks import retrieval
from medvlp.evaluation.tasks.linear_probe import LinearProbe
from medvlp.evaluation.tasks.zero_shot import Ensemble, ZeroShot, prompts_of
from medvlp.methods.base import Method
from medvlp.runs import saved_run
from shards.errors import UsageError
from shards.reader import ShardReader

TASKS = ("zero-shot", "retrieval", "linear-probe")


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        source: run folder or checkpoint folder.
        data: dataset folder or URL prefix; None: the one the run was trained on.
        tasks: some of `TASKS`; none: every task the dataset allows.
        labels: labels to evaluate; none: all of the dataset.
        overrides: `section.key=value` over the run's config.
        uncertain: what becomes of uncertain labels.
        device: "auto", "cpu" or "cuda".
    """

    source: Path
    data: str | None = None
    tasks: Sequence[str] = ()
    labels: Sequence[str] = ()
    overrides: Sequence[str] = ()
    uncertain: Uncertain = "exclude"
    device: str = "auto"

    def check(self) -> None:
        """Raise UsageError for a value that does not exist."""
        choices = {"--task": (self.tasks, TASKS), "--uncertain": ((self.uncertain,), get_args(Uncertain))}
        choices["--device"] = ((self.device,), ("auto", "cpu", "cuda"))
        for option, (values, known) in choices.items():
            for value in values:
                if value not in known:
                    raise UsageError(f"{option} {value}: there are {', '.join(known)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: this machine has no usable CUDA device")


def evaluate(request: Request, say: Callable[[str], None]) -> Evaluation:
    """Evaluate a run beside its baselines.

    Args:
        request: what to evaluate on what.
        say: receives one line of progress at a time.

    Raises:
        MedvlpError: something needed is missing or wrong (see `saved_run`, `prompts`, `splits`).
    """
    request.check()
    source = saved_run.locate(request.source)
    # A run that stores no tokenizer reads it where its own data are.
    moved = None if source.stored is None else request.data
    config = saved_run.load_config(source, request.overrides, moved, untrained=True)
    tokenizer = saved_run.load_tokenizer(source, config)
    if request.data is not None:
        config.data.root = request.data
    device = torch.device("cuda" if request.device != "cpu" and torch.cuda.is_available() else "cpu")
    models = load_models(source, config, tokenizer, device)
    reader = open_reader(config.data)
    said = request.data is not None or any(text.startswith("data.root=") for text in request.overrides)
    saved_run.check_data(source, config, reader.index, said, say)
    session = _Session(request, config, tokenizer, models, device, reader, say)
    evaluation = Evaluation(
        model={
            "name": source.name(config),
            "run": str(source.run),
            "checkpoint": source.checkpoint.name,
            "step": source.step,
            "weights": source.weights,
        },
        data={},
        settings={
            "tasks": list(request.tasks or TASKS),
            "labels": list(request.labels),
            "uncertain": request.uncertain,
            "device": device.type,
            "tokenizer": tokenizer.fingerprint,
            **dataclasses.asdict(config.evaluation),
        },
        config=dataclasses.asdict(config),
    )
    for task in request.tasks or TASKS:
        say(f"{task}: started")
        start = time.monotonic()
        try:
            result = session.tasks[task]()
        except EvaluationError as error:
            if request.tasks:
                raise
            say(f"{task} left out: {error}")
            evaluation.notes[task] = {"left_out": str(error)}
            continue
        evaluation.results[task], evaluation.notes[task] = result.models, result.notes
        say(f"{task}: done in {time.monotonic() - start:.0f} s")
    if not evaluation.results:
        raise EvaluationError(f"{config.data.root}: no task can be evaluated on it (see the lines above)")
    evaluation.data = session.data()
    return evaluation


@dataclass
class _Session:
    """The parts of one evaluation; splits are embedded when a task first needs them."""

    request: Request
    config: Config
    tokenizer: Tokenizer
    models: dict[str, Method]
    device: torch.device
    reader: ShardReader
    say: Callable[[str], None]
    _splits: dict[str, Split] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks: dict[str, Callable[[], TaskResult]] = {
            "zero-shot": self.zero_shot,
            "retrieval": self.retrieval,
            "linear-probe": self.linear_probe,
        }
        self.evaluated = self.config.evaluation.split
        self.reader.index.split_shards(self.evaluated)
        self.names = list(self.reader.index.label_names)
        if self.request.labels:
            columns(self.names, self.request.labels)
        self.available = [name for name, totals in self.reader.index.splits.items() if totals.samples]
        self.wanted_tasks = self.request.tasks or TASKS
        book = prompts.read(self.config.evaluation.prompts)
        for finding in book.unused(self.names):
            self.say(f"{self.config.evaluation.prompts}: {finding!r} is no label of the dataset")
        self.ensemble = Ensemble.of(prompts_of(book, self.names))
        sentences = [[sentence] for sentence in self.ensemble.sentences]
        data = self.config.data
        self.prompt_text = self.tokenizer.tokenize(sentences, data.max_tokens, data.pad_to_max)

    def zero_shot(self) -> TaskResult:
        chosen = columns(self.names, self.request.labels)
        if not any(self.names[number] in self.ensemble.rows for number in chosen):
            raise EvaluationError(
                "zero-shot: no prompts for any of the labels; set evaluation.prompts=FILE.yaml"
            )
        split, settings = self.split(self.evaluated), self.config.evaluation
        selection = selection_split(self.available, self.evaluated)
        task = ZeroShot(
            split=split,
            selection=self.split(selection) if selection else None,
            train=self.train(),
            names=[self.names[number] for number in chosen],
            columns=chosen,
            ensemble=self.ensemble,
            uncertain=self.request.uncertain,
            bootstrap=PatientBootstrap(split.patients, settings.bootstrap, settings.seed),
        )
        embedded = {
            name: embed_texts(method, self.prompt_text, self.device) if method.scores_by_embedding else None
            for name, method in self.models.items()
        }
        return task.evaluate(embedded)

    def retrieval(self) -> TaskResult:
        if not all(method.embeds_reports for method in self.models.values()):
            method_name = self.config.method.name
            return TaskResult(notes={"not_available": f"the method {method_name} does not embed reports"})
        split, settings = self.split(self.evaluated), self.config.evaluation
        chosen = columns(self.names, self.request.labels) if self.names else []
        return retrieval.evaluate(
            split,
            self.train(),
            [self.names[number] for number in chosen],
            chosen,
            self.request.uncertain,
            settings.bootstrap,
            settings.seed,
        )

    def linear_probe(self) -> TaskResult:
        chosen = columns(self.names, self.request.labels)
        train = self.train()
        selection = selection_split(self.available, self.evaluated, trained_on=True)
        if train is None or selection is None:
            raise EvaluationError(
                "linear-probe: needs the splits train and valid beside the evaluated one; "
                f"{self.config.data.root} has {', '.join(self.available)}"
            )
        split, settings = self.split(self.evaluated), self.config.evaluation
        task = LinearProbe(
            split=split,
            selection=self.split(selection),
            train=train,
            names=[self.names[number] for number in chosen],
            columns=chosen,
            uncertain=self.request.uncertain,
            fractions=settings.fractions,
            seed=settings.seed,
            bootstrap=PatientBootstrap(split.patients, settings.bootstrap, settings.seed),
        )
        return task.evaluate()

    def train(self) -> Split | None:
        """The training split, unless it is the one evaluated or the dataset has none."""
        usable = "train" in self.available and self.evaluated != "train"
        return self.split("train") if usable else None

    def split(self, name: str) -> Split:
        """A split with everything the wanted tasks need of it."""
        if name not in self._splits:
            self._splits[name] = self._load(name)
        return self._splits[name]

    def data(self) -> dict[str, object]:
        """The `data` section of the result."""
        return {
            "root": str(self.config.data.root),
            "name": self.reader.index.name,
            "fingerprint": self.reader.index.fingerprint,
            "split": self.evaluated,
            "splits": {
                name: {
                    "samples": len(split.patients),
                    "patients": len(np.unique(split.patients)),
                    "corrupt": self.reader.sample_count(name) - len(split.patients),
                }
                for name, split in self._splits.items()
            },
        }

    def _load(self, name: str) -> Split:
        wanted = self._wanted(name)
        models = self.models if wanted.image or wanted.text or wanted.features else {}
        self.say(
            f"  embedding {self.reader.sample_count(name)} samples of {name} with {len(models)} networks "
            f"({', '.join(models)})"
            if models
            else f"  reading {self.reader.sample_count(name)} samples of {name}"
        )
        settings, data = self.config.evaluation, self.config.data
        loader = evaluation_loader(self.config, self.reader, self.tokenizer, name, settings.batch)
        arrays = embed(models, loader, wanted, self.device)
        metadata = [self.reader.metadata(name, int(position)) for position in arrays.sample]
        labels = [[sample["labels"].get(label) for label in self.names] for sample in metadata]
        return Split(
            name,
            np.array([sample["patient_id"] for sample in metadata]),
            [
                " ".join(report_sentences(sample["sections"], data.sections, data.cleaning))
                for sample in metadata
            ],
            np.array(labels, dtype=np.float64).reshape(len(metadata), len(self.names)),
            arrays,
        )

    def _wanted(self, name: str) -> Wanted:
        zero_shot, retrieving, probing = (task in self.wanted_tasks for task in TASKS)
        evaluated = name == self.evaluated
        chooses = name == selection_split(self.available, self.evaluated)
        return Wanted(
            image=(evaluated and (zero_shot or retrieving)) or (chooses and zero_shot),
            text=evaluated and retrieving,
            features=probing,
            prompts=self.prompt_text if self.ensemble.rows and zero_shot and (evaluated or chooses) else None,
        )

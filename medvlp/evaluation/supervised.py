"""The training runs of tasks: their config, their recipe, and the networks that come out of them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from omegaconf import OmegaConf
from torch import Tensor

from medvlp import config_files, distributed, trust
from medvlp.config import Config
from medvlp.config_files import Layer
from medvlp.data.batch import Batch
from medvlp.data.dataset import EvaluationDataset
from medvlp.data.loader import EvaluationLoader, TrainingLoader, evaluation_dataset
from medvlp.data.order import Positions
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.learned_samples import draw, learnable
from medvlp.evaluation.splits import check_apart
from medvlp.evaluation.task import EvaluationError, Role, Unit, schemas, tasks
from medvlp.evaluation.trained import DEFAULTS, TrainedTask
from medvlp.evaluation.while_training import MeasuredPretraining
from medvlp.methods import registry
from medvlp.methods.base import Objective
from medvlp.runs import saved_run
from medvlp.runs.agreement import together
from medvlp.runs.encoder_records import described
from medvlp.runs.errors import CheckpointError
from medvlp.runs.events import is_finished
from medvlp.runs.manifest import VALIDATION_PREFIX, step_folders
from medvlp.runs.retention import best_of
from medvlp.runs.saved_run import SavedRun
from medvlp.runs.start import begin_again
from medvlp.training.predictions import Predictions, predict
from medvlp.training.recipe import Recipe, TrainingSet
from shards.errors import MedvlpError
from shards.progress import meter
from shards.reader import ShardReader

if TYPE_CHECKING:
    from medvlp.evaluation.session import Session, View

Start = Literal["trained", "untrained"]
#: (objective, batch) -> arrays [B, ...] of its samples.
Look = Callable[[SupervisedObjective, Batch], Mapping[str, Tensor]]
logger = logging.getLogger(__name__)

#: Sections of a run's config that its network and the reading of images and reports depend on.
_NETWORK = ("image", "text", "method", "prototypes", "data")
#: Those that say how a machine is used, taken over where a run is evaluated.
_MACHINE = ("precision", "zero", "deepspeed", "monitor")


class TrainingStoppedError(MedvlpError):
    """A training of a task has not ended well; `exit_code` is that of the training."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def recipe_of(config: Config) -> Recipe:
    """What a run trains: the task that its config names, else the method.

    Raises:
        EvaluationError: there is no such task, or it trains nothing.
    """
    return MeasuredPretraining(config) if config.task is None else Supervised(config)


def task_of(config: Config) -> TrainedTask:
    """The task that a config trains; errors as `recipe_of`."""
    known = tasks()
    names = [name for name, task in known.items() if issubclass(task, TrainedTask)]
    if config.task not in names:
        raise EvaluationError(
            f"task={config.task}: no task of this name trains; there are {', '.join(names)}"
        )
    task = known[config.task](config.evaluation.tasks[config.task])
    assert isinstance(task, TrainedTask)
    task.check_packages()
    return task


class Supervised(Recipe):
    """The head of a task on the network of `finetune.run`, on a fraction of the patients of a split."""

    def __init__(self, config: Config) -> None:
        self.task = task_of(config)
        super().__init__(config, self.task.fields)

    @cached_property
    def _source(self) -> SavedRun:
        assert self.config.finetune.run is not None, "checked where the config was made"
        return saved_run.locate(Path(self.config.finetune.run))

    def tokenizer(self) -> Tokenizer:
        """The one the network was pre-trained with."""
        return saved_run.load_tokenizer(self._source, self.config)

    def samples(self, reader: ShardReader, tokenizer: Tokenizer) -> Positions:
        """Those of the patients that are drawn, of what can be learned from."""
        config = self.config

        def drawn() -> list[int]:
            if not distributed.is_main():
                return []
            store = SampleStore.open_or_build(reader, config.data.split, config.data, tokenizer)
            return list(draw(self.task, reader, config, store).tolist())

        return np.array(distributed.broadcast_object(together(drawn)), dtype=np.int64)

    def build(self, data: TrainingSet) -> SupervisedObjective:
        """See `Recipe.build`."""
        # A method may have other parts in each phase of its own training, and all of them are in the weights.
        phases = saved_run.load_config(self._source, [], reads_data=False).optimizer.phases
        config = dataclasses.replace(
            data.config, optimizer=dataclasses.replace(data.config.optimizer, phases=phases)
        )
        return self.task.objective(registry.build_method(config, data.tokenizer.vocab_size), data)

    def start(self, objective: Objective, batches: Callable[[], TrainingLoader]) -> None:
        """Take over the weights of the pre-training, or those it began with itself (`train.start`)."""
        assert isinstance(objective, SupervisedObjective)
        source = self._source
        if self.config.finetune.start == "trained":
            together(partial(source.checkpoint.weights_into, objective.method))
        else:
            began = saved_run.load_config(source, [], reads_data=False)
            begin_again(objective.method, began, None if source.stored is None else source.stored[0])

    def validated(self, reader: ShardReader, store: SampleStore) -> Positions:
        """Those that something is known of; EvaluationError where their patients are learned from, too."""
        learned, chooses = self.config.data.split, self.config.validation.split
        check_apart(reader, (learned, chooses), self.config.evaluation.shared_patients, logger.warning)
        return learnable(self.task, reader, chooses, store)

    def examination(self, objective: Objective, data: TrainingSet) -> Callable[[Batch], Mapping[str, Tensor]]:
        """See `SupervisedObjective.predict`."""
        assert isinstance(objective, SupervisedObjective)
        return objective.predict

    def measure(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """See `TrainedTask.metrics`."""
        return self.task.metrics(predictions, data)

    def started_from(self) -> Mapping[str, str]:
        """The weights of the pre-training."""
        return {"run": self._source.weights} if self.config.finetune.start == "trained" else {}

    def lesson(self) -> Mapping[str, str]:
        """Also task, draw and settings; the pre-training's weights as far as they are still at hand."""
        config, settings = self.config, dataclasses.asdict(self.task.settings)
        said = {
            "task": config.task,
            "finetune.start": config.finetune.start,
            "finetune.fraction": config.finetune.fraction,
        }
        # How long and how fast it learns may change, as in pre-training; units are other runs.
        kept = settings.keys() - self.task.unit_keys - self.task.own_files - {"training"}
        said |= {f"evaluation.tasks.{config.task}.{key}": settings[key] for key in sorted(kept)}
        with suppress(MedvlpError):
            said["finetune.run"] = self._source.weights
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
        return {**super().lesson(), **texts}


def run_config(
    source: SavedRun,
    base: Config,
    task: TrainedTask,
    unit: Unit,
    start: Start,
    files: Sequence[Path | str | Layer] = (),
    overrides: Sequence[str] = (),
) -> Config:
    """The config of a training run: the pre-trained network below the protocol below what the user says.

    Args:
        source: the pre-training.
        base: its config, with the user's changes where it is evaluated.
        task: with its settings.
        unit: fraction and seed.
        start: what it begins with.
        files, overrides: the user's; they say `run.dir`.

    Raises:
        ConfigError: see `config_files.load`.
    """
    identity = None if source.stored is None else source.stored[0]
    known = described(base, identity)
    network = dataclasses.asdict(known if start == "trained" else base)
    name = f"evaluation.tasks.{task.name}"
    best = {"keep_best": VALIDATION_PREFIX + task.chooses, "best_mode": task.chooses_mode}
    unit_values = {
        "task": task.name,
        "train": {"seed": unit.seed},
        "finetune": {
            "run": str(source.checkpoint.folder.resolve()),
            "start": start,
            "fraction": unit.fraction,
        },
        "evaluation": {"tasks": {task.name: dataclasses.asdict(task.settings)}},
    }
    layers = [
        Layer(f"the config of {source.run}", {section: network[section] for section in _NETWORK}),
        Layer("the defaults of tasks that train", DEFAULTS),
        Layer(f"task {task.name}", {"checkpoint": best}),
        Layer(f"{name}.protocol={task.settings.protocol}", task.protocol(known)),
        Layer(f"{name}.training", task.settings.training),
        *files,
        Layer("the unit", unit_values),
    ]
    return config_files.load(layers, overrides, registry.schemas(), tasks=schemas())


def finetuning_config(
    run: Path,
    name: str,
    fraction: float | None,
    seed: int | None,
    untrained: bool,
    files: Sequence[Path | str],
    overrides: Sequence[str],
) -> Config:
    """The config of `medvlp finetune`: a run of its own for one fraction and seed of a task.

    Args:
        run: run or checkpoint folder of the pre-training.
        name: of the task.
        fraction, seed: of the patients, and of draw, head and order; None: as files and overrides say.
        untrained: begin with the weights before the pre-training, whatever these say.
        files, overrides: the user's; they say `run.dir`.

    Raises:
        EvaluationError: no task of this name trains.
        ConfigError: see `config_files.load`; `run.dir` is missing.
    """
    source = saved_run.locate(run)
    asked = config_files.merge(files, overrides, registry.schemas(), schemas())
    start: Start = "untrained" if untrained else asked.finetune.start
    said = [word for word in overrides if word.startswith("data.") or word.partition("=")[0] in trust.KEYS]
    base = saved_run.load_config(source, said, untrained=start == "untrained", tasks=schemas(), trains=True)
    if name not in schemas():
        raise EvaluationError(f"task={name}: there are {', '.join(schemas())}")
    base.evaluation.tasks[name] = OmegaConf.to_object(asked.evaluation.tasks[name])
    base.task = name
    unit = Unit(
        asked.finetune.fraction if fraction is None else fraction, asked.train.seed if seed is None else seed
    )
    layers = [_machine(base), *files]
    return run_config(source, base, task_of(base), unit, start, layers, overrides)


def _machine(config: Config) -> Layer:
    """Without it a training would have the defaults: bf16, slow on most CPUs."""
    values = dataclasses.asdict(config)
    return Layer("how the run uses its machine", {name: values[name] for name in _MACHINE})


@dataclass(frozen=True)
class Network:
    """A trained network: the best checkpoint of its run.

    Attributes:
        task: with the settings of its run. config: of its run. saved: run and checkpoint.
    """

    task: TrainedTask
    config: Config
    saved: SavedRun

    @classmethod
    def of(cls, config: Config) -> Network:
        """The best checkpoint of a finished run, by its validations.

        Raises:
            CheckpointError: there is none with a validation, or it is damaged, or one cannot be read now.
        """
        folders = [folder for _, folder in step_folders(Path(config.run.dir) / "checkpoints")]
        best = best_of(folders, config.checkpoint)
        if best is None:
            raise CheckpointError(
                f"{config.run.dir}: no checkpoint has {config.checkpoint.keep_best}: no validation has given "
                "it (one class only in the validation split?)"
            )
        return cls(task_of(config), config, saved_run.locate(best))

    def notes(self) -> dict[str, Any]:
        """What a result says about the training."""
        manifest = self.saved.manifest
        chosen = {
            name: value for name, value in manifest.metrics.items() if name.startswith(VALIDATION_PREFIX)
        }
        return {"step": manifest.step, "epoch": manifest.epoch, **chosen}

    def predict(
        self, view: View, role: Role, positions: Positions | None = None, look: Look | None = None
    ) -> Predictions:
        """Its predictions of samples of a split that this view may see; corrupt ones are left out.

        Args:
            positions: of the samples; None: all that the task can be measured on.
            look: what is kept of a batch, given the objective; None: `SupervisedObjective.predict`.
        """
        dataset = self.dataset(view, role)
        objective = self.objective(dataset.reader, dataset.tokenizer).to(view.device)
        if positions is None:
            positions = learnable(self.task, dataset.reader, dataset.split, dataset.store)
        size = self.config.validation.batch
        with meter(f"{self.task.name}: predicting {dataset.split}", -(-len(positions) // size)) as advance:

            def examine(batch: Batch) -> tuple[None, Mapping[str, Tensor]]:
                found = objective.predict(batch) if look is None else look(objective, batch)
                advance(1)
                return None, found

            return predict(objective, examine, dataset, positions, size, view.device, self.config.train.seed)

    def dataset(self, view: View, role: Role) -> EvaluationDataset:
        """A split that this view may see, its images seen as in the training run."""
        of, fields = view.dataset(role), sorted(self.task.fields)
        return evaluation_dataset(self.config, of.reader, of.tokenizer, of.split, fields)

    def drawn(self, view: View) -> Positions:
        """The samples of the training split that it was taught."""
        dataset = view.dataset("train")
        return Supervised(self.config).samples(dataset.reader, dataset.tokenizer)

    def batches(self, view: View, role: Role, positions: Positions) -> EvaluationLoader:
        """Some samples of a split, as the network sees them: for baselines of the same images."""
        size, rows = self.config.validation.batch, positions.tolist()
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        return EvaluationLoader(self.dataset(view, role), chunks, self.config.data)

    def objective(self, reader: ShardReader, tokenizer: Tokenizer) -> SupervisedObjective:
        """The head on its network with the weights of the checkpoint, on the CPU in float32.

        Args:
            reader: of the dataset that it learned from: a vocabulary stands there.
            tokenizer: of the run.
        """
        recipe = Supervised(self.config)
        identity = None if self.saved.stored is None else self.saved.stored[0]
        config = described(self.config, identity)
        objective = recipe.build(TrainingSet(config, reader, recipe.samples(reader, tokenizer), tokenizer))
        objective.prepare(tokenizer)
        self.saved.checkpoint.weights_into(objective)
        return objective


def unit_config(session: Session, task: TrainedTask, unit: Unit, start: Start, run: Path) -> Config:
    """The config of a training run of a unit, in the folder `run`."""
    roles, shared = session.facts(task).roles, session.config.evaluation.shared_patients
    given = {
        "run": {"dir": str(run), "name": f"{task.name}-{unit.name}-{start}"},
        "data": {"split": roles["train"]},
        "validation": {"split": roles["selection"]},
        "evaluation": {"shared_patients": shared},
    }
    layers = [_machine(session.config), Layer("the evaluation", given)]
    return run_config(session.source, session.config, task, unit, start, layers)


def trained(session: Session, task: TrainedTask, unit: Unit, start: Start, folder: Path) -> Network:
    """Train one network of a unit in a run folder of its own, going on from what is there.

    Raises:
        TrainingStoppedError: the training has ended otherwise than well.
    """
    run = folder / start
    config = unit_config(session, task, unit, start, run)
    if not is_finished(run):
        session.say(f"  {task.name}, {unit.name}: training the {start} network in {run}")
        if (code := session.train(config)) != 0:
            raise TrainingStoppedError(
                f"{task.name}, {unit.name}: the training in {run} ended with code {code}; the same command "
                "goes on from its newest checkpoint",
                code,
            )
    return Network.of(config)


def train_here(config: Config) -> int:
    """Train a run in this process; see `medvlp.training.run.train`."""
    from medvlp.training.run import train

    return train(recipe_of(config))

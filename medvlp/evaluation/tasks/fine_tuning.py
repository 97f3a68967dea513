"""Fine-tuning: a linear layer on the image feature, trained together with the image encoder or alone.

Protocols are named after where they were published; the folder's README says what of them is left out. A
network keeps the normalisation it was pre-trained with. Labels that are uncertain or unknown are left out of
that finding's loss and metrics. A finding of which the drawn patients do not hold both classes has no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import Config, key
from medvlp.evaluation.labels import (
    FEWEST,
    NotEvaluable,
    as_notes,
    binary,
    blank_side,
    no_threshold,
    not_evaluable,
    sides,
)
from medvlp.evaluation.metrics.classification import aurocs, chance, score_classes, score_findings, thresholds
from medvlp.evaluation.task import Reading, Scores, TaskResult, Unit, register
from medvlp.evaluation.trained import Fitted, TrainedTask, TrainedTaskConfig

if TYPE_CHECKING:
    from medvlp.data.sample_store import SampleStore
    from medvlp.evaluation.baselines import FittedRidge
    from medvlp.evaluation.heads.objective import SupervisedObjective
    from medvlp.evaluation.session import View
    from medvlp.evaluation.splits import Split
    from medvlp.evaluation.supervised import Network
    from medvlp.methods.base import Method
    from medvlp.training.predictions import Predictions
    from medvlp.training.recipe import TrainingSet
    from shards.reader import ShardReader

Floats = NDArray[np.float64]


@dataclass
class FineTuningConfig(TrainedTaskConfig):
    kind: Literal["multi_label", "multi_class"] = key(
        "multi_label", "multi_class: each image is of exactly one of the labels"
    )
    blank: Literal["auto", "exclude", "negative"] = key(
        "auto", "what an unknown label teaches: nothing, or that the finding is absent; see evaluation.blank"
    )


@dataclass
class Chosen:
    """What is known without the evaluated split.

    Attributes:
        thresholds: model -> finding -> score from which on it is called positive.
        ridge: the pixel baseline, taught with the drawn samples.
        missing: findings of which the drawn samples do not hold both classes.
    """

    thresholds: dict[str, dict[str, float]]
    ridge: FittedRidge
    missing: list[NotEvaluable]


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    lines = []
    for unit, networks in notes.get("training", {}).items():
        steps = ", ".join(f"{name} step {of['step']}" for name, of in networks.items())
        lines.append(f"{unit}: best validation of {steps}")
    return lines


@register
class FineTuning(TrainedTask):
    """See the module."""

    name = "fine-tuning"
    version = 2
    summary = "a linear layer on the image encoder, trained with a part of the training labels"
    config = FineTuningConfig
    keeps_scores = True
    reading = Reading(remarks=_remarks)
    chooses = "auroc/macro"
    chooses_mode = "max"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ours": {
            "optimizer": {"lr": 1e-3, "image_lr_scale": 0.1, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 64, "epochs": 50.0, "min_steps": 1000},
            "validation": {"every_epochs": 1.0, "every_steps": 20},
        },
        "mgca-linear": {
            "image": {"frozen": True},
            "optimizer": {
                "lr": 5e-4, "schedule": "constant", "warmup": 0.0, "weight_decay": 1e-6, "decay_all": True,
            },
            "train": {"global_batch": 48, "epochs": 50.0},
            "checkpoint": {"keep_best": "valid/loss", "best_mode": "min"},
        },
        "mrm": {
            "data": {"transform": {"flip": 0.5}},
            "optimizer": {"name": "sgd", "lr": 3e-3, "warmup_steps": 50, "min_lr": 0.0, "weight_decay": 0.0},
            "train": {"global_batch": 96, "steps": 2000, "patience": None},
            "validation": {"every_epochs": 0.0, "every_steps": 100},
        },
        "benchx": {
            "optimizer": {
                "name": "sgd", "lr": 1e-2, "image_lr_scale": 0.1, "warmup_steps": 50, "weight_decay": 0.0,
            },
            "train": {"global_batch": 64, "steps": 3000, "gradient_clip": 1.0},
            "validation": {"every_epochs": 5.0},
        },
    }  # fmt: skip
    #: Of each protocol, whether a layer norm comes first, and the deviation of the first weights.
    heads: ClassVar[Mapping[str, tuple[bool, float | None]]] = {
        "ours": (True, 0.01),
        "mgca-linear": (False, None),
        "mrm": (True, 2e-5),
        "benchx": (True, 0.02),
    }

    def protocol(self, config: Config) -> Mapping[str, Any]:
        """As named; "ours" has other rates for transformers, which learn in layers."""
        named = dict(super().protocol(config))
        if self.settings.protocol == "ours" and _is_transformer(config.image.name):
            named["optimizer"] = named["optimizer"] | {"lr": 1e-4, "layer_decay": 0.65}
        return named

    def objective(self, method: Method, data: TrainingSet) -> SupervisedObjective:
        """See `TrainedTask.objective`."""
        import torch

        from medvlp.evaluation.heads.classification import Classification, LinearHead

        names = data.reader.index.label_names
        findings = self.findings(names)
        size = data.config.data.image_size
        method.eval()
        with torch.no_grad():
            features = method.image_features(torch.zeros((1, 1, size, size), dtype=torch.uint8)).shape[1]
        columns = [names.index(name) for name in findings]
        head = LinearHead(features, len(columns), *self.heads[self.settings.protocol])
        return Classification(
            method, head, columns, self.settings.kind,
            sides(self.settings.uncertain, findings).tolist(), blank_side(self.settings.blank, names),
        )  # fmt: skip

    def learnable(self, reader: ShardReader, split: str, store: SampleStore) -> NDArray[np.bool_]:
        """Samples of which some label is known, or counts as one."""
        names = reader.index.label_names
        if not np.isnan(blank_side(self.settings.blank, names)):
            return super().learnable(reader, split, store)
        labels = store.labels[:, [names.index(name) for name in self.findings(names)]]
        return np.asarray(~np.isnan(labels).all(axis=1))

    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """AUROC of each finding with both classes, and their mean."""
        names = self.findings(data.reader.index.label_names)
        scores, truth = _scores(predictions)
        return aurocs(scores, truth, names, FEWEST)

    def choose(self, view: View, unit: Unit, networks: Mapping[str, Network]) -> Chosen:
        """Teach the pixel baseline; of each model the threshold of each finding with the best F1."""
        names, truth = self.findings(view.facts.index.label_names), partial(self._truth, view)
        train, chooses = view.split("train"), view.split("selection")
        assert train is not None
        assert chooses is not None
        rows = np.flatnonzero(np.isin(train.arrays.sample, view.drawn(unit)))
        known = truth(train)[rows]
        ridge = train.ridge.fit(known, rows)
        found = {
            model: thresholds(*_scores(network.predict(view, "selection")), names)
            for model, network in networks.items()
        }
        found["pixels"] = thresholds(ridge.predict(chooses.arrays.pixels), truth(chooses), names)
        missing = not_evaluable(known, names, f"the drawn part of {train.name}", fewest=1)
        return Chosen(found, ridge, missing)

    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        """AUROC and average precision; F1 and accuracy at the thresholds of the selection split."""
        findings, split = fitted.findings, view.facts.roles["evaluated"]
        first, chosen = predictions["trained"], fitted.chosen
        truth = _scores(first)[1]
        listed = not_evaluable(truth, findings, split) + chosen.missing
        result = TaskResult()
        out = {item.finding for item in listed}
        kept = [name for name in findings if name not in out]
        unchosen = no_threshold(kept, chosen.thresholds["trained"], view.facts.roles["selection"])
        result.notes = as_notes(truth, findings, listed + unchosen)
        if not kept:
            return result
        columns = [findings.index(name) for name in kept]
        pixels = view.split("evaluated")
        assert pixels is not None
        rows = np.searchsorted(pixels.arrays.sample, first.sample)
        scores = {model: _scores(of)[0] for model, of in predictions.items()}
        scores["pixels"] = chosen.ridge.predict(pixels.arrays.pixels[rows])
        bootstrap, exclusive = view.bootstrap(pixels.patients[rows]), self.settings.kind == "multi_class"
        for model, of in scores.items():
            called = chosen.thresholds[model]
            result.models[model] = score_findings(of[:, columns], truth[:, columns], kept, bootstrap, called)
            if exclusive:  # a class without a number of its own competes, and its images count
                result.models[model] |= score_classes(of, truth, findings, bootstrap)
        result.models["chance"] = chance(truth[:, columns], kept)
        if not exclusive:
            findings, truth = kept, truth[:, columns]
            scores = {model: of[:, columns] for model, of in scores.items()}
        result.scores = Scores(
            first.sample, findings, truth, scores, chosen.thresholds, frozenset(predictions), exclusive
        )
        return result

    def _truth(self, view: View, split: Split) -> Floats:
        """[N, C] labels (1, 0, NaN) of a split, as the networks learn them."""
        known = view.facts.index.label_names
        names = self.findings(known)
        labels = split.labels[:, [known.index(name) for name in names]]
        return binary(labels, sides(self.settings.uncertain, names), blank_side(self.settings.blank, known))


def _is_transformer(name: str) -> bool:
    """Whether a timm model is built of layers of attention."""
    from timm.models import get_arch_name, model_entrypoint

    return "transformer" in model_entrypoint(get_arch_name(name)).__module__.rsplit(".", 1)[-1]


def _scores(predictions: Predictions) -> tuple[Floats, Floats]:
    """Scores and truth (1, 0, NaN), each [N, C]."""
    return predictions.arrays["scores"].astype(np.float64), predictions.arrays["labels"].astype(np.float64)

"""Fine-tuning: a linear layer on the image feature, trained together with the image encoder or alone.

Protocols are named after where they were published; what of a recipe this program has no key for is said in
the README of the folder. Labels that are uncertain or unknown are left out of that finding's loss and
metrics. A finding of which the drawn patients do not hold both classes has no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import key
from medvlp.evaluation.labels import FEWEST, as_notes, not_evaluable
from medvlp.evaluation.metrics.classification import aurocs, chance, score_findings, thresholds
from medvlp.evaluation.task import Reading, TaskResult, Unit, register
from medvlp.evaluation.trained import Fitted, TrainedTask, TrainedTaskConfig

if TYPE_CHECKING:
    from medvlp.data.sample_store import SampleStore
    from medvlp.evaluation.heads.objective import SupervisedObjective
    from medvlp.evaluation.session import View
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


@register
class FineTuning(TrainedTask):
    """See the module."""

    name = "fine-tuning"
    summary = "a linear layer on the image encoder, trained with a part of the training labels"
    config = FineTuningConfig
    reading = Reading()
    chooses = "auroc/macro"
    chooses_mode = "max"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ours": {
            "optimizer": {"lr": 1e-4, "image_lr_scale": 0.1, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 64, "epochs": 50.0, "min_steps": 1000},
        },
    }

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
        side = {"exclude": float("nan"), "positive": 1.0, "negative": 0.0}[self.settings.uncertain]
        head = LinearHead(features, len(columns))
        return Classification(method, head, columns, self.settings.kind, [side] * len(columns))

    def learnable(self, reader: ShardReader, split: str, store: SampleStore) -> NDArray[np.bool_]:
        """Samples of which some label is known."""
        names = reader.index.label_names
        labels = store.labels[:, [names.index(name) for name in self.findings(names)]]
        return np.asarray(~np.isnan(labels).all(axis=1))

    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """AUROC of each finding with both classes, and their mean."""
        names = self.findings(data.reader.index.label_names)
        scores, truth = _scores(predictions)
        return aurocs(scores, truth, names, FEWEST)

    def choose(self, view: View, unit: Unit, selection: Mapping[str, Predictions]) -> Any:
        """Of each network the threshold of each finding with the best F1."""
        names = self.findings(view.facts.index.label_names)
        return {model: thresholds(*_scores(of), names) for model, of in selection.items()}

    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        """AUROC and average precision; F1 and accuracy at the thresholds of the selection split."""
        findings, split = fitted.findings, view.facts.roles["evaluated"]
        first = predictions["trained"]
        truth = _scores(first)[1]
        listed = not_evaluable(truth, findings, split)
        result = TaskResult(notes=as_notes(truth, findings, listed))
        out = {item.finding for item in listed}
        kept = [name for name in findings if name not in out]
        if not kept:
            return result
        columns = [findings.index(name) for name in kept]
        bootstrap = view.bootstrap(view.patients("evaluated", first.sample))
        for model, of in predictions.items():
            scores, labels = _scores(of)
            chosen = fitted.chosen[model]
            result.models[model] = score_findings(
                scores[:, columns], labels[:, columns], kept, bootstrap, chosen
            )
        result.models["chance"] = chance(truth[:, columns], kept)
        return result


def _scores(predictions: Predictions) -> tuple[Floats, Floats]:
    """Scores and truth (1, 0, NaN), each [N, C]."""
    return predictions.arrays["scores"].astype(np.float64), predictions.arrays["labels"].astype(np.float64)

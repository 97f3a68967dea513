"""A task that trains, registered from outside: how bright an image is, by a head on the image feature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.task import TaskResult, Unit
from medvlp.evaluation.trained import Fitted, TrainedTask
from medvlp.methods.base import Method, StepOutput

if TYPE_CHECKING:
    from medvlp.data.batch import Batch
    from medvlp.evaluation.session import View
    from medvlp.training.predictions import Predictions
    from medvlp.training.recipe import TrainingSet


class BrightnessObjective(SupervisedObjective):
    """Mean squared error of the predicted mean of the image, in [0, 1]."""

    def __init__(self, method: Method) -> None:
        super().__init__(method, nn.Linear(16, 1))

    def forward(self, batch: Batch, clusters: Any = None) -> StepOutput:
        arrays = self.predict(batch)
        loss = (arrays["predicted"] - arrays["truth"]).square().mean()
        return StepOutput(loss, {"loss/square": loss})

    def predict(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        features = self.method.image_features(batch.image)
        predicted = self.head(features.to(self.head.weight.dtype))[:, 0].float()
        return {"predicted": predicted, "truth": batch.image.float().mean(dim=(1, 2, 3)) / 255}


class Brightness(TrainedTask):
    """See the module."""

    name = "brightness"
    summary = "how bright an image is"
    chooses = "error"
    protocols = {  # noqa: RUF012
        "ours": {"train": {"global_batch": 16, "epochs": 2.0}, "optimizer": {"lr": 1e-3}}
    }

    def objective(self, method: Method, data: TrainingSet) -> SupervisedObjective:
        return BrightnessObjective(method)

    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        return {"error": _error(predictions)}

    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        return TaskResult({name: {"error": Estimate(_error(of))} for name, of in predictions.items()})


def _error(predictions: Predictions) -> float:
    arrays = predictions.arrays
    return float(np.abs(arrays["predicted"].astype(np.float64) - arrays["truth"]).mean())

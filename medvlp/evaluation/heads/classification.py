"""Classification: a linear layer on the image feature, and losses that leave unknown labels out."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.data.batch import Batch
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.methods.base import Method, StepOutput
from medvlp.prototypes.table import PrototypeTable

#: Several findings may be in an image, or each image is of exactly one class.
Kind = Literal["multi_label", "multi_class"]


class LinearHead(nn.Sequential):
    """[B, F] features -> [B, C] logits: perhaps a layer norm, then a linear layer.

    Args:
        features: F. classes: C.
        norm: a layer norm first (BenchX, MRM).
        std: deviation of the truncated normal the weights are drawn from (MRM 2e-5); None: torch's own.
    """

    def __init__(self, features: int, classes: int, norm: bool = False, std: float | None = None) -> None:
        linear = nn.Linear(features, classes)
        if std is not None:
            nn.init.trunc_normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        super().__init__(*([nn.LayerNorm(features)] if norm else []), linear)


class Classification(SupervisedObjective):
    """Classifies images by the features that a linear probe sees.

    Args:
        method: gives the features. head: [B, F] -> [B, C].
        columns: of the C classes among the dataset's labels.
        kind: see `Kind`.
        uncertain: [C] what an uncertain label counts as: 1, 0, or NaN (it is left out).
        blank: what an unknown label counts as: 0, or NaN.
    """

    def __init__(
        self,
        method: Method,
        head: nn.Module,
        columns: list[int],
        kind: Kind,
        uncertain: list[float],
        blank: float = float("nan"),
    ) -> None:
        super().__init__(method, head)
        self.kind, self.blank = kind, blank
        # Not saved: the config says it. On the device: a list there is copied, and waited for, in each step.
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.register_buffer("uncertain", torch.tensor(uncertain), persistent=False)

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        """See `Objective.forward`."""
        labels, logits = self._labels(batch), self._logits(batch)
        loss = masked_bce(logits, labels) if self.kind == "multi_label" else class_entropy(logits, labels)
        return StepOutput(loss, {})

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """`scores` [B, C]: logits, of exclusive classes logs of probabilities; `labels` [B, C]: 1, 0, NaN
        where nothing is known."""
        scores = self._logits(batch)
        if self.kind == "multi_class":
            # A constant of the image, which no class gains by, would rank images by one class.
            scores = scores.log_softmax(1)
        return {"scores": scores, "labels": self._labels(batch)}

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.labels[:, self.get_buffer("columns")]
        labels = torch.where(labels.isnan(), self.blank, labels)
        return torch.where(labels == -1, self.get_buffer("uncertain").to(labels.dtype), labels)

    def _logits(self, batch: Batch) -> Tensor:
        features = self.method.image_features(batch.image)
        logits: Tensor = self.head(features.to(next(self.head.parameters()).dtype))
        return logits.float()


# Both divide by all samples, not by the known ones: the mean over ranks and micro-batches is then the loss of
# the whole batch, however the known labels are spread over them.


def masked_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the known labels, summed and divided by B * C.

    Args:
        logits: [B, C]. labels: [B, C]: 1, 0, or NaN for unknown.
    """
    known = ~labels.isnan()
    targets = labels.nan_to_num(0.0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * known).mean()


def class_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the samples with exactly one class that is 1, summed and divided by B.

    Args:
        logits: [B, C]. labels: [B, C], 1 for the class.
    """
    is_class = labels == 1
    known = is_class.sum(dim=1) == 1
    losses = F.cross_entropy(logits, is_class.float().argmax(dim=1), reduction="none")
    return (losses * known).mean()

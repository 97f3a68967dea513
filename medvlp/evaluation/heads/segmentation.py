"""Segmentation: a head on an image encoder that draws masks, its losses, and what is counted of masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from medvlp.data.batch import Batch
from medvlp.data.fields import Masks
from medvlp.evaluation.heads.masks import MaskHead, begin_empty
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.heads.pyramids import encoder_of
from medvlp.evaluation.metrics.segmentation import THRESHOLDS
from medvlp.losses.segmentation import (
    dice_cross_entropy,
    focal_loss,
    mixed_loss,
    per_image_loss,
    soft_dice,
)
from medvlp.methods.base import Method, StepOutput
from medvlp.prototypes.table import PrototypeTable

LossName = Literal["ours", "mgca", "medslip", "mrm"]

#: Weight of what a head trains beside its answer (MRM).
_BESIDE = 0.4

#: Published losses of logits and masks [B, C, H, W], over all the pixels of what is `known` [B, C, 1, 1].
_PUBLISHED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mgca": lambda logits, masks, known: mixed_loss(logits, masks, known=known),
    "medslip": dice_cross_entropy,
    "mrm": lambda logits, masks, known: (
        2 * focal_loss(logits, masks, known=known) + 1 - soft_dice(logits, masks, known=known)
    ),
}


class Segmentation(SupervisedObjective):
    """Draws masks of findings.

    Args:
        method: whose image encoder is read. head: on that encoder.
        columns: of the C findings among the dataset's labels.
        loss: "ours" is by image and finding; the published ones are over all pixels of the batch.
        uncertain: [C] what a hedged finding (label -1) teaches: nothing (NaN), its mask (1), or that nothing
            is there (0).
        drifting: batch norms of a frozen encoder follow the batches while training (published MGCA).
    """

    head: MaskHead

    def __init__(
        self,
        method: Method,
        head: MaskHead,
        columns: list[int],
        loss: LossName,
        uncertain: Sequence[float],
        drifting: bool = False,
    ) -> None:
        super().__init__(method, head)
        if loss == "ours":
            begin_empty(head)
        self.loss, self.drifting = loss, drifting
        # Not saved: the config says it. On the device: a list there is copied, and waited for, in each step.
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.register_buffer("uncertain", torch.tensor(uncertain), persistent=False)

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        """See `Objective.forward`."""
        truth, known = self._truth(batch)
        answers = self._answers(batch)
        first, *beside = (self._loss(answer, truth, known) for answer in answers)
        return StepOutput(first + _BESIDE * sum(beside, torch.zeros_like(first)), {"loss/masks": first})

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """`pixels` [B, C, T, 3]: see `mask_counts`; `known` [B, C]."""
        truth, known = self._truth(batch)
        return {"pixels": mask_counts(self._answers(batch)[0].sigmoid(), truth), "known": known}

    def draw(self, batch: Batch, steps: Tensor) -> Mapping[str, Tensor]:
        """Masks of a few images: `drawn` and `truth` [B, C, H, W] bool.

        Args:
            steps: [C] a pixel is called above `steps / THRESHOLDS`, as `mask_counts` counts it.
        """
        truth, _ = self._truth(batch)
        of_pixel = (self._answers(batch)[0].sigmoid() * THRESHOLDS).ceil()
        return {"drawn": of_pixel > steps.to(of_pixel.device)[:, None, None], "truth": truth}

    def train(self, mode: bool = True) -> Segmentation:
        """See `SupervisedObjective.train`."""
        super().train(mode)
        if self.drifting:
            encoder_of(self.method).backbone.train(mode)
        return self

    def _answers(self, batch: Batch) -> list[Tensor]:
        maps = self.head.look(encoder_of(self.method), batch.image)
        return [answer.float() for answer in self.head(maps, batch.image.shape[-1])]

    def _truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return mask_truth(batch, self.get_buffer("columns"), self.get_buffer("uncertain"))

    def _loss(self, logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        if self.loss == "ours":
            return per_image_loss(logits, truth, known)
        return _PUBLISHED[self.loss](logits, truth.float(), known[..., None, None])


def mask_truth(batch: Batch, columns: Tensor, uncertain: Tensor) -> tuple[Tensor, Tensor]:
    """Masks [B, C, H, W] bool of C findings, and whether it is known where each is [B, C].

    Args:
        batch: with the field "masks". columns: [C] of the findings among the dataset's labels.
        uncertain: [C], see `Segmentation`.
    """
    masks, labels = batch.fields[Masks.name][:, columns], batch.labels[:, columns]
    known, hedged = masks[:, :, 0, 0] != Masks.UNKNOWN, labels == -1
    truth = masks == 1
    absent = hedged & (uncertain == 0)
    known = (known & ~(hedged & uncertain.isnan())) | absent
    return truth & ~absent[:, :, None, None], known


def mask_counts(probability: Tensor, truth: Tensor) -> Tensor:
    """Pixels above each of the thresholds k / `THRESHOLDS`, true pixels, and those that are both.

    Args:
        probability: [B, C, H, W] in [0, 1]. truth: [B, C, H, W] bool.

    Returns:
        [B, C, T, 3] int32; all -1 of a mask with a probability outside [0, 1], or NaN: one rank alone must
        not stop where the others go on.
    """
    steps = (probability.float() * THRESHOLDS).ceil()
    possible = ((steps >= 0) & (steps <= THRESHOLDS)).flatten(2).all(2)
    steps = torch.where(possible[:, :, None, None], steps, 0.0)
    # A value of step k lies above the thresholds 0 .. k - 1: sums of a histogram from its upper end.
    images = truth.shape[0] * truth.shape[1]
    bins = THRESHOLDS + 1
    place = steps.long().flatten(2).reshape(images, -1)
    place = place + bins * torch.arange(images, device=place.device)[:, None]
    inside = truth.flatten(2).reshape(images, -1)
    above = []
    for chosen in (place.flatten(), place[inside]):
        histogram = torch.bincount(chosen, minlength=images * bins).reshape(images, bins)
        above.append(histogram.flip(1).cumsum(1).flip(1)[:, 1:])
    called, both = above
    counts = torch.stack([called, inside.sum(1)[:, None].expand_as(called), both], dim=2)
    counts = counts.reshape(*truth.shape[:2], THRESHOLDS, 3).int()
    return torch.where(possible[:, :, None, None], counts, -1)

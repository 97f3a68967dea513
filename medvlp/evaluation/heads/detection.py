"""Detection: a head that finds boxes on an image encoder, and what of boxes is kept to score it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.data.batch import Batch
from medvlp.data.fields import Boxes as BoxField
from medvlp.evaluation.heads.boxes import MOST, Boxes, BoxHead, Suppression
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.heads.pyramids import encoder_of
from medvlp.evaluation.task import EvaluationError
from medvlp.methods.base import Method, StepOutput
from medvlp.prototypes.table import PrototypeTable

#: Boxes of an image that are kept to score it.
HELD = 100


class Detection(SupervisedObjective):
    """Finds boxes of findings.

    Args:
        method: whose image encoder is read. head: on that encoder.
        columns: of the C findings among the dataset's labels.
        suppression: of detections.
        smallest: see `box_truth`.
        drifting: batch norms of a frozen encoder follow the batches while training (published MGCA).
    """

    head: BoxHead

    def __init__(
        self,
        method: Method,
        head: BoxHead,
        columns: list[int],
        suppression: Suppression,
        smallest: float = 2.0,
        drifting: bool = False,
    ) -> None:
        super().__init__(method, head)
        self.suppression = suppression
        # Not saved: the config says it. On the device: a list there is copied, and waited for, in each step.
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.smallest, self.drifting = smallest, drifting

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        """See `Objective.forward`."""
        columns = self.get_buffer("columns")
        terms = self._call(batch, box_truth(batch, columns, self.smallest, as_boxes=False))
        assert isinstance(terms, dict)
        total = torch.stack(list(terms.values())).sum()
        return StepOutput(total, {f"loss/{name}": value for name, value in terms.items()})

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """`found` [B, MOST, 6]: left, top, right, bottom, class, score; `held` [B, HELD, 6]: the first
        five, and whether it is hedged. Rows without a box have class -1."""
        found = self._call(batch, None)
        assert isinstance(found, list)
        truth = box_truth(batch, self.get_buffer("columns"), self.smallest)
        return {"found": _filled([of[:, [0, 1, 2, 3, 5, 4]] for of in found], MOST), "held": held_rows(truth)}

    def train(self, mode: bool = True) -> Detection:
        """See `SupervisedObjective.train`."""
        super().train(mode)
        if self.drifting:
            encoder_of(self.method).backbone.train(mode)
        return self

    def _call(self, batch: Batch, truth: Boxes | None) -> dict[str, Tensor] | list[Tensor]:
        maps = self.head.look(encoder_of(self.method), batch.image)
        answer: dict[str, Tensor] | list[Tensor] = self.head(
            maps, batch.image.shape[-1], truth, self.suppression
        )
        return answer


def box_truth(batch: Batch, columns: Tensor, smallest: float, as_boxes: bool = True) -> Boxes:
    """What the images of a batch hold of C findings.

    Hedged are the boxes of uncertain findings (label -1) and those with a side below `smallest` pixels. A
    finding without a box that is not known to be absent (label 1, -1 or unknown) may be anywhere.

    Args:
        batch: with the field "boxes". columns: [C] of the findings among the dataset's labels.
        as_boxes: what may be anywhere is a hedged box over the whole image too, as scoring reads it.
    """
    stored, labels = batch.fields[BoxField.name], batch.labels[:, columns]
    if not stored.shape[1]:
        stored = F.pad(stored, (0, 0, 0, 1), value=-1.0)
    numbers = torch.arange(len(columns), device=stored.device)
    number = torch.full((batch.labels.shape[1] + 1,), -1, device=stored.device).scatter(0, columns, numbers)
    kinds = number[stored[..., 0].long()]  # padding has label -1: the last number, which is -1
    boxes, real = stored[..., 1:5], kinds >= 0
    small = ((boxes[..., 2:] - boxes[..., :2]) < smallest).any(2)
    hedged = real & (small | (labels.gather(1, kinds.clamp(min=0)) == -1))
    anywhere = (labels != 0) & ~(kinds[..., None] == numbers).any(1)
    if as_boxes:
        side = float(batch.image.shape[-1])
        whole = F.pad(boxes.new_full((*anywhere.shape, 2), side), (2, 0))
        boxes = torch.cat([boxes, whole], dim=1)
        kinds = torch.cat([kinds, torch.where(anywhere, numbers, -1)], dim=1)
        hedged = torch.cat([hedged, anywhere], dim=1)
    return Boxes(boxes, kinds, hedged, anywhere)


def held_rows(truth: Boxes) -> Tensor:
    """[B, HELD, 6] of the boxes of images, as `Detection.predict` gives them.

    Raises:
        EvaluationError: an image holds more boxes.
    """
    if int((truth.classes >= 0).sum(1).max()) > HELD:
        raise EvaluationError(f"an image holds more than {HELD} boxes, which detection does not take")
    rows = []
    for image in range(len(truth.boxes)):
        boxes, classes, hedged = truth.of(image)
        rows.append(torch.cat([boxes, classes[:, None].float(), hedged[:, None].float()], dim=1))
    return _filled(rows, HELD)


def _filled(rows: list[Tensor], count: int) -> Tensor:
    """[n, 6] of each of B images -> [B, count, 6], with -1 where there is none."""
    result = rows[0].new_full((len(rows), count, 6), -1.0)
    for of, found in zip(result, rows, strict=True):
        of[: len(found)] = found[:count]
    return result

"""What a batch says is in its images, and where: of findings by boxes and masks, of phrases by boxes; and a
network's map in the same pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from medvlp.data.batch import Batch
from medvlp.evaluation.task import EvaluationError

Floats = NDArray[np.float64]
Pixels = NDArray[np.bool_]
#: Batch field that says it.
Truth = Literal["boxes", "masks", "phrases"]


@dataclass(frozen=True)
class Place:
    """Where in an image one finding or phrase is.

    Attributes:
        truth: which field says so.
        finding: of a phrase, the label that all its boxes bear; None: they bear several, or none of the
            dataset's.
        phrase: its text; "" for a finding.
        pixels: [S, S] of the view, at least one is true. parts: the boxes one by one; a mask is one part.
    """

    truth: Truth
    finding: str | None
    phrase: str
    pixels: Pixels
    parts: list[Pixels]


def places(
    batch: Batch, i: int, truth: Truth, names: Sequence[str], phrases: Sequence[str]
) -> Iterator[Place]:
    """Everything that image `i` of a batch shows by one of its fields.

    Args:
        batch: with the field `truth`. names: label names of the dataset.
        phrases: texts of the sample's phrases, as `batch.fields["phrases"]` numbers them.
    """
    stored, size = batch.fields[truth][i].numpy(), batch.image.shape[-1]
    if truth == "masks":
        for name, mask in zip(names, stored == 1, strict=True):
            if mask.any():
                yield Place(truth, name, "", mask, [mask])
        return
    for number in np.unique(stored[stored[:, 0] >= 0, 0]).astype(int).tolist():
        boxes = stored[stored[:, 0] == number]
        parts = [paint(box[None, 1:5], size) for box in boxes]
        whole: Pixels = np.any(parts, axis=0)
        if truth == "boxes":
            yield Place(truth, names[number], "", whole, parts)
            continue
        labels = np.unique(boxes[:, 5]).astype(int)
        one = names[labels[0]] if len(labels) == 1 and labels[0] >= 0 else None
        yield Place(truth, one, phrases[number], whole, parts)


def paint(boxes: NDArray[np.floating], size: int) -> Pixels:
    """[size, size] pixels whose middle lies in one of the [m, 4] boxes (left, top, right, bottom in pixels).

    A box too narrow to hold a middle has the pixel column or row that its own middle lies in: it never
    vanishes.
    """
    painted = np.zeros((size, size), dtype=bool)
    for left, top, right, bottom in boxes:
        painted[_middles(top, bottom, size), _middles(left, right, size)] = True
    return painted


def _middles(start: float, end: float, size: int) -> slice:
    first, last = int(np.ceil(start - 0.5)), int(np.ceil(end - 0.5))
    if last <= first:
        first = min(int((start + end) / 2), size - 1)
        last = first + 1
    return slice(max(first, 0), last)


def upsampled(grid: Tensor, size: int, mode: str, smoothing: float) -> Floats:
    """A map on the patch grid as [size, size] pixels, smoothed on the grid first."""
    if smoothing > 0:
        smooth = gaussian_filter(grid.double().numpy(), smoothing, mode="nearest")
        grid = grid.new_tensor(smooth)
    options: dict[str, Any] = {"mode": mode} | ({"align_corners": False} if mode == "bilinear" else {})
    whole: Floats = F.interpolate(grid[None, None].double(), size=(size, size), **options)[0, 0].numpy()
    return whole


def highest(model: str, *maps: Tensor) -> float:
    """The largest value of all maps of a batch, by which they are divided.

    Raises:
        EvaluationError: it is not above 0: dividing would turn the maps over, or make no numbers of them.
    """
    found: float = max(of.max().item() for of in maps)
    if found <= 0:
        raise EvaluationError(
            f"grounding: no map of the {model} network in a batch has a value above 0, by which "
            "scale=batch_max divides: set evaluation.tasks.grounding.scale=image"
        )
    return found

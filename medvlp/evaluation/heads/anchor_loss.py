"""RetinaNet's loss with hedged boxes, of padded boxes and without an index that the device has to count first
(torchvision's own waits for it several times an image)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou, sigmoid_focal_loss

#: Of anchors that match no box: background, or neither background nor a box.
BACKGROUND, BETWEEN = -1, -2


def match_anchors(boxes: Tensor, real: Tensor, anchors: Tensor, low: float, high: float) -> Tensor:
    """[A] which of the boxes of an image each anchor matches, `BACKGROUND` or `BETWEEN`.

    An anchor matches the box it overlaps most, from the IoU `high` on, or where no other anchor overlaps that
    box more; below `low` it is background. (torchvision's `Matcher`, except that a box no anchor overlaps
    matches none of them, where there it matches all.)

    Args:
        boxes: [N, 4], N > 0. real: [N] bool, which of them are boxes. anchors: [A, 4].
    """
    overlap = box_iou(boxes, anchors).masked_fill(~real[:, None], -1.0)
    value, nearest = overlap.max(0)
    match = torch.where(value < high, BETWEEN, nearest).masked_fill(value < low, BACKGROUND)
    best = overlap.amax(1, keepdim=True)
    return torch.where(((overlap == best) & (best > 0)).any(0), nearest, match)


def retinanet_loss(
    logits: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    match: Tensor,
    boxes: Tensor,
    classes: Tensor,
    hedged: Tensor,
) -> dict[str, Tensor]:
    """Focal loss of the classes and L1 of the boxes, of each image divided by its matching anchors.

    Args:
        logits: [B, A, C]. offsets: [B, A, 4]. anchors: [A, 4]. match: [B, A] of `match_anchors`.
        boxes: [B, N, 4], `classes`: [B, N] and `hedged`: [B, N]; anchors of hedged boxes learn nothing.

    Returns:
        0-d "classification" and "bbox_regression".
    """
    near = match.clamp(min=0)
    doubtful = hedged.gather(1, near) & (match >= 0)
    there = (match >= 0) & ~doubtful
    counts = there.sum(1).clamp(min=1)

    kinds = torch.arange(logits.shape[2], device=logits.device)
    of_class = there[..., None] & (classes.gather(1, near)[..., None] == kinds)
    counted = (match != BETWEEN) & ~doubtful
    entropy = sigmoid_focal_loss(logits, of_class.to(logits.dtype), reduction="none")
    classification = torch.where(counted[..., None], entropy, 0.0).sum((1, 2)) / counts

    own = boxes.to(anchors.dtype).gather(1, near[..., None].expand(-1, -1, 4))
    distance = (offsets - _offsets(torch.where(there[..., None], own, anchors), anchors)).abs().sum(2)
    regression = torch.where(there, distance, 0.0).sum(1) / counts
    return {"classification": classification.mean(), "bbox_regression": regression.mean()}


def _offsets(boxes: Tensor, anchors: Tensor) -> Tensor:
    """[..., 4] where boxes are, seen from their anchors: middles in sides, and logs of the sides' ratios."""
    sides, of_anchors = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    middles = boxes[..., :2] + sides / 2 - anchors[..., :2] - of_anchors / 2
    return torch.cat([middles / of_anchors, (sides / of_anchors).log()], dim=-1)

"""YOLOv3 for one scale: targets, loss, decoding; and the suppression of overlapping boxes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from medvlp.losses.normalise import at_least_float32


@dataclass(frozen=True)
class GridTargets:
    """What each cell and anchor of a scale should predict.

    Attributes:
        present: [B, A, H, W] float, 1 where an anchor is responsible for a box.
        background: [B, A, H, W] float, 1 where an anchor should predict no object (0 also where its shape
            fits a box of the cell well enough, though another anchor is responsible).
        offset: [B, A, H, W, 2] centre inside the cell, in [0, 1].
        log_size: [B, A, H, W, 2] log of the box's size over the anchor's.
        classes: [B, A, H, W, C] 1 for the classes of the cell's boxes.
    """

    present: Tensor
    background: Tensor
    offset: Tensor
    log_size: Tensor
    classes: Tensor


def grid_targets(
    boxes: Tensor,
    anchors: Tensor,
    grid: tuple[int, int],
    classes: int,
    ignore: float = 0.5,
    hedged: Tensor | None = None,
) -> GridTargets:
    """Assign every box to its cell and the anchor whose shape fits best.

    Args:
        boxes: [B, N, 5] (class, centre x, centre y, width, height), sizes relative to the image in [0, 1];
            rows of zeros are padding.
        anchors: [A, 2] widths and heights in cells.
        grid: (rows H, columns W).
        classes: number of classes C.
        ignore: anchors whose shape overlaps the box's more than this are no background in its cell.
        hedged: [B, N] bool, boxes that may be there: no anchor should predict one, and their cells are no
            background.

    Returns:
        The targets; of several boxes in one cell with one anchor the last one counts.
    """
    batch, count, _ = boxes.shape
    rows, columns = grid
    anchors = anchors.to(boxes)
    valid = boxes.abs().sum(2) > 0
    doubtful = torch.zeros_like(valid) if hedged is None else hedged
    # By numbers of the host, not by a tensor of them: a copy to the device waits for it.
    centre = torch.stack([boxes[..., 1] * columns, boxes[..., 2] * rows], dim=2)
    size = torch.stack([boxes[..., 3] * columns, boxes[..., 4] * rows], dim=2)
    whole = centre.floor().long()
    cell = torch.stack([whole[..., 0].clamp(0, columns - 1), whole[..., 1].clamp(0, rows - 1)], dim=2)
    fit = _shape_overlap(size, anchors)
    best = fit.argmax(2)

    positions = len(anchors) * rows * columns
    place = cell[..., 1] * columns + cell[..., 0]
    own = torch.where(valid & ~doubtful, best * rows * columns + place, positions)
    number = torch.arange(count, device=boxes.device).expand(batch, count)
    owner = torch.full((batch, positions + 1), -1, device=boxes.device)
    owner = owner.scatter_reduce(1, own, number, "amax")[:, :positions]
    present = owner >= 0

    shapes = torch.arange(len(anchors), device=boxes.device)
    fitting = ((fit > ignore) | doubtful[..., None]) & valid[..., None]
    everywhere = shapes * rows * columns + place[..., None]
    where_fitting = torch.where(fitting, everywhere, positions).flatten(1)
    background = boxes.new_ones((batch, positions + 1)).scatter(1, where_fitting, 0.0)[:, :positions]

    pick = owner.clamp(min=0)[..., None].expand(-1, -1, 2)
    inside = (centre - cell).gather(1, pick)
    relative = (size.gather(1, pick) / anchors.repeat_interleave(rows * columns, 0)).clamp(min=1e-16).log()
    kinds = (boxes[..., :1] == torch.arange(classes, device=boxes.device)).to(boxes.dtype)
    category = boxes.new_zeros((batch, positions + 1, classes))
    category = category.scatter_reduce(1, own[..., None].expand(-1, -1, classes), kinds, "amax")

    def shaped(values: Tensor) -> Tensor:
        return values.reshape(batch, len(anchors), rows, columns, *values.shape[2:])

    mask = present[..., None]
    return GridTargets(
        shaped(present.to(boxes.dtype)),
        shaped(background),
        shaped(inside * mask),
        shaped(torch.where(mask, relative, 0.0)),
        shaped(category[:, :positions]),
    )


def detection_loss(
    output: Tensor,
    boxes: Tensor,
    anchors: Tensor,
    image_size: int,
    hedged: Tensor | None = None,
    anywhere: Tensor | None = None,
) -> dict[str, Tensor]:
    """YOLOv3 loss of one scale as MGCA's detection uses it.

    Every term is a mean over all cells and anchors after predictions and targets were multiplied by their
    mask, so that it shrinks with the grid.

    Args:
        output: [B, A * (5 + C), H, W] raw output (x, y, w, h, object, classes for each anchor).
        boxes, hedged: [B, N, 5] and [B, N] as in `grid_targets`.
        anchors: [A, 2] in pixels of the input image.
        image_size: side of the input image in pixels.
        anywhere: [B, C] bool, classes that may be anywhere in an image: no cell of it is background (an
            object has no class), and no cell learns that its object is not of them.

    Returns:
        0-d tensors "x", "y", "w", "h", "object", "class" and the weighted sum "loss".
    """
    rows, columns = output.shape[-2:]
    values = _by_anchor(at_least_float32(output), len(anchors))
    wide, high = anchors.to(values).unbind(1)
    cells = torch.stack([wide / (image_size / columns), high / (image_size / rows)], dim=1)
    classes = values.shape[-1] - 5
    targets = grid_targets(boxes.to(values), cells, (rows, columns), classes, hedged=hedged)
    present, background, known = targets.present, targets.background, targets.present[..., None]
    if anywhere is not None:
        background = background * ~anywhere.any(1)[:, None, None, None]
        known = known * (~anywhere[:, None, None, None] | (targets.classes > 0))
    probability = values.sigmoid()

    def cross_entropy(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return F.binary_cross_entropy(prediction * mask, target * mask)

    terms = {
        "x": cross_entropy(probability[..., 0], targets.offset[..., 0], present),
        "y": cross_entropy(probability[..., 1], targets.offset[..., 1], present),
        "w": F.mse_loss(values[..., 2] * present, targets.log_size[..., 0] * present),
        "h": F.mse_loss(values[..., 3] * present, targets.log_size[..., 1] * present),
        "object": cross_entropy(probability[..., 4], present, present)
        + 0.5 * cross_entropy(probability[..., 4], torch.zeros_like(present), background),
        "class": cross_entropy(probability[..., 5:], targets.classes, known),
    }
    box = terms["x"] + terms["y"] + terms["w"] + terms["h"]
    return {"loss": 2.5 * box + terms["object"] + terms["class"]} | terms


def decode_boxes(output: Tensor, anchors: Tensor, image_size: int) -> Tensor:
    """Raw output of one scale -> [B, A * H * W, 5 + C] boxes.

    Args:
        output, anchors, image_size: as in `detection_loss`.

    Returns:
        Centre x, centre y, width, height in pixels, object probability, class probabilities.
    """
    rows, columns = output.shape[-2:]
    values = _by_anchor(at_least_float32(output), len(anchors))
    stride = values.new_tensor([image_size / columns, image_size / rows])
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corner = torch.stack([x, y], -1).to(values)
    centre = (values[..., :2].sigmoid() + corner) * stride
    size = values[..., 2:4].exp() * anchors.to(values)[:, None, None]
    return torch.cat([centre, size, values[..., 4:].sigmoid()], -1).flatten(1, 3)


def suppress_overlaps(
    boxes: Tensor, confidence: float = 0.5, overlap: float = 0.5, plus_one: bool = False
) -> list[Tensor]:
    """Confident boxes of each image without those that a more confident one of the same class covers.

    Args:
        boxes: [B, N, 5 + C] from `decode_boxes`.
        confidence: least object probability; overlap: least IoU that suppresses.
        plus_one: sides count one pixel more in that IoU (published MGCA and LoVT), so that small boxes
            overlap more.

    Returns:
        For each image [n, 7]: left, top, right, bottom, object probability, class probability, class; most
        confident first.
    """
    results = []
    for image in boxes:
        kept = image[image[:, 4] >= confidence]
        corners = box_convert(kept[:, :4], "cxcywh", "xyxy")
        probability, kind = kept[:, 5:].max(1)
        longer = corners + corners.new_tensor([0.0, 0.0, 1.0, 1.0]) if plus_one else corners
        order = batched_nms(longer, kept[:, 4], kind, overlap)
        columns = [corners, kept[:, 4:5], probability[:, None], kind[:, None].to(kept.dtype)]
        results.append(torch.cat(columns, 1)[order])
    return results


def _by_anchor(output: Tensor, anchors: int) -> Tensor:
    """[B, A * V, H, W] -> [B, A, H, W, V]."""
    batch, _, rows, columns = output.shape
    return output.reshape(batch, anchors, -1, rows, columns).movedim(2, -1)


def _shape_overlap(size: Tensor, anchors: Tensor) -> Tensor:
    """[B, N, 2] sizes and [A, 2] anchors -> [B, N, A] IoU of boxes with one common corner.

    Sides are one longer than they are, as pixel-index boxes have it (the published code's convention).
    """
    first, second = size[:, :, None] + 1, anchors + 1
    shared = torch.minimum(first, second).prod(-1)
    return shared / (first.prod(-1) + second.prod(-1) - shared + 1e-16)

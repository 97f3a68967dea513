"""Segmentation and detection losses against the published numbers, and in the corners."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.losses.detection import decode_boxes, detection_loss, grid_targets, suppress_overlaps
from medvlp.losses.segmentation import (
    dice_cross_entropy,
    focal_loss,
    mixed_loss,
    per_image_loss,
    soft_dice,
)
from tests.golden_files import Golden, every

TERMS = ["loss", "x", "y", "w", "h", "object", "class"]
#: Side of the images and least confidence the golden values were made with.
IMAGE, CONFIDENCE = 224, 0.9


@every("mgca_seg_*.npz")
def test_segmentation(golden: Golden) -> None:
    logits, masks = golden("in_logits").requires_grad_(), golden("in_mask")
    loss = mixed_loss(logits, masks)
    loss.backward()
    values = {
        "mixed": loss,
        "focal": focal_loss(logits, masks),
        "softdice": soft_dice(logits, masks),
    }
    for name, value in values.items():
        torch.testing.assert_close(value.detach().double(), golden(f"out_{name}"), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad, golden("grad"), rtol=1e-5, atol=1e-7)


@every("medslip_seg_*.npz")
def test_dice_and_cross_entropy(golden: Golden) -> None:
    logits, masks = golden("logit").requires_grad_(), golden("target")
    loss = dice_cross_entropy(logits, masks)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden("dicebce"), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad, golden("grad_logit"), rtol=1e-5, atol=1e-7)


def test_a_loss_per_image_is_a_mean_over_parts_and_leaves_out_what_is_unknown() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, masks = (torch.randn(6, 3, 8, 8, generator=generator) for _ in range(2))
    masks, known = (masks > 1).float(), torch.rand(6, 3, generator=generator) < 0.7
    masks[::2, 0] = 0
    whole = per_image_loss(logits, masks, known)
    parts = [per_image_loss(logits[i : i + 2], masks[i : i + 2], known[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    by_loop = [
        10 * focal_loss(logits[i, c], masks[i, c])
        + (1 - soft_dice(logits[i, c], masks[i, c]) if masks[i, c].any() else 0)
        for i, c in known.nonzero().tolist()
    ]
    torch.testing.assert_close(torch.stack(by_loop).sum() / known.numel(), whole)
    other = torch.where(known[..., None, None], masks, torch.tensor(255.0))
    torch.testing.assert_close(per_image_loss(logits, other, known), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 100.0, 1e4])
def test_segmentation_is_finite(dtype: torch.dtype, scale: float) -> None:
    logits = (torch.randn(2, 4, 4) * scale).to(dtype).requires_grad_()
    loss = mixed_loss(logits, torch.zeros(2, 4, 4))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@every("mgca_yolo_*.npz")
def test_detection(golden: Golden) -> None:
    labels, anchors = golden("in_labels"), golden("in_anchors")
    total, decoded = 0.0, []
    for scale in range(3):
        output = golden(f"in_out{scale}").requires_grad_()
        terms = detection_loss(output, labels, anchors[scale], IMAGE)
        terms["loss"].backward()
        values = torch.stack([terms[name].detach() for name in TERMS]).double()
        torch.testing.assert_close(values, golden(f"out_scale{scale}"), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(output.grad, golden(f"grad_out{scale}"), rtol=1e-4, atol=1e-7)
        total += terms["loss"].item()
        decoded.append(decode_boxes(output.detach(), anchors[scale], IMAGE))
    assert total == pytest.approx(golden("out_total").item(), rel=1e-6)
    boxes = torch.cat(decoded, 1)
    torch.testing.assert_close(boxes, golden("out_decoded"), rtol=1e-5, atol=1e-4)
    for image, kept in enumerate(suppress_overlaps(boxes, CONFIDENCE, plus_one=True)):
        torch.testing.assert_close(kept, golden(f"out_nms{image}"), rtol=1e-5, atol=1e-3)


def by_loop(boxes: torch.Tensor, anchors: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(present, offset) box by box; the last of several boxes in one place counts."""
    shape = (len(boxes), len(anchors), side, side)
    present, offset = torch.zeros(shape), torch.zeros(*shape, 2)
    for image, rows in enumerate(boxes):
        for row in rows[rows.abs().sum(1) > 0]:
            centre, size = row[1:3] * side, row[3:5] * side
            column, line = (min(int(value), side - 1) for value in centre)
            shared = torch.minimum(size + 1, anchors + 1).prod(1)
            union = (size + 1).prod() + (anchors + 1).prod(1) - shared
            best = int((shared / union).argmax())
            present[image, best, line, column] = 1
            offset[image, best, line, column] = centre - torch.tensor([column, line])
    return present, offset


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(0, 1000))
def test_targets_equal_a_loop(batch: int, count: int, side: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(batch, count, 5, generator=generator)
    boxes[..., 0] = 0
    boxes[torch.rand(batch, count, generator=generator) < 0.3] = 0
    anchors = torch.rand(3, 2, generator=generator) * side + 0.1
    targets = grid_targets(boxes, anchors, (side, side), classes=1)
    present, offset = by_loop(boxes, anchors, side)
    torch.testing.assert_close(targets.present, present)
    torch.testing.assert_close(targets.offset, offset)
    assert ((targets.background == 0) | (targets.background == 1)).all()
    assert torch.equal(targets.classes[..., 0], present)


def test_a_hedged_box_is_no_target_and_its_cell_no_background() -> None:
    boxes = torch.tensor([[[0.0, 0.2, 0.2, 0.3, 0.3], [0.0, 0.7, 0.7, 0.2, 0.4]]])
    targets = grid_targets(
        boxes, torch.tensor([[1.0, 1.0], [2.0, 2.0]]), (4, 4), 1, hedged=torch.tensor([[False, True]])
    )
    assert targets.present.sum() == 1
    assert targets.present[0, :, 0, 0].any()
    assert not targets.background[0, :, 2, 2].any()
    assert not targets.classes[0, :, 2, 2].any()


def test_no_boxes_and_boxes_on_the_edge() -> None:
    output = torch.randn(1, 18, 4, 4, requires_grad=True)
    anchors = torch.tensor([[10.0, 10.0], [20.0, 20.0], [40.0, 40.0]])
    empty = detection_loss(output, torch.zeros(1, 5, 5), anchors, 32)
    assert empty["x"] == empty["class"] == 0
    edge = detection_loss(output, torch.tensor([[[0.0, 1.0, 1.0, 0.5, 0.5]]]), anchors, 32)
    edge["loss"].backward()
    assert output.grad.isfinite().all()
    assert edge["x"] > 0


def test_suppression_keeps_the_most_confident_of_each_class() -> None:
    boxes = torch.tensor(
        [
            [
                [10.0, 10.0, 8.0, 8.0, 0.9, 0.8, 0.1],
                [10.5, 10.0, 8.0, 8.0, 0.95, 0.8, 0.1],
                [10.0, 10.0, 8.0, 8.0, 0.7, 0.1, 0.8],
                [40.0, 40.0, 8.0, 8.0, 0.2, 0.9, 0.1],
            ]
        ]
    )
    (kept,) = suppress_overlaps(boxes)
    assert kept[:, 4].tolist() == pytest.approx([0.95, 0.7])
    assert kept[:, 6].tolist() == [0, 1]
    small = torch.tensor([[[2.0, 2.0, 2.0, 2.0, 0.9, 1.0], [3.0, 2.0, 2.0, 2.0, 0.8, 1.0]]])
    assert [len(suppress_overlaps(small, overlap=0.4, plus_one=longer)[0]) for longer in (0, 1)] == [2, 1]
    (none,) = suppress_overlaps(boxes, confidence=0.99)
    assert none.shape == (0, 7)

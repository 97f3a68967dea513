"""Heads that find boxes: what each reads, hedged boxes, loss and detections, that they learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from medvlp.config import ImageConfig
from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.heads.anchor_loss import match_anchors
from medvlp.evaluation.heads.boxes import (
    HEADS,
    MOST,
    Boxes,
    RetinaNetHead,
    Suppression,
    _images,
    build_head,
)
from medvlp.evaluation.task import EvaluationError
from medvlp.losses.detection import detection_loss

VIT = ImageConfig(
    name="vit_tiny_patch16_224", options={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
)
RESNET = ImageConfig(name="resnet10t", options={"channels": [8, 8, 16, 24], "stem_width": 8})
SIZE = 64


def boxes(*rows: list[float], classes: int = 3) -> Boxes:
    """Of one image, of rows [left, top, right, bottom, class]; one place without any row."""
    table = torch.tensor([*rows] or [[0.0, 0, 0, 0, -1]], dtype=torch.float32)[None]
    nowhere = torch.zeros(1, classes, dtype=torch.bool)
    hedged = torch.zeros(table.shape[:2], dtype=torch.bool)
    return Boxes(table[..., :4], table[..., 4].long(), hedged, nowhere)


def together(*images: Boxes) -> Boxes:
    """Boxes of several images as one batch."""
    most = max(of.classes.shape[1] for of in images)

    def padded(name: str, value: float) -> torch.Tensor:
        rows = [getattr(of, name)[0] for of in images]
        result = rows[0].new_full((len(rows), most, *rows[0].shape[1:]), value)
        for to, row in zip(result, rows, strict=True):
            to[: len(row)] = row
        return result

    anywhere = torch.cat([of.anywhere for of in images])
    return Boxes(padded("boxes", 0.0), padded("classes", -1), padded("hedged", False), anywhere)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 60, (count, 1, SIZE, SIZE), dtype=torch.uint8)


SHORT = dataclasses.replace(RESNET, local_stage=3)


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, RESNET) for name in HEADS]
    + [(name, of) for name in ("yolo", "retinanet") for of in (VIT, SHORT)],
)
def test_losses_reach_every_weight_and_detections_have_their_form(name: str, config: ImageConfig) -> None:
    torch.manual_seed(0)
    shortened = config.local_stage is not None
    encoder = ImageEncoder(config, SIZE, ends_at_local=shortened)
    if name == "yolo" and (shortened or config is VIT):
        with pytest.raises(EvaluationError, match="use retinanet"):
            build_head(name, encoder, 3)
        return
    head = build_head(name, encoder, 3)
    image = images(2)
    truth = together(boxes([5, 5, 30, 30, 2], [20, 20, 60, 50, 0]), boxes())
    maps = head.look(encoder, image)
    losses = head(maps, SIZE, truth, Suppression())
    sum(losses.values()).backward()
    without = [key for key, parameter in head.named_parameters() if parameter.grad is None]
    assert not without
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    empty = head(maps, SIZE, together(boxes(), boxes()), Suppression())
    assert sum(empty.values()).isfinite()
    for found in head.eval()(maps, SIZE, None, Suppression(confidence=0.0)):
        assert found.shape[1] == 6
        assert 0 < len(found) <= MOST
        assert (found[:-1, 4] >= found[1:, 4]).all()
        assert set(found[:, 5].unique().tolist()) <= {0.0, 1.0, 2.0}


#: A certain box, and a hedged one elsewhere.
HELD = dataclasses.replace(
    boxes([8, 8, 24, 24, 0], [36, 36, 56, 60, 0], classes=1), hedged=torch.tensor([[False, True]])
)


def retinanet_learned(
    head: Any, encoder: ImageEncoder, truth: Boxes, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, anchors, C] with the gradient of the loss of B images, and the anchors."""
    count = len(truth.boxes)
    levels = list(head.levels(head.look(encoder, images(count))).values())
    anchors = head.net.anchor_generator(_images(levels[0], SIZE), levels)[0]
    logits = torch.randn(count, len(anchors), classes, requires_grad=True)
    outputs = {"cls_logits": logits, "bbox_regression": torch.zeros(count, len(anchors), 4)}
    sum(head._losses(outputs, anchors, truth).values()).backward()
    return logits, anchors


def test_retinanet_learns_as_that_of_torchvision_where_nothing_is_hedged() -> None:
    torch.manual_seed(0)
    head: Any = build_head("retinanet", ImageEncoder(RESNET, SIZE), 3)
    levels = list(head.levels(head.look(ImageEncoder(RESNET, SIZE), images(3))).values())
    anchors = head.net.anchor_generator(_images(levels[0], SIZE), levels)
    truth = together(
        boxes([5, 5, 30, 30, 2], [20, 20, 60, 50, 0], [20, 20, 23, 23, 1]), boxes(), boxes([1, 1, 9, 60, 1])
    )
    outputs = {
        name: torch.randn(3, len(anchors[0]), width)
        for name, width in (("cls_logits", 3), ("bbox_regression", 4))
    }
    targets = [{"boxes": own, "labels": kinds} for own, kinds, _ in map(truth.of, range(3))]
    expected = head.net.compute_loss(targets, outputs, anchors)
    found = head._losses(outputs, anchors[0], truth)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_a_box_that_no_anchor_overlaps_matches_none() -> None:
    """torchvision takes every anchor for the best of such a box, and so for one of the boxes."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    held = torch.tensor([[0.0, 0, 10, 8], [40, 40, 50, 50]])
    found = match_anchors(held, torch.tensor([True, True]), anchors, 0.4, 0.5)
    assert found.tolist() == [0, -1]


def test_anchors_match_no_box_of_another_finding() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    for real, expected in (([True, False], [0, -1]), ([False, False], [-1, -1])):
        assert match_anchors(anchors, torch.tensor(real), anchors, 0.4, 0.5).tolist() == expected


def test_retinanet_moves_no_anchor_to_a_hedged_box_and_divides_by_none() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(RESNET, SIZE)
    head: Any = build_head("retinanet", encoder, 1)
    levels = list(head.levels(head.look(encoder, images(1))).values())
    anchors = head.net.anchor_generator(_images(levels[0], SIZE), levels)[0]
    outputs = {
        "cls_logits": torch.zeros(1, len(anchors), 1),
        "bbox_regression": torch.randn(1, len(anchors), 4),
    }
    certain = boxes([8, 8, 24, 24, 0], classes=1)
    found, alone = (head._losses(outputs, anchors, of)["bbox_regression"] for of in (HELD, certain))
    assert alone > 0
    torch.testing.assert_close(found, alone)


def test_retinanet_learns_nothing_at_anchors_of_a_hedged_box() -> None:
    encoder = ImageEncoder(RESNET, SIZE)
    head: Any = build_head("retinanet", encoder, 1)
    logits, anchors = retinanet_learned(head, encoder, HELD, 1)
    overlap = box_iou(HELD.boxes[0], anchors)
    on_hedged = (overlap[1] >= 0.5) & (overlap[0] < 0.4)
    assert on_hedged.any()
    assert not logits.grad[0, on_hedged].any()
    assert logits.grad[0, (overlap < 0.4).all(0)].count_nonzero() > 100
    assert (logits.grad[0, overlap[0] >= 0.5] < 0).all()


def test_faster_rcnn_samples_nothing_at_a_hedged_box() -> None:
    encoder = ImageEncoder(RESNET, SIZE)
    head: Any = build_head("faster-rcnn", encoder, 1)
    near = torch.tensor([[8.0, 8.0, 24.0, 25.0], [36.0, 36.0, 56.0, 59.0], [0.0, 40.0, 10.0, 50.0]])
    target = {"boxes": HELD.boxes[0], "labels": torch.tensor([1, -1])}
    (labels,), _ = head.net.rpn.assign_targets_to_anchors([near], [target])
    assert labels.tolist() == [1, -1, 0]
    _, (labels,) = head.net.roi_heads.assign_targets_to_proposals([near], [HELD.boxes[0]], [target["labels"]])
    assert labels.tolist() == [1, -1, 0]


#: Class 0 may be anywhere in the image, of class 1 it holds a box.
OPEN = dataclasses.replace(boxes([8, 8, 24, 24, 1]), anywhere=torch.tensor([[True, False]]))
CLOSED = boxes([8, 8, 24, 24, 1], classes=2)


def test_retinanet_takes_nothing_for_background_of_a_class_that_may_be_anywhere() -> None:
    encoder = ImageEncoder(RESNET, SIZE)
    head: Any = build_head("retinanet", encoder, 2)
    logits, _ = retinanet_learned(head, encoder, together(OPEN, CLOSED), 2)
    assert not logits.grad[0, :, 0].any()
    assert logits.grad[0, :, 1].count_nonzero() > 100
    assert logits.grad[1, :, 0].count_nonzero() > 100


def test_yolo_takes_nothing_for_background_where_a_class_may_be_anywhere() -> None:
    anchors, held = torch.tensor([[16.0, 16.0]]), torch.tensor([[[1, 0.25, 0.25, 0.25, 0.25]]] * 2)
    output = torch.randn(2, 7, 4, 4, requires_grad=True)
    anywhere = torch.tensor([[True, False], [False, False]])
    detection_loss(output, held, anchors, SIZE, None, anywhere)["loss"].backward()
    confidence = output.grad[:, 4].clone()
    assert confidence[0, 1, 1] != 0
    assert confidence[1].count_nonzero() == 16
    assert confidence[0].count_nonzero() == 1, "only where the box is"
    assert output.grad[0, 5, 1, 1] == 0
    assert output.grad[0, 6, 1, 1] != 0
    assert output.grad[1, 5, 1, 1] != 0


def test_faster_rcnn_learns_nothing_from_an_image_in_which_a_class_may_be_anywhere() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(RESNET, SIZE)
    head = build_head("faster-rcnn", encoder, 2)
    maps = head.look(encoder, images(2))

    def losses(*truth: Boxes) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        found = head(tuple(of[: len(truth)] for of in maps), SIZE, together(*truth), Suppression())
        assert isinstance(found, dict)
        return found

    alone, beside = losses(CLOSED), losses(CLOSED, OPEN)
    assert all(torch.allclose(alone[name], beside[name], atol=1e-5) for name in alone)
    nothing = losses(OPEN, OPEN)
    sum(nothing.values()).backward()
    assert all(value == 0 for value in nothing.values())
    assert all(of.grad is not None and not of.grad.any() for of in head.parameters())


def test_retinanet_on_a_frozen_network_finds_a_square() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(dataclasses.replace(RESNET, frozen=True), SIZE)
    head = RetinaNetHead(encoder, 2, channels=32)
    image, truth = images(6), []
    for i, (y, x) in enumerate((torch.randint(0, 3, (6, 2)) * 16).tolist()):
        image[i, 0, y : y + 32, x : x + 32] = 250
        truth.append(boxes([x, y, x + 32.0, y + 32.0, 1], classes=2))
    maps = head.look(encoder, image)
    optimiser = torch.optim.AdamW(head.parameters(), 3e-3)
    for _ in range(30):
        loss = sum(head(maps, SIZE, together(*truth), Suppression()).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    best = torch.stack([found[0] for found in head.eval()(maps, SIZE, None, Suppression())])
    overlap = box_iou(best[:, :4], torch.cat([held.boxes[0] for held in truth])).diagonal()
    assert (overlap > 0.4).sum() >= 5
    assert best[:, 5].tolist().count(1.0) >= 5


def test_faster_rcnn_refuses_half_precision() -> None:
    encoder = ImageEncoder(RESNET, SIZE)
    head = build_head("faster-rcnn", encoder, 1)
    maps = tuple(of.bfloat16() for of in head.look(encoder, images(1)))
    with pytest.raises(EvaluationError, match="precision=fp32"):
        head(maps, SIZE, None, Suppression())


def test_retinanet_computes_boxes_in_float32_from_half_precision() -> None:
    encoder = ImageEncoder(RESNET, SIZE).bfloat16()
    head = build_head("retinanet", encoder, 1).bfloat16().eval()
    (found,) = head(head.look(encoder, images(1)), SIZE, None, Suppression())
    assert found.dtype == torch.float32


def test_a_pyramid_as_narrow_as_is_asked_but_not_of_the_published_head() -> None:
    encoder = ImageEncoder(RESNET, 64)
    head: Any = build_head("retinanet", encoder, 1, 32)
    assert head.net.head.classification_head.cls_logits.in_channels == 32
    with pytest.raises(EvaluationError, match="yolo has the channels that MGCA publishes"):
        build_head("yolo", encoder, 1, 32)

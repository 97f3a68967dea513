"""Heads that find boxes: what each reads, hedged boxes, loss and detections, that they learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from medvlp.config import ImageConfig
from medvlp.encoders.image import ImageEncoder
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

VIT = ImageConfig(
    name="vit_tiny_patch16_224", options={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
)
RESNET = ImageConfig(name="resnet10t", options={"channels": [8, 8, 16, 24], "stem_width": 8})
SIZE = 64


def boxes(*rows: list[float]) -> Boxes:
    """Of rows [left, top, right, bottom, class]."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return Boxes(table[:, :4], table[:, 4].long(), torch.zeros(len(rows), dtype=torch.bool))


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
    truth = [boxes([5, 5, 30, 30, 2], [20, 20, 60, 50, 0]), boxes()]
    maps = head.look(encoder, image)
    losses = head(maps, SIZE, truth, Suppression())
    sum(losses.values()).backward()
    without = [key for key, parameter in head.named_parameters() if parameter.grad is None]
    assert not without
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    empty = head(maps, SIZE, [boxes(), boxes()], Suppression())
    assert sum(empty.values()).isfinite()
    for found in head.eval()(maps, SIZE, None, Suppression(confidence=0.0)):
        assert found.shape[1] == 6
        assert 0 < len(found) <= MOST
        assert (found[:-1, 4] >= found[1:, 4]).all()
        assert set(found[:, 5].unique().tolist()) <= {0.0, 1.0, 2.0}


#: A certain box, and a hedged one elsewhere.
HELD = Boxes(
    torch.tensor([[8.0, 8.0, 24.0, 24.0], [36.0, 36.0, 56.0, 60.0]]),
    torch.tensor([0, 0]),
    torch.tensor([False, True]),
)


def test_retinanet_learns_nothing_at_anchors_of_a_hedged_box() -> None:
    encoder = ImageEncoder(RESNET, SIZE)
    head: Any = build_head("retinanet", encoder, 1)
    levels = list(head.levels(head.look(encoder, images(1))).values())
    anchors = head.net.anchor_generator(_images(levels[0], SIZE), levels)
    logits = torch.randn(1, len(anchors[0]), 1, requires_grad=True)
    outputs = {"cls_logits": logits, "bbox_regression": torch.zeros(1, len(anchors[0]), 4)}
    sum(head._losses(outputs, anchors, [HELD]).values()).backward()
    overlap = box_iou(HELD.boxes, anchors[0])
    on_hedged = (overlap[1] >= 0.5) & (overlap[0] < 0.4)
    assert on_hedged.any()
    assert not logits.grad[0, on_hedged].any()
    assert logits.grad[0, (overlap < 0.4).all(0)].count_nonzero() > 100
    assert (logits.grad[0, overlap[0] >= 0.5] < 0).all()


def test_faster_rcnn_samples_nothing_at_a_hedged_box() -> None:
    encoder = ImageEncoder(RESNET, SIZE)
    head: Any = build_head("faster-rcnn", encoder, 1)
    near = torch.tensor([[8.0, 8.0, 24.0, 25.0], [36.0, 36.0, 56.0, 59.0], [0.0, 40.0, 10.0, 50.0]])
    target = {"boxes": HELD.boxes, "labels": torch.tensor([1, -1])}
    (labels,), _ = head.net.rpn.assign_targets_to_anchors([near], [target])
    assert labels.tolist() == [1, -1, 0]
    _, (labels,) = head.net.roi_heads.assign_targets_to_proposals([near], [HELD.boxes], [target["labels"]])
    assert labels.tolist() == [1, -1, 0]


def test_retinanet_on_a_frozen_network_finds_a_square() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(dataclasses.replace(RESNET, frozen=True), SIZE)
    head = RetinaNetHead(encoder, 2, channels=32)
    image, truth = images(6), []
    for i, (y, x) in enumerate((torch.randint(0, 3, (6, 2)) * 16).tolist()):
        image[i, 0, y : y + 32, x : x + 32] = 250
        truth.append(boxes([x, y, x + 32.0, y + 32.0, 1]))
    maps = head.look(encoder, image)
    optimiser = torch.optim.AdamW(head.parameters(), 3e-3)
    for _ in range(30):
        loss = sum(head(maps, SIZE, truth, Suppression()).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    best = torch.stack([found[0] for found in head.eval()(maps, SIZE, None, Suppression())])
    overlap = box_iou(best[:, :4], torch.cat([held.boxes for held in truth])).diagonal()
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

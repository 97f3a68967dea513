"""Heads that find boxes: from an image encoder's feature maps to losses while training, else to detections.

Each head reads the encoder by `look` and is called with what it saw, as those of `masks.py`. torchvision's
detectors lend their parts; their own resizing and normalising of images has no place here.
"""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from medvlp.encoders.batch_norm import convert_batch_norms
from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.heads.anchor_loss import match_anchors, retinanet_loss
from medvlp.evaluation.heads.pyramids import TokenPyramid, patch_map
from medvlp.evaluation.task import EvaluationError
from medvlp.losses.detection import decode_boxes, detection_loss, suppress_overlaps

Maps = tuple[Tensor, ...]

#: Detections of an image that are kept, the most certain ones.
MOST = 100
#: A logit whose probability is 1e-13.
_SURELY_NOT = -30.0


@dataclass(frozen=True)
class Suppression:
    """What becomes of overlapping and uncertain detections.

    Attributes:
        confidence: least score.
        overlap: least IoU with a more certain detection of the same class that removes one.
        plus_one: see `medvlp.losses.detection.suppress_overlaps`; only of the head "yolo".
    """

    confidence: float = 0.001
    overlap: float = 0.5
    plus_one: bool = False


@dataclass(frozen=True)
class Boxes:
    """The boxes of B images, each with N > 0 places for some.

    Attributes:
        boxes: [B, N, 4] (left, top, right, bottom in pixels). classes: [B, N] from 0; -1: no box is there.
        hedged: [B, N] bool. anywhere: [B, C] bool, classes that may be anywhere in an image.
    """

    boxes: Tensor
    classes: Tensor
    hedged: Tensor
    anywhere: Tensor

    def of(self, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [m, 4], classes [m] and hedged [m] of an image; waits for the device."""
        real = self.classes[image] >= 0
        return self.boxes[image, real], self.classes[image, real], self.hedged[image, real]


class BoxHead(nn.Module, abc.ABC):
    """Finds boxes of C classes in images by what it reads of an encoder."""

    @abc.abstractmethod
    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """What the head reads of [B, 1, H, W] images."""

    @abc.abstractmethod
    def forward(
        self, maps: Maps, size: int, truth: Boxes | None, suppression: Suppression
    ) -> dict[str, Tensor] | list[Tensor]:
        """Find boxes, or learn to.

        Args:
            maps: what `look` saw. size: side of the images in pixels.
            truth: hedged boxes are neither learned nor background, and of a class that may be anywhere in an
                image nothing there is background.
            suppression: of detections.

        Returns:
            With `truth` the terms of the loss, 0-d, whose sum is the loss; else of each image [n, 6]: left,
            top, right, bottom, score, class; the most certain first, at most `MOST`.
        """


class YOLOHead(BoxHead):
    """MGCA's YOLOv3 head on the last three stages of a convolutional backbone (strides 8, 16, 32).

    Every scale has three anchors, those of COCO at the image's size. The score is that of any object being
    there; the class is the most probable one.
    """

    ANCHORS = (
        ((116, 90), (156, 198), (373, 326)),
        ((30, 61), (62, 45), (59, 119)),
        ((10, 13), (16, 30), (33, 23)),
    )
    #: Side of the images for which these anchors were made.
    MADE_FOR = 416

    def __init__(self, encoder: ImageEncoder, classes: int) -> None:
        super().__init__()
        found = {level.stride: number for number, level in enumerate(encoder.levels)}
        if not encoder.has_stages or not {8, 16, 32} <= found.keys():
            raise EvaluationError(
                f"head yolo needs stages at strides 8, 16 and 32; image.name={encoder.config.name} has "
                f"{', '.join(str(stride) for stride in found)}: use retinanet"
            )
        self.read = [found[8], found[16], found[32]]
        shallow, middle, deep = (encoder.levels[number].width for number in self.read)
        self.classes, outputs = classes, 3 * (5 + classes)
        self.stems = nn.ModuleList([_stem(deep, 512), _stem(256 + middle, 256), _stem(128 + shallow, 128)])
        self.outs = nn.ModuleList([
            nn.Sequential(_cbl(width, 2 * width, 3), nn.Conv2d(2 * width, outputs, 1))
            for width in (512, 256, 128)
        ])  # fmt: skip
        self.narrows = nn.ModuleList([_cbl(512, 256, 1), _cbl(256, 128, 1)])
        # Whole numbers, which stay so in half precision.
        self.register_buffer("anchors", torch.tensor(self.ANCHORS), persistent=False)

    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """See `BoxHead`."""
        return encoder.pyramid(image, self.read)

    def forward(
        self, maps: Maps, size: int, truth: Boxes | None, suppression: Suppression
    ) -> dict[str, Tensor] | list[Tensor]:
        """See `BoxHead`."""
        outputs: list[Tensor] = []
        below = maps[-1]
        for number, seen in enumerate(maps[::-1]):
            if number:
                wider = F.interpolate(self.narrows[number - 1](below), size=seen.shape[-2:], mode="nearest")
                seen = torch.cat([wider, seen], dim=1)
            below = self.stems[number](seen)
            outputs.append(self.outs[number](below))
        anchors = self.get_buffer("anchors").float() * (size / self.MADE_FOR)
        if truth is None:
            found = [decode_boxes(out, of, size) for out, of in zip(outputs, anchors, strict=True)]
            kept = suppress_overlaps(
                torch.cat(found, 1), suppression.confidence, suppression.overlap, suppression.plus_one
            )
            return [torch.cat([of[:, :5], of[:, 6:]], 1)[:MOST] for of in kept]
        boxes = _relative(truth, size)
        losses = [
            detection_loss(out, boxes, of, size, truth.hedged, truth.anywhere)["loss"]
            for out, of in zip(outputs, anchors, strict=True)
        ]
        return {"yolo": torch.stack(losses).sum()}


class TorchvisionHead(BoxHead):
    """A feature pyramid network and one of torchvision's detectors.

    Of a backbone with stages it reads all from stride 4 on; a transformer's last tokens become maps at 4, 2,
    1 and 0.5 times the patch grid. Where none has a stride of 32, a last map of half the size is added.

    Args:
        channels: of the pyramid.
    """

    def __init__(self, encoder: ImageEncoder, channels: int) -> None:
        super().__init__()
        self.grid = encoder.grid
        if encoder.has_stages:
            self.read = [number for number, level in enumerate(encoder.levels) if level.stride >= 4]
            widths = [encoder.levels[number].width for number in self.read]
            strides = [encoder.levels[number].stride for number in self.read]
            self.scale = None
        else:
            patch = encoder.image_size // encoder.grid[0]
            self.scale = TokenPyramid(encoder.local_width)
            self.read = [number for number in range(4) if patch * 2**number >= 16]
            widths = [encoder.local_width] * len(self.read)
            strides = [patch * 2**number // 4 for number in self.read]
        more = LastLevelMaxPool() if strides[-1] < 32 else None
        self.strides = strides + [strides[-1] * 2] * (more is not None)
        self.fpn = FeaturePyramidNetwork(widths, channels, more)
        self.channels = channels

    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """See `BoxHead`."""
        if self.scale is None:
            return encoder.pyramid(image, self.read)
        return (encoder(image).local,)

    def levels(self, maps: Maps) -> OrderedDict[str, Tensor]:
        """The maps of the pyramid, finest first."""
        if self.scale is not None:
            scaled = self.scale([patch_map(maps[0], self.grid)] * 4)
            maps = tuple(scaled[number] for number in self.read)
        found: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(i), of) for i, of in enumerate(maps)))
        return found


class RetinaNetHead(TorchvisionHead):
    """torchvision's RetinaNet: anchors of 4 to 6.3 times the stride, three shapes; focal loss."""

    def __init__(self, encoder: ImageEncoder, classes: int, channels: int = 128) -> None:
        super().__init__(encoder, channels)
        sizes = tuple(tuple(4 * stride * 2 ** (third / 3) for third in range(3)) for stride in self.strides)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.net = RetinaNet(_Channels(channels), classes, anchor_generator=anchors, detections_per_img=MOST)

    def forward(
        self, maps: Maps, size: int, truth: Boxes | None, suppression: Suppression
    ) -> dict[str, Tensor] | list[Tensor]:
        """See `BoxHead`."""
        levels = list(self.levels(maps).values())
        outputs = {name: of.float() for name, of in self.net.head(levels).items()}
        anchors = self.net.anchor_generator(_images(levels[0], size), [of.float() for of in levels])
        if truth is not None:
            return self._losses(outputs, anchors[0], truth)
        self.net.score_thresh, self.net.nms_thresh = suppression.confidence, suppression.overlap
        counts = [
            of.shape[2] * of.shape[3] * self.net.anchor_generator.num_anchors_per_location()[0]
            for of in levels
        ]
        split = {name: list(of.split(counts, dim=1)) for name, of in outputs.items()}
        by_level = [list(of.split(counts)) for of in anchors]
        found = self.net.postprocess_detections(split, by_level, [(size, size)] * len(anchors))
        return [_stacked(of, 0) for of in found]

    def _losses(self, outputs: dict[str, Tensor], anchors: Tensor, truth: Boxes) -> dict[str, Tensor]:
        """As `RetinaNet.compute_loss`, but anchors [A, 4] that match a hedged box are left out, and all of a
        class that may be anywhere."""
        # So sure of the background that the focal loss has neither value nor gradient there.
        logits = outputs["cls_logits"].masked_fill(truth.anywhere[:, None], _SURELY_NOT)
        limits = self.net.proposal_matcher.low_threshold, self.net.proposal_matcher.high_threshold
        images = zip(truth.boxes, truth.classes >= 0, strict=True)
        match = torch.stack([match_anchors(boxes, real, anchors, *limits) for boxes, real in images])
        return retinanet_loss(
            logits, outputs["bbox_regression"], anchors, match, truth.boxes, truth.classes, truth.hedged
        )


class FasterRCNNHead(TorchvisionHead):
    """torchvision's Faster R-CNN: anchors of 4 times the stride, three shapes; float32 only.

    Its background is that of all classes, so it learns nothing from an image in which one may be anywhere.
    torchvision chooses its proposals and samples by indices: each step waits for the device.
    """

    def __init__(self, encoder: ImageEncoder, classes: int, channels: int = 128) -> None:
        super().__init__(encoder, channels)
        sizes = tuple((4 * stride,) for stride in self.strides)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.net = FasterRCNN(
            _Channels(channels), classes + 1, rpn_anchor_generator=anchors, box_detections_per_img=MOST
        )
        of = self.net.rpn  # with torchvision's default numbers
        self.net.rpn = _Proposals(
            anchors, of.head, 0.7, 0.3, 256, 0.5, of._pre_nms_top_n, of._post_nms_top_n, of.nms_thresh
        )

    def forward(
        self, maps: Maps, size: int, truth: Boxes | None, suppression: Suppression
    ) -> dict[str, Tensor] | list[Tensor]:
        """See `BoxHead`."""
        if maps[0].dtype != torch.float32:
            raise EvaluationError("head faster-rcnn computes boxes in float32 only: set precision=fp32")
        weight, targets = 1.0, None
        if truth is not None:
            kept = torch.nonzero(~truth.anywhere.any(1))[:, 0].tolist()
            if not kept:  # every weight has a gradient in each step, here of 0
                weight, kept = 0.0, list(range(len(truth.boxes)))
            maps = tuple(of[kept] for of in maps)
            # Class 0 is the background; the sampler leaves out what matches a box of class -1.
            targets = [
                {"boxes": boxes, "labels": torch.where(hedged, -1, classes + 1)}
                for boxes, classes, hedged in map(truth.of, kept)
            ]
        levels = self.levels(maps)
        images = _images(maps[0], size)
        self.net.roi_heads.score_thresh = suppression.confidence
        self.net.roi_heads.nms_thresh = suppression.overlap
        proposals, losses = self.net.rpn(images, levels, targets)
        found, further = self.net.roi_heads(levels, proposals, images.image_sizes, targets)
        if truth is not None:
            return {name: weight * value for name, value in (losses | further).items()}
        return [_stacked(of, 1) for of in found]


class _Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """Anchors that match a hedged box (label -1) are left out."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, of, target in zip(labels, anchors, targets, strict=True):
            if (target["labels"] == -1).any():
                nearest = box_iou(target["boxes"], of).argmax(0)
                label[(label == 1) & (target["labels"][nearest] == -1)] = -1
        return labels, boxes


class _Channels(nn.Module):
    """Stands for a detector's backbone, which is asked for nothing but its channels."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


HEADS: dict[str, Callable[..., BoxHead]] = {
    "yolo": YOLOHead,
    "retinanet": RetinaNetHead,
    "faster-rcnn": FasterRCNNHead,
}


def build_head(
    name: str, encoder: ImageEncoder, classes: int, channels: int | None = None, synchronise: bool = True
) -> BoxHead:
    """The named head on an encoder.

    Args:
        channels: of the feature pyramid; None: 128.
        synchronise: batch norms take the statistics of all ranks.

    Raises:
        EvaluationError: the head cannot read this backbone, or its channels are published.
    """
    if channels is not None and name == "yolo":
        raise EvaluationError("head yolo has the channels that MGCA publishes: leave channels away")
    head = HEADS[name](encoder, classes, **({} if channels is None else {"channels": channels}))
    convert_batch_norms(head, synchronise)
    return head


def _cbl(inside: int, outside: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.LeakyReLU(0.1))


def _stem(inside: int, width: int) -> nn.Sequential:
    """Five convolutions, 1x1 and 3x3 in turn, that end at `width` channels."""
    wide = 2 * width
    sides = ((inside, width, 1), (width, wide, 3), (wide, width, 1), (width, wide, 3), (wide, width, 1))
    return nn.Sequential(*(_cbl(*of) for of in sides))


def _relative(truth: Boxes, size: int) -> Tensor:
    """[B, N, 5] (class, centre x, centre y, width, height; 0..1), zeros where there is no box."""
    corners = truth.boxes / size
    middle, sides = (corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]
    rows = torch.cat([truth.classes[..., None], middle, sides], dim=2)
    return torch.where(truth.classes[..., None] >= 0, rows, 0.0)


def _images(like: Tensor, size: int) -> ImageList:
    """Square images as the detectors need to know them: by their sizes."""
    return ImageList(like.new_empty((len(like), 0, size, size)), [(size, size)] * len(like))


def _stacked(found: dict[str, Tensor], first: int) -> Tensor:
    """Detections of an image -> [n, 6]; `first` is the number of the first class."""
    order = found["scores"].argsort(descending=True, stable=True)
    rows = [found["boxes"], found["scores"][:, None], (found["labels"] - first)[:, None].float()]
    return torch.cat(rows, dim=1)[order]

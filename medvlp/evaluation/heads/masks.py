"""Heads that draw masks: from an image encoder's feature maps to one logit a pixel and finding.

Each head reads the encoder by `look`, which has no weights, and is called with what it saw, so that encoder
and head are two modules for ZeRO-3. Logits are as large as the images.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from medvlp.encoders.batch_norm import convert_batch_norms
from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.heads.pyramids import TokenPyramid, patch_map
from medvlp.evaluation.task import EvaluationError

Maps = tuple[Tensor, ...]


class MaskHead(nn.Module, abc.ABC):
    """Draws C masks of images from what it reads of an encoder; `head` ends in the logits."""

    head: nn.Module

    @abc.abstractmethod
    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """What the head reads of [B, 1, H, W] images."""

    @abc.abstractmethod
    def forward(self, maps: Maps, size: int) -> tuple[Tensor, ...]:
        """Maps of `look` -> [B, C, size, size] logits: the answer, then others that are trained beside it."""


class UNetHead(MaskHead):
    """segmentation-models-pytorch's U-Net decoder on the stages of a convolutional backbone.

    On a ResNet-50 it is MGCA's published head: decoder of 256, 128, 64, 32, 16 channels, nearest upsampling.

    Args:
        channels: of the first, widest block; each further one has half, at least 16.
    """

    def __init__(self, encoder: ImageEncoder, classes: int, channels: int = 256) -> None:
        super().__init__()
        _need_stages(encoder, "unet")
        widths = [encoder.config.in_channels, *(level.width for level in encoder.levels)]
        decoder = [max(channels >> number, 16) for number in range(len(encoder.levels))]
        self.decoder = UnetDecoder(widths, decoder, len(decoder))
        self.head = SegmentationHead(decoder[-1], classes, kernel_size=3)
        initialize_decoder(self.decoder)
        initialize_head(self.head)

    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """See `MaskHead`."""
        return encoder.pyramid(image)

    def forward(self, maps: Maps, size: int) -> tuple[Tensor, ...]:
        """See `MaskHead`."""
        # The decoder takes only the size of what stands for the image.
        whole = maps[0].new_empty((len(maps[0]), 0, size, size))
        return (self.head(self.decoder([whole, *maps])),)


class SETRHead(MaskHead):
    """SETR-PUP on the patch tokens of a transformer, as MGCA publishes it: a linear layer, then convolutions
    of 512, 256, 128 and 64 channels, each followed by upsampling to twice the size.

    Args:
        channels: of the first convolution; each further one has half.
    """

    def __init__(self, encoder: ImageEncoder, classes: int, channels: int = 512) -> None:
        super().__init__()
        _need_tokens(encoder, "setr")
        width = encoder.local_width
        self.grid = encoder.grid
        self.project = nn.Linear(width, width)
        layers: list[nn.Module] = []
        for number in range(4):
            wide = max(channels >> number, 8)
            layers += [
                nn.Conv2d(width, wide, 3, padding=1),
                nn.BatchNorm2d(wide),
                nn.ReLU(),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            ]
            width = wide
        self.decoder = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, classes, 3, padding=1)

    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """See `MaskHead`."""
        return (encoder(image).local,)

    def forward(self, maps: Maps, size: int) -> tuple[Tensor, ...]:
        """See `MaskHead`; patches of other sides than 16 pixels end in one more bilinear step."""
        return (_to_size(self.head(self.decoder(patch_map(self.project(maps[0]), self.grid))), size),)


class UPerNetHead(MaskHead):
    """UPerNet on four blocks of a transformer, as MRM publishes it: maps at 4, 2, 1 and 0.5 times the patch
    grid, the last pooled to 1, 2, 3 and 6, fused; and a small head on the third block, trained beside it.

    Args:
        channels: of the decoder (published: 768).
    """

    def __init__(self, encoder: ImageEncoder, classes: int, channels: int = 256) -> None:
        super().__init__()
        _need_tokens(encoder, "upernet")
        depth = len(encoder.levels)
        if depth < 4:
            raise EvaluationError(
                f"head upernet reads four blocks; image.name={encoder.config.name} has {depth}"
            )
        #: Of 12 blocks the 4th, 6th, 8th and 12th.
        self.blocks = [round(depth * share / 12) - 1 for share in (4, 6, 8, 12)]
        width = encoder.levels[-1].width
        self.scale = TokenPyramid(width)
        self.decoder = UPerNetDecoder([0, 0, *[width] * 4], 5, channels)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))
        self.beside = nn.Sequential(
            nn.Conv2d(width, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(256, classes, 1),
        )
        initialize_decoder(self.decoder)

    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """See `MaskHead`."""
        return encoder.pyramid(image, self.blocks)

    def forward(self, maps: Maps, size: int) -> tuple[Tensor, ...]:
        """See `MaskHead`."""
        scaled = self.scale(maps)
        # The decoder drops the first two of its list: maps at full and half size.
        logits = self.head(self.decoder([scaled[0], scaled[0], *scaled]))
        answers = (logits, self.beside(maps[2])) if self.training else (logits,)
        return tuple(_to_size(answer, size) for answer in answers)


class ResUNetHead(MaskHead):
    """MedKLIP's and MeDSLIP's U-Net: the backbone up to its third stage, learned upsampling, the image itself
    as the last skip. On a ResNet-50 the channels are 1024, 512, 256, 128, 64."""

    def __init__(self, encoder: ImageEncoder, classes: int) -> None:
        super().__init__()
        _need_stages(encoder, "resunet")
        self.read = [number for number, level in enumerate(encoder.levels) if level.stride <= 16]
        widths = [encoder.levels[number].width for number in self.read]
        skips = [encoder.config.in_channels, *widths[:-1]][::-1]
        width = widths[-1]
        self.bridge = _twice(width, width)
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for skip in skips:
            half = max(width // 2, 8)
            self.ups.append(nn.ConvTranspose2d(width, half, 2, stride=2))
            self.blocks.append(_twice(half + skip, half))
            width = half
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Conv2d(width, classes, 1))

    def look(self, encoder: ImageEncoder, image: Tensor) -> Maps:
        """See `MaskHead`; the image as the backbone sees it comes first."""
        return (encoder.prepare(image, resize=False), *encoder.pyramid(image, self.read))

    def forward(self, maps: Maps, size: int) -> tuple[Tensor, ...]:
        """See `MaskHead`."""
        found = self.bridge(maps[-1])
        for up, block, skip in zip(self.ups, self.blocks, maps[-2::-1], strict=True):
            found = block(torch.cat([_to_size(up(found), skip.shape[-1]), skip], dim=1))
        return (self.head(found),)


def begin_empty(head: MaskHead, probability: float = 0.01) -> None:
    """Let a newly drawn head call each pixel with this probability.

    From 1/2 the first steps go into unlearning every mask everywhere, and at a high learning rate past the
    point where the Dice loss still has a gradient. (Lin et al. 2017 begin focal loss so.)
    """
    for part in (head.head, getattr(head, "beside", None)):
        convolutions = [of for of in (part or nn.Module()).modules() if isinstance(of, nn.Conv2d)]
        for last in convolutions[-1:]:
            assert last.bias is not None
            nn.init.constant_(last.bias, math.log(probability / (1 - probability)))


HEADS: dict[str, Callable[..., MaskHead]] = {
    "unet": UNetHead,
    "setr": SETRHead,
    "upernet": UPerNetHead,
    "resunet": ResUNetHead,
}


def build_head(
    name: str, encoder: ImageEncoder, classes: int, channels: int | None = None, synchronise: bool = True
) -> MaskHead:
    """The named head on an encoder; "auto": U-Net where the backbone has stages, else SETR.

    Args:
        channels: of its widest map; None: as published.
        synchronise: batch norms take the statistics of all ranks.

    Raises:
        EvaluationError: the head cannot read this backbone, or its channels are those of the backbone.
    """
    if name == "auto":
        name = "unet" if encoder.has_stages else "setr"
    if channels is not None and name == "resunet":
        raise EvaluationError("head resunet has the channels of its backbone: leave channels away")
    head = HEADS[name](encoder, classes, **({} if channels is None else {"channels": channels}))
    convert_batch_norms(head, synchronise)
    return head


def _twice(inside: int, outside: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        layers += [nn.Conv2d(channels, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


def _to_size(logits: Tensor, size: int) -> Tensor:
    if logits.shape[-1] == size:
        return logits
    return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


def _need_stages(encoder: ImageEncoder, head: str) -> None:
    if not encoder.has_stages:
        raise EvaluationError(
            f"head {head} needs a backbone with stages; image.name={encoder.config.name} has maps of one "
            "size: use setr or upernet"
        )


def _need_tokens(encoder: ImageEncoder, head: str) -> None:
    if encoder.has_stages or not encoder.levels:
        raise EvaluationError(
            f"head {head} needs a vision transformer; image.name={encoder.config.name} is none: use unet"
        )

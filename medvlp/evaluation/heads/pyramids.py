"""Maps of several sizes out of a transformer's patch tokens, which have one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.task import EvaluationError
from medvlp.methods.base import Method


def encoder_of(method: Method) -> ImageEncoder:
    """The image encoder of a method, whose maps heads read.

    Raises:
        EvaluationError: it has none.
    """
    encoder = getattr(method, "image_encoder", None)
    if not isinstance(encoder, ImageEncoder):
        raise EvaluationError(
            f"{type(method).__name__} has no image encoder whose feature maps a head could read"
        )
    return encoder


def patch_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, P, D] patch tokens, row by row -> [B, D, rows, columns]."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


class TokenPyramid(nn.Module):
    """Four maps of the patch grid's size -> maps at 4, 2, 1 and 0.5 times it.

    Learned upsampling, no change, and max-pooling: ViTDet's "simple feature pyramid", mmsegmentation's
    `Feature2Pyramid`.
    """

    def __init__(self, width: int) -> None:
        """`width`: channels of the maps, which stay."""
        super().__init__()
        self.steps = nn.ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.GroupNorm(1, width),
                nn.GELU(),
                nn.ConvTranspose2d(width, width, 2, stride=2),
            ),
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ])  # fmt: skip

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[B, width, h, w] four times -> the same at 4, 2, 1 and 0.5 times the size."""
        return [step(of) for step, of in zip(self.steps, maps, strict=True)]

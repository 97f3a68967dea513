"""A vision transformer that can encode a part of the patches at the cost of that part."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from medvlp.config import ImageConfig
from medvlp.encoders.errors import EncoderError
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.positions import sincos_positions


class VisiblePatches(nn.Module):
    """Takes the place of timm's patch dropout: after the positions, before the blocks, drops chosen patches.

    Attributes:
        visible: [B, V] patches that stay, or None for all; set around a call of the backbone.

    Args:
        prefix: tokens before the patches (class token, registers), which always stay.
        with_indices: also return which patches stayed (models with rotary positions ask for it).
    """

    def __init__(self, prefix: int, with_indices: bool) -> None:
        super().__init__()
        self.prefix, self.with_indices = prefix, with_indices
        self.visible: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """[B, prefix + P, D] tokens -> [B, prefix + V, D]."""
        visible = self.visible
        if visible is not None:
            patches = tokens[:, self.prefix :]
            patches = patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[2]))
            tokens = torch.cat([tokens[:, : self.prefix], patches], dim=1)
        return (tokens, visible) if self.with_indices else tokens


class MaskedImageEncoder(ImageEncoder):
    """An `ImageEncoder` of a timm vision transformer that also encodes visible patches only.

    Args:
        config: the `image` section.
        image_size: side of the images in pixels, before `config.resize_to`.
        batch_norm: as for `ImageEncoder`.
        fixed_positions: replace the position embedding by fixed 2-D sin-cos positions (zero for the class
            token), whatever weights were loaded; MAE's weights hold these very positions.

    Raises:
        EncoderError: the backbone is no transformer whose patches can be dropped, takes its local features
            from an inner stage, or has no position embedding to replace.
    """

    def __init__(
        self,
        config: ImageConfig,
        image_size: int,
        batch_norm: str = "global",
        fixed_positions: bool = False,
    ) -> None:
        super().__init__(config, image_size, batch_norm)
        self._choice = self._install()
        if config.local_stage is not None:
            raise EncoderError("image.local_stage: masked images have no feature map of an inner stage")
        if fixed_positions:
            self._fix_positions()
        self._probe_masked()

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels of the prepared image."""
        return (self.config.resize_to or self.image_size) // self.grid[0]

    def forward(self, image: Tensor, attention: bool = False, visible: Tensor | None = None) -> ImageFeatures:
        """As `ImageEncoder.forward`; with `visible` the other patches never enter a block.

        Args:
            image: [B, 1, H, W].
            attention: only without `visible`.
            visible: [B, V] int64 patches, numbered row by row. `local` then is [B, V, D] in this order, and
                `grid` still that of the whole image.
        """
        if visible is None:
            return super().forward(image, attention)
        self._choice.visible = visible
        try:
            pooled, local = self.run_backbone(self.prepare(image))
        finally:
            self._choice.visible = None
        return ImageFeatures(pooled, local, self.grid)

    def _install(self) -> VisiblePatches:
        backbone: Any = self.backbone
        place = getattr(backbone, "patch_drop", backbone)
        indices = place is None or isinstance(place, PatchDropoutWithIndices)
        if not indices and not isinstance(place, nn.Identity | PatchDropout):
            raise EncoderError(
                f"image.name={self.config.name} cannot encode a part of its patches: masking needs a timm "
                "vision transformer with a sequence of patch tokens (vit_*, deit_*, eva02_*, ...)"
            )
        backbone.patch_drop = VisiblePatches(backbone.num_prefix_tokens, indices)
        chosen: VisiblePatches = backbone.patch_drop
        return chosen

    def _fix_positions(self) -> None:
        positions = getattr(self.backbone, "pos_embed", None)
        patches = self.grid[0] * self.grid[1]
        if not isinstance(positions, nn.Parameter) or positions.shape[-2] < patches:
            raise EncoderError(
                f"method.fixed_positions=true: image.name={self.config.name} has no position embedding"
            )
        try:
            fixed = sincos_positions(self.grid, positions.shape[-1])
        except ValueError as error:
            raise EncoderError(f"method.fixed_positions=true: {error}") from error
        with torch.no_grad():
            positions.zero_()
            positions[0, -patches:] = fixed
        positions.requires_grad_(False)

    @torch.no_grad()
    def _probe_masked(self) -> None:
        """Show at build time that two visible patches come out as two."""
        training = self.training
        self.eval()
        image = torch.zeros(1, self.config.in_channels, self.image_size, self.image_size)
        features = self(image, visible=torch.tensor([[0, self.grid[0] * self.grid[1] - 1]]))
        self.train(training)
        if features.local.shape[1] != 2:
            raise EncoderError(f"image.name={self.config.name} does not drop patches before its blocks")

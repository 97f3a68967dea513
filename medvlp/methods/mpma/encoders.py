"""Encoders of the visible part: a vision transformer of chosen patches, a text encoder with hidden words."""

import inspect
from typing import Any

import torch
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from medvlp.config import ImageConfig, TextConfig
from medvlp.data.batch import Text
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.positions import sincos_positions
from medvlp.encoders.text import TextEncoder, TextFeatures


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


class MaskEmbedding(nn.Module):
    """The learned embedding of a hidden token.

    Args:
        start: [E] first value.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """[B, L, E] token embeddings with those of `hidden` [B, L] bool replaced."""
        return torch.where(hidden[:, :, None], self.weight.to(embedded.dtype), embedded)


class MaskedTextEncoder(TextEncoder):
    """A `TextEncoder` that also takes reports with hidden tokens.

    A token id for [MASK] would need the tokenizer; an embedding of its own does not, and works with
    tokenizers that have no such token.

    Args:
        config: the `text` section.
        vocab_size: number of tokens of the tokenizer.
        mask_token: token whose embedding the mask embedding starts from ([MASK] of a pre-trained model);
            None: the mean of all tokens.

    Raises:
        EncoderError: as `TextEncoder`; no such token; or the model takes no embeddings instead of tokens.
    """

    def __init__(self, config: TextConfig, vocab_size: int, mask_token: int | None = None) -> None:
        super().__init__(config, vocab_size)
        if "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            raise EncoderError(f"{self._name()} takes no embeddings (inputs_embeds), so no hidden words")
        if mask_token is not None and not 0 <= mask_token < vocab_size:
            raise EncoderError(f"method.mask_token={mask_token} is none of the {vocab_size} tokens")
        table: Any = self.model.get_input_embeddings().weight.detach()
        self.mask_embedding = MaskEmbedding(table.mean(0) if mask_token is None else table[mask_token])
        self.mask_embedding.requires_grad_(not config.frozen)

    def forward(self, text: Text, attention: bool = False, hidden: Tensor | None = None) -> TextFeatures:
        """As `TextEncoder.forward`; tokens in `hidden` ([B, L] bool) enter as the mask embedding.

        `attention` is only for texts without hidden tokens.
        """
        if hidden is None:
            return super().forward(text, attention)
        self.check_length(text)
        embedded = self.model.get_input_embeddings()(text.input_ids)
        return self._features(text, self.mask_embedding(embedded, hidden))

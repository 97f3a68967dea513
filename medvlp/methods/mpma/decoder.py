"""The decoder of masked images: pixels of the hidden patches from the encoded visible ones."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.positions import sincos_positions
from medvlp.methods.mpma.fusion import FusionLayer, check_heads
from medvlp.methods.mpma.masking import PatchMask


class ImageDecoder(nn.Module):
    """A narrow transformer over visible tokens and mask tokens (MAE, He et al., CVPR 2022, section 3).

    Args:
        image_width: of the encoder's tokens.
        grid: (rows, columns) of the patches.
        pixels: numbers to predict for each patch.
        width, layers, heads: of the decoder.
        report_width: width of report tokens that every layer also attends to; None: none (the default of
            our reconstruction).

    Raises:
        EncoderError: a width that is no multiple of 4 or of the heads.
    """

    def __init__(
        self,
        image_width: int,
        grid: tuple[int, int],
        pixels: int,
        width: int = 512,
        layers: int = 8,
        heads: int = 16,
        report_width: int | None = None,
    ) -> None:
        super().__init__()
        check_heads("method.decoder_heads", heads, width)
        self.embed = nn.Linear(image_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        try:
            positions = sincos_positions(grid, width)
        except ValueError as error:
            raise EncoderError(f"method.decoder_width: {error}") from error
        self.positions: Tensor
        self.register_buffer("positions", positions, persistent=False)
        self.reads_report = report_width is not None
        self.layers = nn.ModuleList(
            Block(width, heads, qkv_bias=True)
            if report_width is None
            else FusionLayer(width, report_width, heads, 4 * width)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, pixels)

    def forward(
        self,
        image: Tensor,
        mask: PatchMask,
        report: Tensor | None = None,
        report_mask: Tensor | None = None,
    ) -> Tensor:
        """Predicted pixels of the hidden patches.

        Args:
            image: [B, 1 + V, image_width] class token and visible patches in the order of `mask.visible`.
            mask: which patches those are, and which are hidden.
            report: [B, L, report_width] and report_mask [B, L] bool, for a decoder that reads the report.

        Returns:
            [B, H, pixels] in the order of `mask.hidden`.
        """
        tokens = self.embed(image)
        width = tokens.shape[2]
        patches = torch.cat([mask.visible, mask.hidden], dim=1)
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), mask.hidden.shape[1], width)
        # The order of tokens means nothing to a transformer: hidden patches simply come last.
        placed = torch.cat([tokens[:, 1:], hidden], dim=1) + self.positions.to(tokens.dtype)[patches]
        tokens = torch.cat([tokens[:, :1], placed], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, report, None, report_mask) if self.reads_report else layer(tokens)
        predicted: Tensor = self.pixels(self.norm(tokens[:, tokens.shape[1] - hidden.shape[1] :]))
        return predicted

"""Reconstruction of hidden patches and hidden words."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.normalise import at_least_float32


def patch_targets(image: Tensor, side: int, normalise: bool = True, epsilon: float = 1e-6) -> Tensor:
    """Cut images into patches of pixels.

    Args:
        image: [B, C, H, W]; H and W are multiples of `side`.
        side: of a patch in pixels.
        normalise: give every patch mean 0 and variance 1 (unbiased, plus `epsilon`).

    Returns:
        [B, P, side * side * C] float32 or better; patches row by row, in each the pixels row by row, the
        channels of a pixel together. (MAE section 3, "normalized pixels".)
    """
    batch, channels, height, width = image.shape
    cut = at_least_float32(image).reshape(batch, channels, height // side, side, width // side, side)
    patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if normalise:
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        patches = (patches - mean) / (variance + epsilon).sqrt()
    return patches


def masked_patch_loss(predicted: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the pixels of the hidden patches.

    Args:
        predicted: [B, H, X] pixels of the hidden patches.
        targets: [B, P, X] pixels of all patches.
        hidden: [B, H] int64 numbers of the hidden patches.

    Returns:
        0-d loss; 0 without hidden patches.
    """
    wanted = targets.gather(1, hidden[:, :, None].expand(-1, -1, targets.shape[2]))
    total = (at_least_float32(predicted) - wanted).square().sum()
    return total / max(1, wanted.numel())


def masked_token_loss(logits: Tensor, tokens: Tensor, hidden: Tensor, count: Tensor | None = None) -> Tensor:
    """Cross entropy of the hidden tokens, and of no others.

    Args:
        logits: [..., V] (V may exceed the vocabulary).
        tokens: [...] int64 true tokens. hidden: [...] bool.
        count: 0-d, what the sum is divided by (the mean number of hidden tokens of a rank, so that the mean
            over ranks is that of all tokens); default: the hidden tokens here.

    Returns:
        0-d loss; 0 without hidden tokens.
    """
    if count is None:
        count = hidden.sum()
    target = tokens.masked_fill(~hidden, -100)
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, -2), target.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / count.to(total.dtype).clamp(min=torch.finfo(total.dtype).tiny)


@torch.no_grad()
def right_tokens(logits: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
    """How many hidden tokens have the highest logit; 0-d. Arguments as in `masked_token_loss`."""
    return ((logits.argmax(-1) == tokens) & hidden).sum()

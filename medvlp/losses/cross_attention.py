"""Token-wise alignment: words attend to patches, patches to words, and each token finds its own context."""

from __future__ import annotations

import torch
from torch import Tensor

from medvlp.losses.diagonal_contrast import diagonal_contrast
from medvlp.losses.normalise import unit_norm


@torch.no_grad()
def clamped_weights(attention: Tensor, valid: Tensor, quantile: float = 0.1) -> Tensor:
    """Attention as weights of tokens: outliers clamped, sum 1 per sample.

    Args:
        attention: [B, N] non-negative attention to each token.
        valid: [B, N] bool; other tokens get weight 0 and do not enter the quantiles.
        quantile: entries are clamped to the [quantile, 1 - quantile] range of the sample's valid entries
            (linear interpolation); 0 clamps nothing.

    Returns:
        [B, N] float32 or float64 weights; a sample without valid tokens (or attention) has all zeros.
        (MGCA section 3.2, with the clamping of the published code.)
    """
    values = attention if attention.dtype == torch.float64 else attention.float()
    known = values.masked_fill(~valid, torch.nan)
    limits = torch.tensor([quantile, 1 - quantile], dtype=values.dtype, device=values.device)
    low, high = known.nanquantile(limits, dim=1, keepdim=True)
    weights = known.clamp(min=low, max=high).nan_to_num(nan=0.0)
    total = weights.sum(1, keepdim=True)
    return weights / total.clamp(min=torch.finfo(weights.dtype).tiny)


def own_context_loss(
    tokens: Tensor, context: Tensor, weights: Tensor, valid: Tensor | None = None, temperature: float = 0.1
) -> Tensor:
    """InfoNCE in both directions between the tokens of a sample and their contexts, weighted over tokens.

    Args:
        tokens: [B, N, D] unit-norm tokens.
        context: [B, N, D] what each token gathered from the other modality, no longer than 1.
        weights: [B, N] weight of each token.
        valid: [B, N] bool; other tokens are no negatives. None: all are.
        temperature: of the contrast.

    Returns:
        0-d loss: mean over samples of half the weighted sum of both directions.
    """
    return 0.5 * (weights * diagonal_contrast(tokens, context, valid, temperature)).sum(1).mean()


def word_loss(
    words: Tensor,
    patches: Tensor,
    weights: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.1,
    attention_temperature: float = 0.1,
) -> Tensor:
    """Words attend to the patches; each word must find its own context among the words of its report.

    Args:
        words: [B, W, D] unit-norm word embeddings.
        patches: [B, P, D] unit-norm patch embeddings.
        weights: [B, W] weight of each word, from `clamped_weights`.
        negatives: [B, W] bool, word slots that act as negatives; None: all slots (published code).
        temperature: of the contrast; attention_temperature: of the attention.

    Returns:
        0-d loss. (MGCA section 3.2 without learned projections, as in the published code.)
    """
    attention = (words @ patches.transpose(1, 2) / attention_temperature).softmax(2)
    return own_context_loss(words, unit_norm(attention @ patches), weights, negatives, temperature)


def patch_loss(
    patches: Tensor,
    words: Tensor,
    weights: Tensor,
    valid: Tensor,
    normalise_context: bool = True,
    temperature: float = 0.1,
    attention_temperature: float = 0.1,
) -> Tensor:
    """Patches attend to the words; each patch must find its own context among the patches of its image.

    Args:
        patches: [B, P, D] unit-norm patch embeddings.
        words: [B, W, D] unit-norm word embeddings.
        weights: [B, P] weight of each patch.
        valid: [B, W] bool, words that can be attended to. A sample without any adds 0.
        normalise_context: scale the contexts to length 1 (the published code does so for ResNet only).
        temperature: of the contrast; attention_temperature: of the attention.

    Returns:
        0-d loss. (MGCA section 3.2.)
    """
    some = valid.any(1)
    attended = valid | ~some[:, None]
    scores = patches @ words.transpose(1, 2) / attention_temperature
    attention = scores.masked_fill(~attended[:, None, :], -torch.inf).softmax(2)
    context = attention @ words
    if normalise_context:
        context = unit_norm(context)
    return own_context_loss(patches, context, weights * some[:, None], None, temperature)

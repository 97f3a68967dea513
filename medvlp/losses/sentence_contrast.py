"""Contrast of the sentences of one report with what each of them sees in the image."""

from __future__ import annotations

from torch import Tensor

from medvlp.losses.cross_attention import own_context_loss


def sentence_contrast(sentences: Tensor, context: Tensor, valid: Tensor) -> Tensor:
    """InfoNCE in both directions between sentences and their contexts, inside each report.

    Args:
        sentences: [B, S, D] unit vectors times the inverse temperature.
        context: [B, S, D] unit vectors, the context of each sentence.
        valid: [B, S] bool, slots that hold a sentence.

    Returns:
        0-d loss: mean over reports of the mean over their sentences. Reports of one sentence, or of none,
        add 0. (PRIOR section 3.2, local text loss.)
    """
    weights = valid.to(sentences.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return own_context_loss(sentences, context, weights, valid, temperature=1.0)

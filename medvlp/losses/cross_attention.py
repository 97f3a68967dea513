"""Token-wise alignment: words attend to patches, patches to words, and each token finds its own context."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medvlp.losses.normalise import unit_norm
from medvlp.losses.parts import MEMORY, mean_in_parts


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
    limits = values.new_full((2,), quantile)  # filled there: a copy from the host waits for the device
    limits[1].fill_(1 - quantile)
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
    memory: float = MEMORY,
) -> Tensor:
    """Words attend to the patches; each word must find its own context among the words of its report.

    Args:
        words: [B, W, D] unit-norm word embeddings.
        patches: [B, P, D] unit-norm patch embeddings.
        weights: [B, W] weight of each word, from `clamped_weights`.
        negatives: [B, W] bool, word slots that act as negatives; None: all slots (published code).
        temperature: of the contrast; attention_temperature: of the attention.
        memory: MiB of a matrix of tokens that is made at once, of as many samples as that takes.

    Returns:
        0-d loss. (MGCA section 3.2 without learned projections, as in the published code.)
    """

    def part(
        start: int, words: Tensor, patches: Tensor, weights: Tensor, negatives: Tensor | None
    ) -> tuple[Tensor]:
        attention = (words / attention_temperature @ patches.transpose(1, 2)).softmax(2)
        context = unit_norm(attention @ patches)
        return (own_context_loss(words, context, weights, negatives, temperature),)

    width = words.shape[1] * max(words.shape[1], patches.shape[1])
    return mean_in_parts(part, (words, patches, weights, negatives), width, memory)[0]


def patch_loss(
    patches: Tensor,
    words: Tensor,
    weights: Tensor,
    valid: Tensor,
    normalise_context: bool = True,
    temperature: float = 0.1,
    attention_temperature: float = 0.1,
    memory: float = MEMORY,
) -> Tensor:
    """Patches attend to the words; each patch must find its own context among the patches of its image.

    Args:
        patches: [B, P, D] unit-norm patch embeddings.
        words: [B, W, D] unit-norm word embeddings.
        weights: [B, P] weight of each patch.
        valid: [B, W] bool, words that can be attended to. A sample without any adds 0.
        normalise_context: scale the contexts to length 1 (the published code does so for ResNet only).
        temperature: of the contrast; attention_temperature: of the attention.
        memory: see `word_loss`.

    Returns:
        0-d loss. (MGCA section 3.2.)
    """

    def part(start: int, patches: Tensor, words: Tensor, weights: Tensor, valid: Tensor) -> tuple[Tensor]:
        some = valid.any(1)
        # Added, not filled in: the way back through a sum costs nothing.
        unseen = words.new_zeros(valid.shape).masked_fill_(some[:, None] & ~valid, -torch.inf)
        scores = torch.baddbmm(unseen[:, None], patches, (words / attention_temperature).transpose(1, 2))
        attention = scores.softmax(2)
        context = attention @ words
        if normalise_context:
            context = unit_norm(context)
        return (own_context_loss(patches, context, weights * some[:, None], None, temperature),)

    width = patches.shape[1] * max(words.shape[1], patches.shape[1])
    return mean_in_parts(part, (patches, words, weights, valid), width, memory)[0]


def diagonal_contrast(tokens: Tensor, context: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    """Sum of both directions of InfoNCE, for every token of every sample.

    Args:
        tokens, context: [B, N, D], rows no longer than 1; context i belongs to token i.
        valid: [B, N] bool, the candidates of each other; every token is its own candidate. None: all are.
        temperature: positive.

    Returns:
        [B, N]: -log softmax over the contexts of token i, plus -log softmax over the tokens of context i.
    """
    # Similarities span at most 2 / temperature: below this limit no row of exponentials can underflow.
    limit = -0.5 * math.log(torch.finfo(tokens.dtype).tiny)
    if 2 / temperature < limit:
        loss: Tensor = _SharedExponentials.apply(tokens, context, valid, temperature)
        return loss
    return contrast_of_logits(tokens @ context.transpose(1, 2) / temperature, valid)


def contrast_of_logits(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """As `diagonal_contrast`, from logits of any size: where the host does not know the temperature.

    Args:
        logits: [B, N, N] of token i (rows) with context j (columns).
        valid: [B, N] bool, as in `diagonal_contrast`.

    Returns:
        [B, N]; 0 at what is not valid.
    """
    if valid is not None:
        pairs = valid[:, :, None] & valid[:, None, :]
        # Every token keeps itself, so that rows of padding are 0 instead of infinite.
        itself = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~(pairs | itself), -torch.inf)
    own = logits.diagonal(dim1=1, dim2=2)
    return (logits.logsumexp(2) - own) + (logits.logsumexp(1) - own)


class _SharedExponentials(torch.autograd.Function):
    """Rows and columns share exp(logit - 1 / temperature).

    Autograd over two logsumexp would compute the [B, N, N] exponentials four times; they are most of the
    cost beside the products.
    """

    @staticmethod
    def forward(
        context_: Any, tokens: Tensor, context: Tensor, valid: Tensor | None, temperature: float
    ) -> Tensor:
        # Without the usual maximum before exp(): `diagonal_contrast` has made sure that nothing overflows.
        exponentials = torch.baddbmm(
            tokens.new_empty(()), tokens, context.transpose(1, 2), beta=0, alpha=1 / temperature
        ).exp_()
        if valid is not None:
            exponentials *= valid[:, :, None]
            exponentials *= valid[:, None, :]
        own = exponentials.diagonal(dim1=1, dim2=2)
        rows, columns = exponentials.sum(2), exponentials.sum(1)
        if valid is not None:
            own, rows, columns = (values.where(valid, 1.0) for values in (own, rows, columns))
        context_.save_for_backward(tokens, context, valid, exponentials, rows, columns)
        context_.temperature = temperature
        # Quotients: a sum is never below its own part, so that not even rounding makes the loss negative.
        return -(own / rows).log() - (own / columns).log()

    @staticmethod
    @once_differentiable
    def backward(context_: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        tokens, context, valid, exponentials, rows, columns = context_.saved_tensors
        gradient = gradient / context_.temperature
        if valid is not None:
            gradient = gradient.where(valid, 0.0)
        to_logits = (gradient / rows)[:, :, None] + (gradient / columns)[:, None, :]
        to_logits *= exponentials
        to_logits.diagonal(dim1=1, dim2=2).sub_(2 * gradient)
        return to_logits @ context, to_logits.transpose(1, 2) @ tokens, None, None

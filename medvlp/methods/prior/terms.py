"""PRIOR's terms as functions of tensors: SimSiam, sentences and their contexts, sets, prototype scores."""

from collections.abc import Callable

import torch
from torch import Tensor

from medvlp.losses.cross_attention import contrast_of_logits
from medvlp.losses.matching import match
from medvlp.losses.normalise import at_least_float32, paired_cosine


def simsiam(first: Tensor, second: Tensor, first_predicted: Tensor, second_predicted: Tensor) -> Tensor:
    """Symmetric SimSiam loss of each pair of vectors.

    Args:
        first, second: [..., D] the two views.
        first_predicted, second_predicted: [..., D] the predictor's outputs for them.

    Returns:
        [...] losses in [-1, 1]. (Chen & He 2021; PRIOR section 3.2 for patches and their contexts.)
    """
    return -0.5 * (paired_cosine(first_predicted, second) + paired_cosine(second_predicted, first))


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
    losses = contrast_of_logits(sentences @ context.transpose(1, 2), valid)
    return 0.5 * (weights * losses).sum(1).mean()


def reorder(predicted: Tensor, target: Tensor, wrong_permutation: bool = False) -> Tensor:
    """Put the predictions of each sample into the order of the targets they match.

    The pairs have the least sum of L1 distances (`match`, which waits for the device once); the choice gets
    no gradient.

    Args:
        predicted, target: [B, N, D].
        wrong_permutation: apply the permutation where its inverse belongs (PRIOR's published code).

    Returns:
        [B, N, D] predictions, row j the one for target j.
    """
    with torch.no_grad():
        cost = torch.cdist(at_least_float32(predicted), at_least_float32(target), p=1)
        everything = torch.ones(cost.shape[0], cost.shape[2], dtype=torch.bool, device=cost.device)
        order = match(cost, everything)
        if wrong_permutation:
            order = order.argsort(1)
    return predicted.gather(1, order[:, :, None].expand_as(predicted))


def set_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of each sample's set to its target, both in one order.

    Args:
        predicted, target: [B, N, D].

    Returns:
        [B] distances in float32 or better.
    """
    return (at_least_float32(predicted) - at_least_float32(target)).abs().mean((1, 2))


def masked_mean(
    values: Tensor, valid: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean of the valid entries; 0 without any.

    Args:
        values: [B, S]. valid: [B, S] bool.
        mean_over_ranks: mean of a 0-d tensor over ranks, without gradient. With it the denominator is the
            mean number of valid entries per rank, so that the mean of the results over ranks (and of their
            gradients) is that of all ranks' entries together; None: of this rank's alone.

    Returns:
        0-d mean.
    """
    count = valid.sum().to(values.dtype)
    if mean_over_ranks is not None:
        count = mean_over_ranks(count)
    total = values.masked_fill(~valid, 0).sum()
    return total / torch.where(count > 0, count, torch.ones_like(count))


def score_divergence(target_scores: Tensor, scores: Tensor) -> Tensor:
    """KL(p || q) of each row, p = softmax(target_scores) and q = softmax(scores); both sides get gradient.

    Args:
        target_scores, scores: [..., K].

    Returns:
        [...] divergences in nats, at least 0. (The "kl" loss of PRIOR's published code.)
    """
    target = at_least_float32(target_scores).log_softmax(-1)
    predicted = at_least_float32(scores).log_softmax(-1)
    return (target.exp() * (target - predicted)).sum(-1)

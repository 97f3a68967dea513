"""Losses on the anatomy-observation matrix of a report: existence, prototype contrast, relation.

A matrix M [B, A, P] holds 1 (present), 0 (absent) and -1 (not mentioned) for A anatomies and P observations
("pathologies"). Every loss is a mean over the entries it applies to; `count` replaces their number, so that
several ranks can divide by a common one. Without any entry a loss is 0 with zero gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.normalise import at_least_float32


def existence_labels(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a report mentions each observation and each anatomy at all.

    Args:
        matrix: [B, A, P].

    Returns:
        [B, P] and [B, A] in the type of the matrix: 1 where any cell is present, else 0 where any is absent,
        else -1.
    """
    return matrix.amax(1), matrix.amax(2)


def existence_loss(logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of "absent" and "present" over the entries with a label.

    Args:
        logits: [B, N, 2], absent and present.
        labels: [B, N]: 1, 0, or -1 for entries that do not count.
        count: what to divide by; default: the number of labels of 0 and 1.

    Returns:
        0-d loss. (MeDSLIP, published code: `loss_ce`.)
    """
    known = labels >= 0
    losses = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), labels.clamp(min=0).flatten().long(), reduction="none"
    )
    return _mean(losses, known.flatten(), count)


@torch.no_grad()
def sample_negatives(positives: Tensor, number: int) -> Tensor:
    """Draw candidates that are not positive, without replacement, each with equal chance.

    Args:
        positives: [..., N] bool.
        number: how many to draw for each row.

    Returns:
        [..., min(number, N)] int64 candidates; -1 where a row has fewer. Draws come from torch's default
        generator of the device.
    """
    keys = torch.rand(positives.shape, device=positives.device).masked_fill(positives, -1.0)
    highest, candidates = keys.topk(min(number, positives.shape[-1]), dim=-1)
    return candidates.masked_fill(highest < 0, -1)


def prototype_contrast(
    products: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float = 1.0,
    gram: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each query's prototype (the mean text embedding of its positives) against negatives.

    A product with a prototype is a mean of products with single texts, so neither prototypes nor a
    [B, N, M, D] table is made.

    Args:
        products: [B, N, M] dot products of queries with the M texts of the other vocabulary.
        positives: [B, N, M] bool; queries without any do not count.
        negatives: [B, N, K] int64 texts; -1: none.
        temperature: positive; divides the products.
        gram: [M, M] cosines of the texts with each other; given when `products` are cosines, and then those
            with the prototypes are too. None: dot products (published, at temperature 1).
        count: what to divide by; default: the number of queries with a positive.

    Returns:
        0-d loss. (MeDSLIP "ProtoCL".)
    """
    products = at_least_float32(products)
    weights = positives.to(products.dtype)
    number = weights.sum(-1)
    weights = weights / number.clamp(min=1)[..., None]
    positive = (products * weights).sum(-1)
    if gram is not None:
        squared_length = ((weights @ gram.to(products.dtype)) * weights).sum(-1)
        positive = positive * squared_length.clamp(min=1e-12).rsqrt()
    negative = products.gather(-1, negatives.clamp(min=0)).masked_fill(negatives < 0, -torch.inf)
    logits = torch.cat([positive[..., None], negative], -1) / temperature
    return _mean(logits.logsumexp(-1) - logits[..., 0], number > 0, count)


def relation_scores(anatomies: Tensor, observations: Tensor) -> Tensor:
    """[B, A, D] and [B, P, D] decoder outputs -> [B, A, P] dot products, in float32 or better."""
    return at_least_float32(anatomies) @ at_least_float32(observations).transpose(1, 2)


def relation_loss(scores: Tensor, matrix: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of cells, over those the report mentions.

    Args:
        scores: [B, A, P] logits of "present".
        matrix: [B, A, P]; not changed.
        count: what to divide by; default: the number of cells of 0 and 1.

    Returns:
        0-d loss. (MeDSLIP "ICL", intra-image contrastive learning.)
    """
    scores = at_least_float32(scores)
    target = (matrix > 0).to(scores.dtype)
    losses = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    return _mean(losses, matrix >= 0, count)


def _mean(losses: Tensor, counted: Tensor, count: Tensor | None) -> Tensor:
    """Sum of the counted losses over `count` (default: their number), 0 where that is 0."""
    total = losses.masked_fill(~counted, 0.0).sum()
    count = counted.sum() if count is None else count
    return total / torch.where(count > 0, count, 1)

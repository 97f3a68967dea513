"""Observations of an image against the sentences of its report: pairing, contrast, diversity."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from medvlp.losses.matching import match
from medvlp.losses.normalise import unit_norm


class ObservationPairs(NamedTuple):
    """Sentences and what the image says to each.

    Attributes:
        image: [B, S, D] unit-norm observation of the image paired with each sentence.
        text: [B, S, D] unit-norm sentences.
        kept: [B, S] bool, sentences that have a pair.
    """

    image: Tensor
    text: Tensor
    kept: Tensor


def hungarian_pairs(observations: Tensor, sentences: Tensor, valid: Tensor) -> ObservationPairs:
    """Pair each sentence with an observation of its own so that the summed cosine is greatest.

    Args:
        observations: [B, M, D] unit-norm, of the image.
        sentences: [B, S, D] unit-norm. valid: [B, S] bool, slots that hold a sentence.

    Returns:
        The pairs; of more than M sentences the first M have one. No gradient flows through the choice.
    """
    chosen = match(-(observations @ sentences.transpose(1, 2)), valid)
    index = chosen.clamp(min=0)[:, :, None].expand(-1, -1, observations.shape[2])
    return ObservationPairs(observations.gather(1, index), sentences, chosen >= 0)


def soft_pairs(
    observations: Tensor, sentences: Tensor, valid: Tensor, temperature: float = 0.1
) -> ObservationPairs:
    """Pair each sentence with a mixture of the observations, weighted by how alike they are.

    Args:
        observations, sentences, valid: as in `hungarian_pairs`.
        temperature: of the softmax over the observations.

    Returns:
        The pairs; every valid sentence has one.
    """
    weights = (sentences @ observations.transpose(1, 2) / temperature).softmax(2)
    return ObservationPairs(unit_norm(weights @ observations), sentences, valid)


@torch.no_grad()
def allowed_negatives(
    text: Tensor, others: Tensor, others_kept: Tensor, threshold: float | None = 0.9
) -> Tensor:
    """Which candidates may be negatives of which sentence: those that do not say the same.

    Args:
        text: [..., N, D] unit-norm sentences. others: [..., C, D] unit-norm sentences of the candidates.
        others_kept: [..., C] bool, candidates that exist.
        threshold: candidates whose sentence has a greater cosine with the anchor's are no negatives (normal
            findings are worded alike in most reports); None keeps them.

    Returns:
        [..., N, C] bool.
    """
    kept = others_kept[..., None, :].expand(*others_kept.shape[:-1], text.shape[-2], -1)
    if threshold is None:
        return kept
    return kept & (text @ others.transpose(-1, -2) <= threshold)


def observation_contrast(
    pairs: ObservationPairs,
    candidates: ObservationPairs,
    allowed: Tensor,
    own: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    """InfoNCE between sentences and their observations, half of it in each direction.

    Args:
        pairs: N anchors with any leading dimensions: [..., N, D], [..., N, D], [..., N].
        candidates: C candidates for each, with the same leading dimensions.
        allowed: [..., N, C] bool, candidates that act as negatives, from `allowed_negatives`.
        own: [N] position of each anchor among the candidates; its own pair always takes part.
        temperature: of the contrast.

    Returns:
        [..., N] loss of each anchor, 0 for those that are not kept. (PLACE's "pathological-level cross-modal
        alignment"; the paper's formula is not public, this form is our reconstruction.)
    """
    itself = torch.zeros_like(allowed).scatter(-1, own.expand(allowed.shape[:-1])[..., None], True)
    excluded = ~(allowed | itself)

    def direction(anchors: Tensor, others: Tensor) -> Tensor:
        logits = (anchors @ others.transpose(-1, -2) / temperature).masked_fill(excluded, -torch.inf)
        return logits.logsumexp(-1) - (anchors * others[..., own, :]).sum(-1) / temperature

    both = direction(pairs.text, candidates.image) + direction(pairs.image, candidates.text)
    return 0.5 * both * pairs.kept


def mean_of_reports(losses: Tensor, kept: Tensor) -> Tensor:
    """[B, S] losses of sentences -> 0-d mean over the kept ones of a report, then over reports.

    A report without any adds 0. So the mean over ranks with equally many reports is the global one.
    """
    return ((losses * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


def diversity_penalty(observations: Tensor) -> Tensor:
    """Mean squared cosine between different observations of an image, 0-d in [0, 1].

    Keeps the queries from all finding the same. (Our reconstruction.)

    Args:
        observations: [B, M, D] unit-norm; a single one has penalty 0.
    """
    count = observations.shape[1]
    squares = (observations @ observations.transpose(1, 2)).square()
    itself = torch.eye(count, dtype=torch.bool, device=observations.device)
    return squares.masked_fill(itself, 0.0).sum((1, 2)).mean() / max(1, count * (count - 1))

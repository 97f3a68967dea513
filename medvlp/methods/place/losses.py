"""PLACE's contrastive losses on embeddings, over one rank or all of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.losses.cross_attention import patch_loss, word_loss
from medvlp.losses.normalise import unit_norm
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.place.terms import (
    ObservationPairs,
    alike,
    hungarian_pairs,
    mean_of_reports,
    observation_contrast,
    soft_pairs,
)


class Sentences(NamedTuple):
    """The sentences of a batch of reports; S is the same on all ranks, so that they can be gathered.

    Attributes:
        embeddings: [B, S, D] unit-norm. valid: [B, S] bool, slots that hold one.
        identity: [B, S] int64, see `medvlp.encoders.words.sentence_identity`.
        features: [B, S, F] of the text encoder, without gradient; None where they decide nothing.
    """

    embeddings: Tensor
    valid: Tensor
    identity: Tensor
    features: Tensor | None = None


def observation_terms(
    observations: Tensor,
    sentences: Sentences,
    soft: bool,
    config: PLACEConfig,
    excluded: Tensor | None = None,
) -> dict[str, Tensor]:
    """Contrast between the observations of images and the sentences of their reports.

    Args:
        observations: [B, M, D] unit-norm.
        sentences: of the reports.
        soft: soft matching instead of the Hungarian one.
        config: keys of the method.
        excluded: [B, N] bool, samples whose sentences and observations are no negatives of each other (see
            `instance_contrast`). Inside a report there is nothing but `config.false_negatives`.

    Returns:
        "loss/observation"; "observation/similarity": mean cosine of the pairs; "observation/excluded":
        share of the other pairs that are no negatives because their sentences or samples say the same.
    """
    embeddings, valid = sentences[:2]
    if soft:
        pairs = soft_pairs(observations, embeddings, valid, config.assignment_temperature)
    else:
        pairs = hungarian_pairs(observations, embeddings, valid)
    batch, slots = valid.shape
    own = torch.arange(slots, device=valid.device)
    anchors = candidates = pairs
    if config.negative_scope == "batch":
        anchors = candidates = ObservationPairs(*(field.flatten(0, 1) for field in pairs))
        own = torch.arange(batch * slots, device=valid.device)
        if config.negatives == "global":
            candidates = ObservationPairs(
                distributed.gather_with_gradient(anchors.image),
                distributed.gather_with_gradient(anchors.text),
                distributed.gather_rows(anchors.kept.byte()).bool(),
            )
            own = own + distributed.rank() * batch * slots
    allowed = candidates.kept[..., None, :].expand(*anchors.kept.shape, -1)
    if config.false_negatives != "keep":
        allowed = allowed & ~_same(sentences, candidates.kept, config)
    if excluded is not None and config.negative_scope == "batch":
        allowed = allowed & ~of_samples(excluded, slots)
    losses = observation_contrast(anchors, candidates, allowed, own, config.observation_temperature)
    similarity = (pairs.image * pairs.text).sum(2).detach()
    return {
        "loss/observation": mean_of_reports(losses.view(batch, slots), pairs.kept),
        "observation/similarity": mean_of_reports(similarity, pairs.kept),
        "observation/excluded": _share_excluded(anchors.kept, candidates.kept, allowed, own),
    }


def _same(sentences: Sentences, kept: Tensor, config: PLACEConfig) -> Tensor:
    """[..., N, C] bool, candidates that say what the anchor says; `kept` [..., C] are those that exist."""

    def spread(values: Tensor) -> tuple[Tensor, Tensor]:
        """A value of each sentence, of the anchors and of the candidates."""
        if config.negative_scope == "report":
            return values, values
        values = values.flatten(0, 1)
        return values, distributed.gather_rows(values) if config.negatives == "global" else values

    own, others = spread(sentences.identity)
    same = own[..., :, None] == others[..., None, :]
    if sentences.features is not None:
        limits = config.false_negative_threshold, config.false_negative_share
        same = same | alike(*spread(sentences.features), kept, *limits)
    return same


def token_terms(patches: Tensor, words: Tensor, valid: Tensor, config: PLACEConfig) -> dict[str, Tensor]:
    """MGCA's word and patch losses with equal weights of all words and of all patches.

    Args:
        patches: [B, P, D], words: [B, W, D], not normalised. valid: [B, W] bool.
    """
    patches, words = unit_norm(patches), unit_norm(words)
    word_weights = valid / valid.sum(1, keepdim=True).clamp(min=1)
    patch_weights = patches.new_full(patches.shape[:2], 1.0 / patches.shape[1])
    temperatures = (config.token_temperature, config.attention_temperature)
    return {
        "loss/word": word_loss(words, patches, word_weights, valid, *temperatures),
        "loss/patch": patch_loss(patches, words, patch_weights, valid, True, *temperatures),
    }


def of_samples(pairs: Tensor, slots: int) -> Tensor:
    """[B, N] bool of samples -> [B * slots, N * slots] of what each of them holds `slots` of."""
    rows, columns = pairs.shape
    spread = pairs[:, None, :, None].expand(rows, slots, columns, slots)
    return spread.reshape(rows * slots, columns * slots)


def _share_excluded(kept: Tensor, candidates: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
    """0-d share of existing (anchor, other candidate) pairs that are not `allowed`."""
    others = kept[..., :, None] & candidates[..., None, :]
    others = others.scatter(-1, own.expand(kept.shape)[..., None], False)
    return (others & ~allowed).sum() / others.sum().clamp(min=1)

"""PLACE's contrastive losses on embeddings, over one rank or all of them."""

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.losses.cross_attention import patch_loss, word_loss
from medvlp.losses.normalise import unit_norm
from medvlp.losses.parts import parts_of, recomputed
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
    whole = config.negative_scope == "batch"
    said, others = _spread(sentences, config)

    def part(start: int, rows: ObservationPairs, said: _Said, excluded: Tensor | None) -> tuple[Tensor, ...]:
        """Of some anchors: losses, how many other candidates there are, and how many are no negatives."""
        allowed = candidates.kept[..., None, :].expand(*rows.kept.shape, -1)
        if config.false_negatives != "keep":
            allowed = allowed & ~_same(said, others, candidates.kept, config)
        if excluded is not None and whole:
            allowed = allowed & ~of_samples(excluded, slots)
        place = own[start : start + rows.kept.shape[-1]]
        losses = observation_contrast(rows, candidates, allowed, place, config.observation_temperature)
        return losses, *_count_excluded(rows.kept, candidates.kept, allowed, place)

    # All sentences of a sample stay together: samples are what `excluded` speaks of.
    parts = (
        parts_of(batch, slots * candidates.kept.shape[-1], config.loss_memory) if whole else [slice(batch)]
    )
    found = []
    for samples in parts:
        at = slice(samples.start * slots, samples.stop * slots) if len(parts) > 1 else slice(None)
        arguments = (
            at.start or 0,
            ObservationPairs(*(field[at] for field in anchors)),
            said.map(itemgetter(at)),
            excluded if excluded is None or len(parts) == 1 else excluded[samples],
        )
        found.append(part(*arguments) if len(parts) == 1 else recomputed(part, *arguments))
    losses = torch.cat([of_part[0] for of_part in found])
    there, left_out = (torch.stack([of_part[n] for of_part in found]).sum() for n in (1, 2))
    similarity = (pairs.image * pairs.text).sum(2).detach()
    return {
        "loss/observation": mean_of_reports(losses.view(batch, slots), pairs.kept),
        "observation/similarity": mean_of_reports(similarity, pairs.kept),
        "observation/excluded": left_out / there.clamp(min=1),
    }


class _Said(NamedTuple):
    """What decides whether sentences say the same: `identity` and `features` of `Sentences`."""

    identity: Tensor
    features: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Said":
        return _Said(function(self.identity), None if self.features is None else function(self.features))


def _spread(sentences: Sentences, config: PLACEConfig) -> tuple[_Said, _Said]:
    """What is said by the anchors and by the candidates."""
    said = _Said(sentences.identity, sentences.features)
    if config.negative_scope == "report":
        return said, said
    said = said.map(lambda value: value.flatten(0, 1))
    if config.false_negatives == "keep" or config.negatives == "local":
        return said, said
    return said, said.map(distributed.gather_rows)


def _same(said: _Said, others: _Said, kept: Tensor, config: PLACEConfig) -> Tensor:
    """[..., N, C] bool, candidates that say what the anchor says; `kept` [..., C] are those that exist."""
    same = said.identity[..., :, None] == others.identity[..., None, :]
    if said.features is not None and others.features is not None:
        limits = config.false_negative_threshold, config.false_negative_share
        same = same | alike(said.features, others.features, kept, *limits)
    return same


def token_terms(patches: Tensor, words: Tensor, valid: Tensor, config: PLACEConfig) -> dict[str, Tensor]:
    """MGCA's word and patch losses with equal weights of all words and of all patches.

    Args:
        patches: [B, P, D], words: [B, W, D], not normalised. valid: [B, W] bool.
    """
    patches, words = unit_norm(patches), unit_norm(words)
    word_weights = valid / valid.sum(1, keepdim=True).clamp(min=1)
    patch_weights = patches.new_full(patches.shape[:2], 1.0 / patches.shape[1])
    temperatures, memory = (config.token_temperature, config.attention_temperature), config.loss_memory
    return {
        "loss/word": word_loss(words, patches, word_weights, valid, *temperatures, memory),
        "loss/patch": patch_loss(patches, words, patch_weights, valid, True, *temperatures, memory),
    }


def of_samples(pairs: Tensor, slots: int) -> Tensor:
    """[B, N] bool of samples -> [B * slots, N * slots] of what each of them holds `slots` of."""
    rows, columns = pairs.shape
    spread = pairs[:, None, :, None].expand(rows, slots, columns, slots)
    return spread.reshape(rows * slots, columns * slots)


@torch.no_grad()
def _count_excluded(kept: Tensor, candidates: Tensor, allowed: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """How many (anchor, other candidate) pairs exist, and how many of them are not `allowed`, 0-d each."""
    others = kept[..., :, None] & candidates[..., None, :]
    others = others.scatter(-1, own.expand(kept.shape)[..., None], False)
    return others.sum(), (others & ~allowed).sum()

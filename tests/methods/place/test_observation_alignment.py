"""The contrast of observations against a slow loop; pairing, exclusions, diversity, corners."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medvlp.losses.normalise import unit_norm
from medvlp.methods.place.terms import (
    ObservationPairs,
    alike,
    diversity_penalty,
    hungarian_pairs,
    mean_of_reports,
    observation_contrast,
    soft_pairs,
)


def random_pairs(seed: int, reports: int, slots: int, width: int = 3) -> ObservationPairs:
    """Pairs of which some are missing and some sentences of other reports say the same."""
    generator = torch.Generator().manual_seed(seed)
    text = unit_norm(torch.randn(reports, slots, width, generator=generator).double())
    if reports > 1:
        text[1, 0] = text[0, 0]
    image = unit_norm(torch.randn(reports, slots, width, generator=generator).double())
    kept = torch.rand(reports, slots, generator=generator) < 0.7
    return ObservationPairs(image, text, kept)


def slow_loss(pairs: ObservationPairs, scope: str, threshold: float | None, temperature: float) -> float:
    """The definition, one anchor and one candidate at a time."""
    image, text, kept = (field.tolist() for field in pairs)
    reports, slots = len(kept), len(kept[0])

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    total = 0.0
    for b in range(reports):
        losses = []
        for s in range(slots):
            if not kept[b][s]:
                continue
            candidates = []
            for c in range(reports):
                for t in range(slots):
                    same = (b, s) == (c, t)
                    in_scope = scope == "batch" or b == c
                    alike = threshold is not None and dot(text[b][s], text[c][t]) > threshold
                    if same or (kept[c][t] and in_scope and not alike):
                        candidates.append((c, t))
            both = 0.0
            for anchors, others in ((text, image), (image, text)):
                scores = [dot(anchors[b][s], others[c][t]) / temperature for c, t in candidates]
                own = dot(anchors[b][s], others[b][s]) / temperature
                both += math.log(sum(math.exp(score) for score in scores)) - own
            losses.append(both / 2)
        total += sum(losses) / len(losses) if losses else 0.0
    return total / reports


def fast_loss(pairs: ObservationPairs, scope: str, threshold: float | None, temperature: float) -> Tensor:
    reports, slots = pairs.kept.shape
    each = pairs
    if scope == "batch":
        each = ObservationPairs(*(field.flatten(0, 1) for field in pairs))
    allowed = each.kept[..., None, :].expand(*each.kept.shape, -1)
    if threshold is not None:
        allowed = allowed & (each.text @ each.text.transpose(-1, -2) <= threshold)
    own = torch.arange(each.kept.shape[-1])
    losses = observation_contrast(each, each, allowed, own, temperature)
    return mean_of_reports(losses.view(reports, slots), pairs.kept)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    reports=st.integers(1, 4),
    slots=st.integers(1, 4),
    scope=st.sampled_from(["batch", "report"]),
    threshold=st.sampled_from([None, 0.9, 0.2]),
)
def test_contrast_equals_the_loop(
    seed: int, reports: int, slots: int, scope: str, threshold: float | None
) -> None:
    pairs = random_pairs(seed, reports, slots)
    expected = slow_loss(pairs, scope, threshold, 0.3)
    assert fast_loss(pairs, scope, threshold, 0.3).item() == pytest.approx(expected, abs=1e-9)


def test_features_that_are_alike() -> None:
    common = torch.full((1, 3), 100.0)
    features = common + torch.eye(3)[[0, 0, 1, 2]]
    kept = torch.tensor([True, True, True, True])
    expected = [[True, True, False, False], [True, True, False, False], [False, False, True, False]]
    assert alike(features, features, kept, 0.9, 0.9)[:3].tolist() == expected, (
        "what all have in common counts not"
    )
    missing = torch.tensor([True, False, True, True])
    assert not alike(features, features, missing, 0.9, 0.9)[:, 1].any()
    assert not alike(features, features, kept, 1.0, 0.9).any()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.3, 0.5]), count=st.integers(1, 12))
def test_alike_is_never_more_than_a_share(seed: int, share: float, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 2, generator=generator)
    kept = torch.rand(count, generator=generator) < 0.8
    found = alike(features, features, kept, -1.0, share)
    assert (found.sum(1) <= share * kept.sum()).all()
    collapsed = alike(torch.ones(count, 2), torch.ones(count, 2), kept, 0.9, share)
    assert not collapsed.any(), "features that are all the same tell nobody apart"


def test_gradient_is_that_of_the_loop_and_skips_missing_pairs() -> None:
    pairs = random_pairs(3, 3, 4)
    image = pairs.image.clone().requires_grad_()
    fast_loss(pairs._replace(image=image), "batch", 0.9, 0.3).backward()
    moved = pairs.image.clone()
    place = pairs.kept.nonzero()[0].tolist()
    moved[place[0], place[1], 0] += 1e-6
    slope = slow_loss(pairs._replace(image=moved), "batch", 0.9, 0.3)
    slope = (slope - slow_loss(pairs, "batch", 0.9, 0.3)) / 1e-6
    assert image.grad[place[0], place[1], 0].item() == pytest.approx(slope, abs=1e-4)
    assert (image.grad[~pairs.kept] == 0).all()


@pytest.mark.parametrize("scope", ["batch", "report"])
def test_no_sentence_at_all_gives_zero_loss_and_gradient(scope: str) -> None:
    pairs = random_pairs(0, 2, 3)
    image = pairs.image.clone().requires_grad_()
    loss = fast_loss(pairs._replace(image=image, kept=torch.zeros_like(pairs.kept)), scope, 0.9, 0.1)
    assert loss == 0
    loss.backward()
    assert (image.grad == 0).all()


def test_hungarian_pairs_follow_a_shuffle_and_keep_gradients() -> None:
    observations = torch.eye(5)[None].repeat(2, 1, 1).requires_grad_()
    order = torch.tensor([[3, 0, 4], [1, 2, 0]])
    sentences = torch.eye(5)[order]
    valid = torch.tensor([[True, True, True], [True, False, True]])
    pairs = hungarian_pairs(observations, sentences, valid)
    torch.testing.assert_close(pairs.image[valid], sentences[valid])
    assert torch.equal(pairs.kept, valid)
    pairs.image[valid].sum().backward()
    used = observations.grad.sum(2) > 0
    assert used.tolist() == [[True, False, False, True, True], [True, True, False, False, False]]


def test_more_sentences_than_observations_leave_the_last_without_pair() -> None:
    pairs = hungarian_pairs(torch.eye(2, 4)[None], torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool))
    assert pairs.kept.tolist() == [[True, True, False, False]]


def test_soft_pairs_become_the_nearest_observation_as_temperature_falls() -> None:
    generator = torch.Generator().manual_seed(0)
    observations = unit_norm(torch.randn(2, 5, 4, generator=generator))
    sentences = unit_norm(torch.randn(2, 3, 4, generator=generator))
    valid = torch.ones(2, 3, dtype=torch.bool)
    nearest = (sentences @ observations.transpose(1, 2)).argmax(2)
    expected = observations.gather(1, nearest[:, :, None].expand(-1, -1, 4))
    torch.testing.assert_close(soft_pairs(observations, sentences, valid, 1e-4).image, expected)
    warm = soft_pairs(observations, sentences, valid, 1e4).image
    mean = unit_norm(observations.mean(1, keepdim=True)).expand(-1, 3, -1)
    torch.testing.assert_close(warm, mean, atol=1e-3, rtol=0)


def test_diversity_penalty() -> None:
    assert diversity_penalty(torch.eye(4)[None]) == 0
    assert diversity_penalty(torch.eye(4)[:1].expand(4, 4)[None]) == 1
    assert diversity_penalty(torch.eye(4)[None, :1]) == 0
    half = torch.eye(4)[[0, 0, 1]][None]
    assert diversity_penalty(half).item() == pytest.approx(2 / 6)

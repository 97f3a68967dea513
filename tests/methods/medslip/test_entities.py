"""Losses on the anatomy-observation matrix: against plain loops, at the corners, and the drawn negatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medvlp.methods.medslip.terms import (
    existence_labels,
    existence_loss,
    prototype_contrast,
    relation_loss,
    relation_scores,
    sample_negatives,
)

B, A, P, D, K = 3, 5, 7, 6, 2


def random_matrix(seed: int, values: tuple[int, ...] = (-1, 0, 1)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (B, A, P), generator=generator)
    return torch.tensor(values, dtype=torch.int8)[chosen]


def contrast_by_loop(
    v: Tensor, book: Tensor, positives: Tensor, negatives: Tensor, temperature: float, normalise: bool
) -> Tensor:
    losses = []
    for b in range(v.shape[0]):
        for n in range(v.shape[1]):
            if not positives[b, n].any():
                continue
            rows = F.normalize(book, dim=1) if normalise else book
            candidates = [rows[positives[b, n]].mean(0)]
            candidates += [rows[k] for k in negatives[b, n].tolist() if k >= 0]
            table, query = torch.stack(candidates), v[b, n]
            if normalise:
                table, query = F.normalize(table, dim=1), F.normalize(query, dim=0)
            losses.append(-(table @ query / temperature).log_softmax(0)[0])
    return torch.stack(losses).mean()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), normalise=st.booleans(), temperature=st.sampled_from([0.1, 1.0]))
def test_prototype_contrast_is_the_loop(seed: int, normalise: bool, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    positives = random_matrix(seed).transpose(1, 2) == 1
    positives[0, 0, 0] = True
    negatives = sample_negatives(positives, K)
    book = torch.randn(A, D, generator=generator, dtype=torch.float64)
    v = torch.randn(B, P, D, generator=generator, dtype=torch.float64, requires_grad=True)
    texts = F.normalize(book, dim=1) if normalise else book
    queries = F.normalize(v, dim=2) if normalise else v
    gram = texts @ texts.T if normalise else None
    found = prototype_contrast(queries @ texts.T, positives, negatives, temperature, gram)
    expected = contrast_by_loop(v, book, positives, negatives, temperature, normalise)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, v)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), number=st.integers(1, A + 2))
def test_negatives_are_distinct_and_never_positive(seed: int, number: int) -> None:
    positives = random_matrix(seed).transpose(1, 2) == 1
    negatives = sample_negatives(positives, number)
    assert negatives.shape == (B, P, min(number, A))
    for row, own in zip(positives.flatten(0, 1), negatives.flatten(0, 1), strict=True):
        drawn = own[own >= 0]
        assert len(drawn.unique()) == len(drawn) == min(number, int((~row).sum()))
        assert not row[drawn].any()


def test_every_candidate_is_drawn_equally_often() -> None:
    torch.manual_seed(0)
    positives = torch.zeros(4000, 6, dtype=torch.bool)
    positives[:, 2] = True
    shares = F.one_hot(sample_negatives(positives, 3), 6).sum(1).float().mean(0)
    assert shares[2] == 0
    torch.testing.assert_close(shares[[0, 1, 3, 4, 5]], torch.full((5,), 0.6), rtol=0, atol=0.03)


def test_draws_resume_with_torchs_generator() -> None:
    positives = torch.zeros(4, 50, dtype=torch.bool)
    state = torch.get_rng_state()
    first = sample_negatives(positives, 7)
    torch.set_rng_state(state)
    assert torch.equal(sample_negatives(positives, 7), first)


def test_labels_by_hand() -> None:
    matrix = torch.full((1, 2, 4), -1, dtype=torch.int8)
    matrix[0, 0, 0], matrix[0, 1, 0], matrix[0, 1, 2] = 0, 1, 0
    by_pathology, by_anatomy = existence_labels(matrix)
    assert by_pathology.tolist() == [[1, -1, 0, -1]]
    assert by_anatomy.tolist() == [[0, 1]]


def test_existence_and_relation_count_only_what_is_mentioned() -> None:
    matrix = random_matrix(1)
    labels = existence_labels(matrix)[0]
    labels[0] = torch.tensor([1, 0, -1, -1, 1, 0, -1])
    logits = torch.randn(B, P, 2)
    known = labels >= 0
    expected = F.cross_entropy(logits[known], labels[known].long())
    torch.testing.assert_close(existence_loss(logits, labels), expected)
    scores, known = torch.randn(B, A, P), matrix >= 0
    expected = F.binary_cross_entropy_with_logits(scores[known], matrix[known].float())
    torch.testing.assert_close(relation_loss(scores, matrix), expected)
    doubled = relation_loss(scores, matrix, 2 * known.sum())
    torch.testing.assert_close(doubled, expected / 2)


def test_relation_scores_pair_anatomies_with_observations() -> None:
    anatomies, observations = torch.randn(B, A, D), torch.randn(B, P, D)
    scores = relation_scores(anatomies, observations)
    torch.testing.assert_close(scores[1, 2, 3], anatomies[1, 2] @ observations[1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-1, 0, 1])
def test_one_value_everywhere_is_finite(value: int, dtype: torch.dtype) -> None:
    """Nothing mentioned, everything absent, everything present (no negatives are left)."""
    matrix = random_matrix(0, (value,))
    before = matrix.clone()
    pathology = torch.randn(B, P, D, dtype=dtype, requires_grad=True)
    anatomy = torch.randn(B, A, D, dtype=dtype, requires_grad=True)
    positives = (matrix == 1).transpose(1, 2)
    losses = {
        "existence": existence_loss(pathology[..., :2], existence_labels(matrix)[0]),
        "prototype": prototype_contrast(pathology[..., :A], positives, sample_negatives(positives, K)),
        "relation": relation_loss(relation_scores(anatomy, pathology), matrix),
    }
    assert torch.equal(matrix, before)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.isfinite(), name
    assert losses["prototype"].abs() < 1e-6, "no query has both a positive and a negative"
    if value == -1:
        assert all(loss == 0 for loss in losses.values())
    assert pathology.grad.isfinite().all()
    assert anatomy.grad.isfinite().all()

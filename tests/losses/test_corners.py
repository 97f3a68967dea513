"""Losses in the corners: batch of one, one word, nothing but padding, half precision, order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.losses.contrastive import contrastive_logits, in_batch_accuracy, paired_cross_entropy
from medvlp.losses.cross_attention import clamped_weights, own_context_loss, patch_loss, word_loss
from medvlp.losses.normalise import unit_norm
from medvlp.methods.mgca.losses import soft_cross_entropy, swapped_prediction


def test_unit_norm_of_zero_vectors() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-20, 0.0]], requires_grad=True)
    unit = unit_norm(vectors)
    assert unit.tolist()[0] == [0, 0]
    torch.testing.assert_close(unit[1], torch.tensor([0.6, 0.8]))
    unit.sum().backward()
    assert vectors.grad[0].tolist() == [0, 0]
    assert vectors.grad[2].tolist() == [0, 0]
    assert unit_norm(torch.tensor([[float("nan"), 1.0]])).isnan().any()


def test_unit_norm_equals_torch_and_is_float32() -> None:
    vectors = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit_norm(vectors), F.normalize(vectors, dim=-1))
    assert unit_norm(vectors.half()).dtype == torch.float32
    assert unit_norm(vectors.double()).dtype == torch.float64


def test_gradients_of_unit_norm_are_right_and_have_no_gradients() -> None:
    vectors = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(unit_norm, vectors.requires_grad_())
    (gradient,) = torch.autograd.grad(unit_norm(vectors).pow(3).sum(), vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_contrast_is_zero_for_one_pair_and_small_for_true_pairs() -> None:
    one = unit_norm(torch.randn(1, 4))
    assert paired_cross_entropy(contrastive_logits(one, one, 0.07)) == 0
    pairs = torch.eye(6)
    logits = contrastive_logits(pairs, pairs, 0.07)
    assert paired_cross_entropy(logits) < 1e-5
    assert in_batch_accuracy(logits) == 1
    assert in_batch_accuracy(logits.roll(1, 1)) == 0
    assert in_batch_accuracy(logits.roll(1, 1), k=9) == 1


def test_offset_moves_the_labels() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    expected = -logits.log_softmax(1)[torch.arange(3), torch.arange(6, 9)].mean()
    torch.testing.assert_close(paired_cross_entropy(logits, offset=6), expected)


def reference_weights(attention: torch.Tensor, valid: torch.Tensor, quantile: float) -> torch.Tensor:
    """Row by row, as the definition reads."""
    output = torch.zeros_like(attention)
    for row, (values, kept) in enumerate(zip(attention, valid, strict=True)):
        if kept.any():
            chosen = values[kept]
            chosen = chosen.clamp(chosen.quantile(quantile), chosen.quantile(1 - quantile))
            output[row, kept] = chosen / chosen.sum()
    return output


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 500), st.sampled_from([0.0, 0.1, 0.3]))
def test_clamped_weights_equal_a_loop(batch: int, tokens: int, seed: int, quantile: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(batch, tokens, generator=generator) ** 4 + 1e-6
    valid = torch.rand(batch, tokens, generator=generator) < 0.6
    weights = clamped_weights(attention, valid, quantile)
    torch.testing.assert_close(weights, reference_weights(attention, valid, quantile), rtol=1e-5, atol=1e-7)


@settings(max_examples=50)
@given(
    batch=st.integers(1, 4),
    words=st.integers(1, 6),
    patches=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 500),
)
def test_token_losses_are_finite_and_ignore_padding(
    batch: int, words: int, patches: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(batch, words, generator=generator) < 0.5
    raw_words = torch.randn(batch, words, 3, generator=generator).to(dtype).requires_grad_()
    raw_patches = torch.randn(batch, patches, 3, generator=generator).to(dtype).requires_grad_()
    weights = clamped_weights(torch.rand(batch, words, generator=generator), valid)
    even = torch.full((batch, patches), 1 / patches)

    def losses(
        tokens: torch.Tensor, mask: torch.Tensor, mass: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        unit, image = unit_norm(tokens), unit_norm(raw_patches)
        return word_loss(unit, image, mass, mask), patch_loss(image, unit, even, mask)

    word, patch = losses(raw_words, valid, weights)
    (word + patch).backward()
    assert word >= 0
    assert patch >= 0
    assert word.isfinite()
    assert patch.isfinite()
    assert raw_words.grad.isfinite().all()
    assert raw_patches.grad.isfinite().all()
    assert (raw_words.grad[~valid] == 0).all()
    padded = torch.cat([raw_words, torch.randn(batch, 2, 3, generator=generator).to(dtype)], 1)
    none = torch.zeros(batch, 2)
    longer = losses(padded, torch.cat([valid, none.bool()], 1), torch.cat([weights, none], 1))
    torch.testing.assert_close(torch.stack(longer), torch.stack([word, patch]), rtol=1e-5, atol=1e-6)


def test_tokens_that_are_their_own_context_cost_nothing() -> None:
    tokens = torch.eye(4)[None]
    weights = torch.full((1, 4), 0.25)
    assert own_context_loss(tokens, tokens, weights, temperature=0.05) < 1e-6
    assert own_context_loss(tokens, tokens.roll(1, 1), weights, temperature=0.05) > 10


def test_samples_are_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    words = unit_norm(torch.randn(3, 4, 5, generator=generator))
    patches = unit_norm(torch.randn(3, 6, 5, generator=generator))
    weights = torch.rand(3, 4, generator=generator)
    together = word_loss(words, patches, weights)
    alone = [word_loss(words[i : i + 1], patches[i : i + 1], weights[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_prototype_loss_takes_no_gradient_through_codes() -> None:
    scores = torch.randn(4, 5, requires_grad=True)
    codes = scores.softmax(1)
    loss = swapped_prediction(scores, scores, codes, codes)
    loss.backward()
    expected = torch.autograd.grad(soft_cross_entropy(scores / 0.2, codes.detach()), scores)[0]
    torch.testing.assert_close(scores.grad, expected)


def test_prototype_loss_is_lowest_at_the_codes() -> None:
    codes = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).softmax(1)
    exact = codes.log() * 0.2
    best = swapped_prediction(exact, exact, codes, codes)
    torch.testing.assert_close(best, torch.special.entr(codes).sum(1).mean())
    worse = swapped_prediction(exact.roll(1, 1), exact, codes, codes)
    assert worse > best


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_cross_entropy_computes_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3).to(dtype)
    assert soft_cross_entropy(logits, torch.full((2, 3), 1 / 3)).dtype == torch.float32

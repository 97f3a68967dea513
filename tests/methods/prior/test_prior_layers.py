"""Attention pool, local cross attention, learned scale and decoders in the corners."""

from __future__ import annotations

import pytest
import torch

from medvlp.encoders.backbones import EncoderError
from medvlp.methods.prior.attention import AttentionPool, LocalCrossAttention
from medvlp.methods.prior.decoders import SentenceDecoder
from medvlp.methods.prior.modules import LearnedScale


def test_pool_of_a_set_has_no_order_and_ignores_empty_slots() -> None:
    torch.manual_seed(0)
    pool, vectors = AttentionPool(8, 2), torch.randn(2, 5, 8)
    valid = torch.tensor([[True, True, True, False, False], [False] * 5])
    pooled = pool(vectors, valid)
    order = torch.tensor([2, 4, 0, 3, 1])
    torch.testing.assert_close(pool(vectors[:, order], valid[:, order]), pooled)
    changed = torch.where(valid[:, :, None], vectors, float("nan"))
    changed[1] = 1e6
    assert pool(changed[1:], valid[1:]).isfinite().all()
    torch.testing.assert_close(pool(vectors[:1, :3]), pooled[:1])
    torch.testing.assert_close(pool(torch.zeros(1, 1, 8)), pooled[1:])


def test_pool_of_a_map_has_an_order() -> None:
    torch.manual_seed(0)
    pool, vectors = AttentionPool(8, 2, positions=4), torch.randn(2, 4, 8)
    assert not torch.allclose(pool(vectors), pool(vectors.flip(1)))
    with pytest.raises(EncoderError, match="5 vectors for 4 positions"):
        pool(torch.randn(2, 5, 8))


def test_same_sentences_for_all_images_broadcast() -> None:
    torch.manual_seed(0)
    attention = LocalCrossAttention(8)
    patches, sentences = torch.randn(3, 4, 8), torch.randn(1, 5, 8)
    valid = torch.tensor([[True, True, False, True, False]])
    once = attention(patches, sentences, valid)
    each = attention(patches, sentences.expand(3, -1, -1), valid.expand(3, -1))
    for left, right in zip(once, each, strict=True):
        torch.testing.assert_close(left, right)
    alone = attention(patches, sentences[:, valid[0]], valid[:, valid[0]])
    torch.testing.assert_close(once.image, alone.image)


def test_scale_is_the_inverse_temperature_and_learns() -> None:
    scale = LearnedScale(0.01)
    values = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(scale(values), 100 * values)
    torch.testing.assert_close(scale(values, exponential=False), torch.tensor([4.60517, -9.21034]))
    scale(values).sum().backward()
    assert scale.log_scale.grad.item() == pytest.approx(-100, rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_generated_sentences_see_each_other_unless_causal(causal: bool) -> None:
    torch.manual_seed(0)
    decoder = SentenceDecoder(16, 4, layers=2, heads=2, hidden=32, dropout=0.0, causal=causal)
    patches = torch.randn(2, 3, 16)
    queries = torch.randn(2, 4, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(decoder.decode(queries, patches)[:, 1, 0].sum(), queries)
    influence = gradient.abs().sum((0, 2)) > 0
    assert influence.tolist() == [True, True, not causal, not causal]
    output = decoder(patches)
    assert output.shape == (2, 4, 16)
    assert not torch.allclose(output[0], output[1], atol=1e-6)


def test_sentence_decoder_trains_all_its_weights() -> None:
    decoder = SentenceDecoder(16, 4, layers=2, heads=2, hidden=32)
    (decoder(torch.randn(2, 3, 16)) - torch.randn(2, 4, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_a_learned_scale_stops_at_its_bound_and_comes_back() -> None:
    scale = LearnedScale(0.01, lowest=0.005)
    optimizer = torch.optim.SGD(scale.parameters(), lr=0.01)
    found = []
    for sign in [-1] * 100 + [1] * 100:
        optimizer.zero_grad()
        (sign * scale(torch.ones(1)).log()).sum().backward()
        optimizer.step()
        found.append(scale(torch.ones(1)).item())
    assert max(found) < 200.01
    assert min(found[70:100]) > 200 * 0.98, "within two steps of it"
    assert found[-1] < 100, "as fast as it came"
    assert LearnedScale(1e-3)(torch.ones(1)).item() == pytest.approx(1000, rel=1e-4), "published: no bound"


def test_beyond_its_bound_a_learned_scale_has_one_gradient_however_a_batch_is_divided() -> None:
    scale = LearnedScale(0.01, lowest=0.005)
    with torch.no_grad():
        scale.log_scale.fill_(scale.limit + 0.01)
    values = torch.tensor([1.0, -3.0])
    found = []
    for parts in ([values], values.split(1)):
        total = torch.stack([scale(part).sum() for part in parts]).sum()
        found.append(torch.autograd.grad(total, scale.log_scale)[0].item())
    assert found[0] != 0
    assert found[1] == pytest.approx(found[0])

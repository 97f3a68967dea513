"""Attention, decoder, observation extractor, pooling and the correlation branch on their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medvlp.encoders.decoder import Attention, DecoderLayer
from medvlp.methods.place.correlation import ConditionedPatches, TaughtProjection
from medvlp.methods.place.observations import ObservationExtractor, TokenPool


def test_attention_equals_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(8, 6, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)
    with torch.no_grad():
        for name, layer in (("q", ours.query), ("k", ours.key), ("v", ours.value)):
            getattr(theirs, f"{name}_proj_weight").copy_(layer.weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    queries, memory = torch.randn(3, 4, 8), torch.randn(3, 5, 6)
    valid = torch.tensor([[True] * 5, [True, False, True, False, True], [False, False, False, True, False]])
    expected, _ = theirs(queries, memory, memory, key_padding_mask=~valid)
    torch.testing.assert_close(ours(queries, memory, valid), expected, rtol=1e-4, atol=1e-5)
    expected, weights = theirs(queries, memory, memory)
    torch.testing.assert_close(ours(queries, memory), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weights(queries, memory), weights, rtol=1e-4, atol=1e-5)


def test_decoder_layer_is_pre_norm_and_can_leave_out_self_attention() -> None:
    torch.manual_seed(0)
    for own in (True, False):
        layer = DecoderLayer(8, 8, 2, self_attention=own)
        theirs = torch.nn.TransformerDecoderLayer(
            8, 2, 32, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        with torch.no_grad():
            pairs = [(layer.cross_attention, theirs.multihead_attn)]
            pairs += [(layer.self_attention, theirs.self_attn)] if own else []
            for mine, other in pairs:
                other.in_proj_weight.copy_(torch.cat([mine.query.weight, mine.key.weight, mine.value.weight]))
                other.in_proj_bias.copy_(torch.cat([mine.query.bias, mine.key.bias, mine.value.bias]))
                other.out_proj.load_state_dict(mine.output.state_dict())
            if not own:
                theirs.self_attn.out_proj.weight.zero_()
            theirs.linear1.load_state_dict(layer.feed_forward[0].state_dict())
            theirs.linear2.load_state_dict(layer.feed_forward[-1].state_dict())
        queries, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
        found, weights = layer(queries, memory, weights=True)
        torch.testing.assert_close(found, theirs(queries, memory), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 3))


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 7)])
def test_extractor_takes_any_grid_and_sees_positions(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    count = grid[0] * grid[1]
    patches = torch.randn(2, count, 6)
    order = torch.randperm(count)
    for positions in (True, False):
        extractor = ObservationExtractor(6, 16, queries=3, layers=2, heads=2, positions=positions)
        found = extractor(patches, grid, attention=True)
        assert found.features.shape == (2, 3, 16)
        torch.testing.assert_close(found.attention.sum(2), torch.ones(2, 3))
        torch.testing.assert_close(extractor(patches, grid).features, found.features)
        shuffled = extractor(patches[:, order], grid).features
        same = torch.allclose(shuffled, found.features, atol=1e-5)
        assert same == (not positions or torch.equal(order, torch.arange(count)))


def test_pool_starts_as_the_mean_and_survives_padding() -> None:
    pool = TokenPool(4)
    tokens = torch.randn(2, 5, 4)
    valid = torch.tensor([[True, True, True, False, False], [False] * 5])
    pooled = pool(tokens, valid)
    torch.testing.assert_close(pooled[0], tokens[0, :3].mean(0))
    torch.testing.assert_close(pooled[1], tokens[1, 0])
    torch.nn.init.normal_(pool.score.weight)
    logits = (tokens[0, :3] @ pool.score.weight[0]).softmax(0)
    torch.testing.assert_close(pool(tokens, valid)[0], logits @ tokens[0, :3])


def branch(**options: float) -> ConditionedPatches:
    torch.manual_seed(0)
    return ConditionedPatches(6, 5, 16, 4, layers=1, heads=2, **options)


def test_patches_depend_on_the_words_and_not_on_padding() -> None:
    patches, words = torch.randn(2, 4, 6), torch.randn(2, 7, 5)
    valid = torch.arange(7)[None] < torch.tensor([[4], [7]])
    model = branch()
    found = model(patches, (2, 2), words, valid)
    assert found.conditioned.shape == (2, 4, 4)
    assert found.taught is None
    other = words.clone()
    other[0, 4:] = 100.0
    torch.testing.assert_close(model(patches, (2, 2), other, valid).conditioned, found.conditioned)
    other[0, 3] = -other[0, 3]
    changed = model(patches, (2, 2), other, valid).conditioned
    assert (changed[0] - found.conditioned[0]).abs().max() > 1e-3
    torch.testing.assert_close(changed[1], found.conditioned[1])
    assert model(patches, (2, 2), words, torch.zeros_like(valid)).conditioned.isfinite().all()


def test_dropped_patches_do_not_see_their_content() -> None:
    patches, words = torch.randn(1, 4, 6), torch.randn(1, 3, 5)
    valid = torch.ones(1, 3, dtype=torch.bool)
    model = branch(drop=1.0)
    found = model(patches, (2, 2), words, valid).conditioned
    torch.testing.assert_close(model(-patches, (2, 2), words, valid).conditioned, found)
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-3
    model.eval()
    seen = [model(sign * patches, (2, 2), words, valid).conditioned for sign in (1, -1)]
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_teacher_moves_once_a_step_in_training_only() -> None:
    model = branch(teacher_momentum=0.9)
    layer = model.patches
    assert isinstance(layer, TaughtProjection)
    start = layer.teacher_weight.clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    inputs = torch.randn(2, 4, 6), (2, 2), torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    model(*inputs)
    assert torch.equal(layer.teacher_weight, start)
    model.new_step()
    model.eval()
    model(*inputs)
    assert torch.equal(layer.teacher_weight, start)
    model.train()
    for _ in range(2):
        taught = model(*inputs).taught
    torch.testing.assert_close(layer.teacher_weight, start + 0.1)
    torch.testing.assert_close(taught, inputs[0] @ layer.teacher_weight.T)
    assert not taught.requires_grad
    assert model.half().patches.teacher_weight.dtype == torch.float32
    assert model.double().patches.teacher_weight.dtype == torch.float64

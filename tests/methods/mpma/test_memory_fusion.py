"""Memory attention, fusion and the image decoder against loops written from their definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.positions import sincos_positions
from medvlp.methods.mpma.decoder import ImageDecoder
from medvlp.methods.mpma.fusion import FusionLayer, MemoryAttention, MemoryFusion, SharedMemory
from medvlp.methods.mpma.masking import PatchMask

MASK = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def slow_attention(
    module: MemoryAttention, tokens: torch.Tensor, context: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """One sample, head, query at a time; slots joined by hand."""
    width = tokens.shape[2]
    size = width // module.heads
    output = torch.zeros_like(tokens)
    for sample in range(tokens.shape[0]):
        keys = [module.key(row) for row, kept in zip(context[sample], mask[sample], strict=True) if kept]
        values = [module.value(row) for row, kept in zip(context[sample], mask[sample], strict=True) if kept]
        for slot in range(module.slots):
            keys.append(module.memory_key[slot] * math.sqrt(size))
            values.append(module.memory_value[slot] * math.sqrt(module.slots))
        for place in range(tokens.shape[1]):
            query = module.query(tokens[sample, place])
            joined = []
            for head in range(module.heads):
                part = slice(head * size, (head + 1) * size)
                scores = [float(query[part] @ key[part]) / math.sqrt(size) for key in keys]
                weights = softmax(scores)
                joined.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
            output[sample, place] = module.output(torch.cat(joined))
    return output


@pytest.mark.parametrize("slots", [0, 3])
@torch.no_grad()
def test_attention_with_slots(slots: int) -> None:
    torch.manual_seed(0)
    module = MemoryAttention(8, 6, 2, slots).double()
    tokens, context = torch.randn(2, 4, 8).double(), torch.randn(2, 5, 6).double()
    expected = slow_attention(module, tokens, context, MASK)
    torch.testing.assert_close(module(tokens, context, MASK), expected)
    changed = context.masked_fill(~MASK[:, :, None], 9.0)
    torch.testing.assert_close(module(tokens, changed, MASK), expected)
    names = dict(module.named_parameters())
    assert ("memory_key" in names) == bool(slots)


def test_slots_answer_where_there_is_nothing_to_attend_to() -> None:
    module = MemoryAttention(8, 8, 2, 3)
    output = module(torch.randn(1, 2, 8), torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.bool))
    assert output.isfinite().all()
    torch.testing.assert_close(output, module(torch.zeros(1, 2, 8), torch.randn(1, 0, 8)), atol=3, rtol=0)


def test_slots_start_at_the_published_scale() -> None:
    torch.manual_seed(0)
    module = MemoryAttention(64, 64, 4, 500)
    assert module.memory_key.detach().std() * math.sqrt(16) == pytest.approx(1 / math.sqrt(16), rel=0.05)
    assert module.memory_value.detach().std() * math.sqrt(500) == pytest.approx(1 / math.sqrt(500), rel=0.05)


@torch.no_grad()
def test_shared_memory_reads_the_rows_most_alike() -> None:
    torch.manual_seed(0)
    module = SharedMemory((8, 6), 8, 7, 3, 2).double()
    modalities = (torch.randn(2, 4, 8).double(), torch.randn(2, 5, 6).double())
    answers = module(*modalities)
    keys, values = module.key(module.memory), module.value(module.memory)
    for number, (tokens, answer) in enumerate(zip(modalities, answers, strict=True)):
        for sample in range(2):
            for place in range(tokens.shape[1]):
                query = module.query[number](tokens[sample, place])
                joined = []
                for part in (slice(0, 4), slice(4, 8)):
                    scores = [float(query[part] @ key[part]) / 2 for key in keys]
                    best = sorted(range(7), key=lambda row, s=scores: -s[row])[:3]
                    weights = softmax([scores[row] for row in best])
                    joined.append(sum(w * values[row][part] for w, row in zip(weights, best, strict=True)))
                expected = tokens[sample, place] + module.output[number](torch.cat(joined))
                torch.testing.assert_close(answer[sample, place], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_layer_is_three_residual_parts() -> None:
    torch.manual_seed(0)
    layer = FusionLayer(8, 6, 2, 16, slots=3).double()
    tokens, context = torch.randn(2, 5, 8).double(), torch.randn(2, 4, 6).double()
    everything = torch.ones(2, 4, dtype=torch.bool)
    normed = layer.self_norm(tokens)
    expected = tokens + slow_attention(layer.self_attention, normed, normed, MASK)
    expected = expected + slow_attention(
        layer.cross_attention, layer.cross_norm(expected), context, everything
    )
    expected = expected + layer.feed_forward(layer.forward_norm(expected))
    torch.testing.assert_close(layer(tokens, context, MASK), expected)


def fusion(seed: int = 0, **options: Any) -> MemoryFusion:
    torch.manual_seed(seed)
    return MemoryFusion(8, 6, layers=2, heads=2, hidden=16, dropout=0.0, slots=4, highest=2, **options)


@pytest.mark.parametrize("memory", ["slots", "retrieval", "none"])
def test_memory_and_image_change_the_report(memory: str) -> None:
    model = fusion(memory=memory)
    report, image = torch.randn(2, 5, 8), torch.randn(2, 4, 6)
    fused = model(report, image, MASK)
    fused.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    memories = [value for name, value in model.named_parameters() if "memory" in name]
    assert len(memories) == {"slots": 4, "retrieval": 1, "none": 0}[memory]
    with torch.no_grad():
        assert (model(report, image + 1, MASK) - fused).abs().max() > 1e-3
        padded = report.masked_fill(~MASK[:, :, None], 5.0)
        torch.testing.assert_close(model(padded, image, MASK)[MASK], fused[MASK])
        for value in memories:
            value += 1
        if memories:
            assert (model(report, image, MASK) - fused).abs().max() > 1e-3


def test_report_of_nothing_but_padding_stays_finite() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    assert fusion()(torch.randn(2, 5, 8), torch.randn(2, 4, 6), mask).isfinite().all()
    assert not mask.any(), "the caller's mask is changed"


MASKS = PatchMask(torch.tensor([[0, 4], [1, 2]]), torch.tensor([[1, 2, 3, 5], [0, 3, 4, 5]]))


@torch.no_grad()
def test_decoder_puts_every_patch_in_its_place() -> None:
    torch.manual_seed(0)
    decoder = ImageDecoder(6, (2, 3), 5, width=8, layers=2, heads=2).double()
    image = torch.randn(2, 3, 6).double()
    found = decoder(image, MASKS)
    positions = sincos_positions((2, 3), 8).double()
    for sample in range(2):
        visible = MASKS.visible[sample].tolist()
        tokens = [decoder.embed(image[sample, 0])]
        for patch in range(6):
            own = decoder.mask_token
            if patch in visible:
                own = decoder.embed(image[sample, 1 + visible.index(patch)])
            tokens.append(own + positions[patch])
        stacked = torch.stack(tokens)[None]
        for layer in decoder.layers:
            stacked = layer(stacked)
        everything = decoder.pixels(decoder.norm(stacked))[0, 1:]
        torch.testing.assert_close(found[sample], everything[MASKS.hidden[sample]], rtol=1e-5, atol=1e-6)


def test_decoder_that_reads_the_report() -> None:
    torch.manual_seed(0)
    decoder = ImageDecoder(6, (2, 3), 5, width=8, layers=1, heads=2, report_width=4)
    image, report = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    found = decoder(image, MASKS, report, MASK)
    assert (decoder(image, MASKS, report + 1, MASK) - found).abs().max() > 1e-4
    padded = report.masked_fill(~MASK[:, :, None], 5.0)
    torch.testing.assert_close(decoder(image, MASKS, padded, MASK), found)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(EncoderError, match="fusion_heads=3"):
        MemoryFusion(8, 6, 1, 3, 16)
    with pytest.raises(EncoderError, match="decoder_heads=3"):
        ImageDecoder(6, (2, 3), 5, width=8, heads=3)
    with pytest.raises(EncoderError, match="decoder_width"):
        ImageDecoder(6, (2, 3), 5, width=6, heads=2)

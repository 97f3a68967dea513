"""The parts of PRIOR (pools, attention, bank, decoders, losses) against the published code's numbers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from medvlp.data.batch import Text
from medvlp.encoders.words import sentence_means
from medvlp.losses.contrastive import contrastive_logits, paired_cross_entropy
from medvlp.losses.normalise import unit_norm
from medvlp.methods.prior.attention import AttentionPool, LocalCrossAttention
from medvlp.methods.prior.bank import SentenceBank
from medvlp.methods.prior.config import PRIORConfig
from medvlp.methods.prior.decoders import SentenceDecoder, UpsamplingDecoder
from medvlp.methods.prior.modules import LearnedScale, patch_vectors
from medvlp.methods.prior.terms import masked_mean, reorder, score_divergence, sentence_contrast, simsiam
from tests.golden_files import Golden, every

#: The published code ran in float32; ours runs in float64, so what differs is its rounding.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
DOUBLE = torch.float64


def weights(golden: Golden, prefix: str) -> dict[str, Tensor]:
    """Arrays below `prefix` in float64, under their names without it."""
    return {name.removeprefix(prefix): golden(name, DOUBLE) for name in golden.names(prefix)}


def compare(actual: Tensor, golden: Golden, name: str, **tolerance: float) -> None:
    """`actual` against an array of the file."""
    expected = golden(name, DOUBLE)
    torch.testing.assert_close(
        actual.detach().double(), expected, **{**CLOSE, **tolerance}, msg=lambda m: name + m
    )


def leaf(golden: Golden, name: str) -> Tensor:
    """An input that gets a gradient."""
    return golden(name, DOUBLE).requires_grad_()


def pool_like(golden: Golden, heads: int) -> AttentionPool:
    stored = weights(golden, "param/")
    positions = stored.get("positional_embedding")
    count = None if positions is None else len(positions) - 1
    pool = AttentionPool(stored["q_proj.weight"].shape[0], heads, count).double()
    pool.load_state_dict(stored)
    return pool


@every("prior_sentence_gather_s*.npz")
def test_sentence_means(golden: Golden) -> None:
    index = golden("in_index")
    zero = torch.zeros_like(index)
    numbers = torch.where(index > 0, index - 1, -1)
    means, valid = sentence_means(golden("in_x", DOUBLE), Text(zero, zero, zero, numbers), index.shape[1])
    for row in range(len(index)):
        compare(means[row][valid[row]], golden, f"out_{row}")


@every("prior_sentence_pool_s*.npz")
def test_report_pool(golden: Golden) -> None:
    pool, vectors = pool_like(golden, heads=8), golden("in_x", DOUBLE)
    compare(pool(vectors), golden, "out")
    padded = torch.cat([vectors, torch.full_like(vectors[:, :3], 9.0)], 1)
    valid = torch.arange(padded.shape[1]).expand(len(padded), -1) < vectors.shape[1]
    compare(pool(padded, valid), golden, "out")


@every("prior_image_pool_s*.npz")
def test_image_pool_and_layouts(golden: Golden) -> None:
    local = golden("in_x", DOUBLE).flatten(2).transpose(1, 2)
    compare(pool_like(golden, heads=8)(local), golden, "out_global")
    for layout, name in (("correct", "out_local_correct"), ("official_view", "out_local_official_view")):
        compare(patch_vectors(local, PRIORConfig(local_layout=layout)), golden, name)


@every("prior_local_cross_attention_s*.npz")
def test_local_cross_attention(golden: Golden) -> None:
    image, text = golden("in_image", DOUBLE), golden("in_text", DOUBLE)
    attention = LocalCrossAttention(image.shape[1]).double()
    attention.load_state_dict(weights(golden, "param/"))
    padded = torch.cat([text, torch.full_like(text[:2], 5.0)])[None]
    valid = (torch.arange(len(text) + 2) < len(text))[None]
    context = attention(image[None], padded, valid)
    compare(context.image[0], golden, "out_image_side_ctx")
    compare(context.text[0, : len(text)], golden, "out_text_side_ctx")
    compare(context.image_weights[0, :, : len(text)], golden, "out_attn_I_T")
    compare(context.text_weights[0, : len(text)], golden, "out_attn_T_I")
    assert (context.image_weights[0, :, len(text) :] == 0).all()


@every("prior_spb_s*.npz")
def test_sentence_bank(golden: Golden) -> None:
    stored = golden("param/embed.weight", DOUBLE)
    bank = SentenceBank(*stored.shape).double()
    with torch.no_grad():
        bank.weight.copy_(stored)
    x, q = leaf(golden, "in_x"), leaf(golden, "in_q")
    temperature = golden("in_tau").item()
    mixed = bank(x, temperature, golden("in_gumbel", DOUBLE))
    compare(mixed.sentences, golden, "out")
    assert torch.equal(mixed.weights.argmax(-1), golden("out_index"))
    loss = (mixed.sentences - x).abs().mean()
    compare(loss, golden, "out_loss")
    for name, gradient in zip(("x", "embed"), torch.autograd.grad(loss, [x, bank.weight]), strict=True):
        compare(gradient, golden, f"grad_loss_wrt_{name}")
    everything = torch.ones(1, len(x), dtype=torch.bool)
    divergence = score_divergence(bank(x, temperature).scores, bank(q, temperature).scores)
    kl = masked_mean(divergence[None], everything)
    compare(kl, golden, "out_kl")
    for name, gradient in zip(("x", "q", "embed"), torch.autograd.grad(kl, [x, q, bank.weight]), strict=True):
        compare(gradient, golden, f"grad_kl_wrt_{name}")


def published_image_decoder(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published decoder's weights under our names."""
    return {name.replace("output_head.0", "head"): value for name, value in stored.items()}


@every("prior_image_decoder_s*.npz")
def test_image_decoder(golden: Golden) -> None:
    stored = weights(golden, "param/")
    image, text = leaf(golden, "in_image_embed"), leaf(golden, "in_text_embed")
    target = golden("in_target", DOUBLE)
    width = stored["blocks.0.conv1.0.weight"].shape[0]
    decoder = UpsamplingDecoder(2 * image.shape[1], width, image.shape[2:], target.shape[-1]).double()
    missing = decoder.load_state_dict(published_image_decoder(stored), strict=False)
    assert not missing.unexpected_keys
    assert all("running" in name or "num_batches" in name for name in missing.missing_keys)
    output = decoder(torch.cat([image, text], 1))
    compare(output[:, :, ::8, ::8], golden, "out_image_down8", atol=1e-5)
    loss = (output - target).abs().mean()
    compare(loss, golden, "out_loss")
    names = ("image", "text")
    for name, gradient in zip(names, torch.autograd.grad(loss, [image, text]), strict=True):
        expected = golden(f"grad_loss_wrt_{name}_embed", DOUBLE)
        # ReLUs bend at 0: an input that differs by 1e-6 moves the gradient by up to 1.1 % of its norm, and
        # single entries by any share of theirs.
        assert (gradient - expected).norm() < 0.02 * expected.norm()
        assert gradient.norm().item() == pytest.approx(expected.norm().item(), rel=0.01)


def published_sentence_decoder(decoder: SentenceDecoder, stored: dict[str, Tensor]) -> Tensor:
    """Load the published decoder's weights; returns the [N, D] constant it adds to the queries."""
    layers = {
        name.removeprefix("encoder."): value for name, value in stored.items() if name.startswith("encoder.")
    }
    decoder.encoder.load_state_dict(layers)
    with torch.no_grad():
        decoder.norm.weight.copy_(stored["embeddings.LayerNorm.weight"])
        decoder.norm.bias.copy_(stored["embeddings.LayerNorm.bias"])
    positions = stored["embeddings.position_embeddings.weight"][: len(decoder.queries)]
    return positions + stored["embeddings.token_type_embeddings.weight"][0]


@every("prior_sentence_decoder_s*.npz")
def test_sentence_decoder(golden: Golden) -> None:
    options = json.loads(golden.text("meta"))
    queries = golden("in_queries", DOUBLE)
    count, width = queries.shape[1:]
    sizes = options["layers"], options["heads"], options["ff"]
    outputs = []
    for causal in (True, False):
        decoder = SentenceDecoder(width, count, *sizes, dropout=0.0, causal=causal).double()
        added = published_sentence_decoder(decoder, weights(golden, "param/"))
        outputs.append(decoder.decode(queries + added, golden("in_image", DOUBLE)))
    compare(outputs[0], golden, "out", atol=1e-5)
    first, last = (outputs[0] - outputs[1]).abs()[:, [0, -1]].amax((0, 2))
    assert first > 1e-3  # without the mask even the first query sees the others
    assert last > 1e-4


@every("prior_losses_s*.npz")
def test_global_contrast(golden: Golden) -> None:
    image, text = leaf(golden, "in_g_image"), leaf(golden, "in_g_text")
    scale = LearnedScale(1.0).double()
    with torch.no_grad():
        scale.log_scale.fill_(golden("in_logit_scale").item())
    units = unit_norm(image), unit_norm(text)
    logits = [contrastive_logits(scale(a), b, 1.0) for a, b in (units, units[::-1])]
    loss = 0.5 * (paired_cross_entropy(logits[0]) + paired_cross_entropy(logits[1]))
    compare(loss, golden, "out_global")
    gradients = torch.autograd.grad(loss, [image, text, scale.log_scale])
    for name, gradient in zip(("image", "text", "logit_scale"), gradients, strict=True):
        compare(gradient.squeeze() if name == "logit_scale" else gradient, golden, f"grad_global_wrt_{name}")


@every("prior_losses_s*.npz")
def test_sentence_contrast(golden: Golden) -> None:
    text, context = leaf(golden, "in_s_text"), leaf(golden, "in_s_ctx")
    scale = golden("in_local_logit_scale").exp()
    valid = torch.ones(1, len(text), dtype=torch.bool)
    loss = sentence_contrast(scale * unit_norm(text)[None], unit_norm(context)[None], valid)
    compare(loss, golden, "out_text_local")
    for name, gradient in zip(("text", "ctx"), torch.autograd.grad(loss, [text, context]), strict=True):
        compare(gradient, golden, f"grad_text_local_wrt_{name}")


def predictor_like(golden: Golden) -> nn.Sequential:
    stored = weights(golden, "predictor/")
    hidden, width = stored["0.weight"].shape
    predictor = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)).double()
    predictor.load_state_dict(stored)
    return predictor


@every("prior_losses_s*.npz")
def test_simsiam(golden: Golden) -> None:
    predictor = predictor_like(golden)
    x, y = leaf(golden, "in_p_x"), leaf(golden, "in_p_y")
    loss = simsiam(x, y, predictor(x), predictor(y)).mean()
    compare(loss, golden, "out_simsiam")
    for name, gradient in zip(("x", "y"), torch.autograd.grad(loss, [x, y]), strict=True):
        compare(gradient, golden, f"grad_simsiam_wrt_{name}")


@every("prior_losses_s*.npz")
def test_local_alignment_of_reports_of_different_length(golden: Golden) -> None:
    image = leaf(golden, "in_l_image")
    texts = [golden(f"in_l_text_{row}", DOUBLE) for row in range(len(image))]
    sentences = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=3.0)
    lengths = torch.tensor([len(text) for text in texts])
    valid = torch.arange(sentences.shape[1]) < lengths[:, None]
    attention = LocalCrossAttention(image.shape[2]).double()
    attention.load_state_dict(weights(golden, "cross_attention/"))
    context, predictor = attention(image, sentences, valid), predictor_like(golden)
    compare(context.image, golden, "out_text_to_image_stack")
    scale = golden("in_local_logit_scale").exp()
    terms = {
        "local_image": simsiam(image, context.image, predictor(image), predictor(context.image)).mean(),
        "local_text": sentence_contrast(scale * unit_norm(sentences), unit_norm(context.text), valid),
    }
    for name, loss in terms.items():
        compare(loss, golden, f"out_{name}")
        (gradient,) = torch.autograd.grad(loss, image, retain_graph=True)
        compare(gradient, golden, f"grad_{name}_wrt_image", rtol=1e-4)


@every("prior_losses_s*.npz")
def test_matching(golden: Golden) -> None:
    predicted, target = golden("in_m_out", DOUBLE), golden("in_m_tgt", DOUBLE)
    column = golden("out_match_col")
    published = reorder(predicted[None], target[None], wrong_permutation=True)[0]
    assert torch.equal(published, predicted[column])
    assert torch.equal(reorder(predicted[None], target[None])[0], predicted[column.argsort()])


@pytest.mark.parametrize("grid", [(7, 7), (4, 4), (14, 14), (1, 1)])
@pytest.mark.parametrize("size", [30, 32, 112])
def test_upsampling_ends_at_any_size(grid: tuple[int, int], size: int) -> None:
    decoder = UpsamplingDecoder(3, 64, grid, size)
    assert decoder(torch.randn(2, 3, *grid)).shape == (2, 1, size, size)

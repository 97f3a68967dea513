"""Encoding a part of the patches and hidden words; fixed positions."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from medvlp.config import ImageConfig, TextConfig
from medvlp.data.batch import Text
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.positions import sincos_positions
from medvlp.encoders.text import TextEncoder
from medvlp.methods.mpma.encoders import MaskedImageEncoder, MaskedTextEncoder

SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
VIT = ImageConfig(name="vit_tiny_patch16_224", options=SMALL)
BERT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VISIBLE = torch.tensor([[0, 3, 7], [1, 2, 15]])


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 1, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", SMALL),
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 2}),
        ("deit_tiny_distilled_patch16_224", SMALL),
        ("eva02_tiny_patch14_224", SMALL),
        ("vit_small_patch16_dinov3", SMALL),
    ],
)
def test_hidden_patches_have_no_influence(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = MaskedImageEncoder(ImageConfig(name=name, options=options), 32).eval()
    before = images()
    features = encoder(before, visible=VISIBLE)
    assert features.local.shape == (2, 3, 16)
    assert features.grid == (4, 4)
    changed = before.clone()
    for sample in range(2):
        for patch in set(range(16)) - set(VISIBLE[sample].tolist()):
            row, column = divmod(patch, 4)
            changed[sample, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 0
    after = encoder(changed, visible=VISIBLE)
    torch.testing.assert_close(after.pooled, features.pooled)
    torch.testing.assert_close(after.local, features.local)
    changed[0, 0, 0, 0] += 100
    assert (encoder(changed, visible=VISIBLE).pooled[0] - features.pooled[0]).abs().max() > 1e-5
    everything = encoder(before, visible=torch.arange(16).expand(2, -1))
    whole = encoder(before)
    torch.testing.assert_close(everything.pooled, whole.pooled)
    torch.testing.assert_close(everything.local, whole.local)


def test_masked_tokens_are_those_of_blocks_on_visible_tokens() -> None:
    torch.manual_seed(0)
    encoder = MaskedImageEncoder(VIT, 32).eval()
    backbone = encoder.backbone
    tokens = backbone.patch_embed(encoder.prepare(images()))
    tokens = torch.cat([backbone.cls_token.expand(2, -1, -1), tokens], 1) + backbone.pos_embed
    for sample in range(2):
        chosen = torch.stack([tokens[sample, 0], *(tokens[sample, 1 + place] for place in VISIBLE[sample])])
        expected = backbone.norm(backbone.blocks(chosen[None]))
        features = encoder(images(), visible=VISIBLE)
        torch.testing.assert_close(features.pooled[sample], expected[0, 0])
        torch.testing.assert_close(features.local[sample], expected[0, 1:])


def test_whole_images_are_the_plain_encoders() -> None:
    torch.manual_seed(0)
    masked = MaskedImageEncoder(VIT, 32).eval()
    plain = ImageEncoder(VIT, 32).eval()
    plain.load_state_dict(masked.state_dict())
    whole, features = masked(images(), attention=True), plain(images(), attention=True)
    for ours, theirs in zip(whole, features, strict=True):
        torch.testing.assert_close(ours, theirs)
    copied = copy.deepcopy(masked)
    torch.testing.assert_close(copied(images(), visible=VISIBLE), masked(images(), visible=VISIBLE))


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = dataclasses.replace(VIT, gradient_checkpointing=checkpointing)
        encoder = MaskedImageEncoder(config, 32)
        encoder(images(), visible=VISIBLE).local.square().sum().backward()
        gradients.append({name: value.grad for name, value in encoder.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_blocks_see_only_visible_tokens() -> None:
    encoder = MaskedImageEncoder(VIT, 32)
    lengths = []
    encoder.backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    encoder(images(), visible=VISIBLE)
    encoder(images())
    assert lengths == [4, 17]


def slow_position(row: int, column: int, width: int) -> list[float]:
    frequencies = [1 / 10000 ** (place / (width / 4)) for place in range(width // 4)]
    values = []
    for coordinate in (column, row):
        values += [math.sin(coordinate * each) for each in frequencies]
        values += [math.cos(coordinate * each) for each in frequencies]
    return values


def test_fixed_positions_are_maes() -> None:
    positions = sincos_positions((2, 3), 8)
    for patch in range(6):
        torch.testing.assert_close(positions[patch].tolist(), slow_position(*divmod(patch, 3), 8))
    encoder = MaskedImageEncoder(VIT, 32, fixed_positions=True)
    stored = encoder.backbone.pos_embed
    assert not stored.requires_grad
    assert (stored[0, 0] == 0).all()
    torch.testing.assert_close(stored[0, 1:], sincos_positions((4, 4), 16))


@pytest.mark.parametrize(
    ("config", "fixed", "message"),
    [
        (
            ImageConfig(name="resnet10t", options={"channels": [8, 8, 16, 24], "stem_width": 8}),
            False,
            "resnet10t",
        ),
        (ImageConfig(name="convnext_atto"), False, "sequence of patch tokens"),
        (dataclasses.replace(VIT, local_stage=0), False, "local_stage"),
        (ImageConfig(name="vit_small_patch16_dinov3", options=SMALL), True, "no position embedding"),
        (
            dataclasses.replace(VIT, options={**SMALL, "embed_dim": 18, "num_heads": 1}),
            True,
            "multiple of 4",
        ),
    ],
)
def test_unfit_backbones_are_refused(config: ImageConfig, fixed: bool, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        MaskedImageEncoder(config, 32, fixed_positions=fixed)


def text() -> Text:
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 5, 3, 0, 0]])
    mask = (ids > 0).long()
    return Text(ids, mask, torch.arange(5).expand(2, -1), torch.zeros_like(ids))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", BERT),
        ("roberta", {**BERT, "max_position_embeddings": 20}),
        ("electra", {**BERT, "embedding_size": 12}),
    ],
)
def test_hidden_words_enter_as_one_embedding(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = TextConfig(model_type=kind, options=options, dropout=0.0)
    masked = MaskedTextEncoder(config, 40, mask_token=4).eval()
    tokens = text()
    hidden = torch.tensor([[False, True, False, True, False], [False] * 5])
    replaced = dataclasses.replace(tokens, input_ids=tokens.input_ids.masked_fill(hidden, 4))
    valid = tokens.attention_mask.bool()
    torch.testing.assert_close(masked(tokens, hidden=hidden).hidden[valid], masked(replaced).hidden[valid])
    plain = TextEncoder(config, 40).eval()
    state = {name: value for name, value in masked.state_dict().items() if "mask_embedding" not in name}
    plain.load_state_dict(state)
    torch.testing.assert_close(masked(tokens).hidden, plain(tokens).hidden)
    grouped = dataclasses.replace(tokens, lengths=(5, 3))
    masked.config.length_groups = 2
    torch.testing.assert_close(
        masked(grouped, hidden=hidden).hidden[valid], masked(tokens, hidden=hidden).hidden[valid]
    )
    masked(tokens, hidden=hidden).hidden.square().sum().backward()
    assert masked.mask_embedding.weight.grad.abs().sum() > 0


def test_text_errors_and_freezing() -> None:
    config = TextConfig(model_type="bert", options=BERT)
    with pytest.raises(EncoderError, match=r"mask_token=40"):
        MaskedTextEncoder(config, 40, mask_token=40)
    frozen = MaskedTextEncoder(dataclasses.replace(config, frozen=True), 40)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    short = MaskedTextEncoder(TextConfig(options={**BERT, "max_position_embeddings": 4}), 40)
    with pytest.raises(EncoderError, match="max_tokens"):
        short(text(), hidden=torch.zeros(2, 5, dtype=torch.bool))

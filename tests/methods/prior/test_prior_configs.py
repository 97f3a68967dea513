"""The shipped PRIOR files: they load, the official one turns every quirk on, and they run when made small."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medvlp.config import ImageConfig
from medvlp.encoders.image import ImageEncoder
from medvlp.methods.base import Progress
from medvlp.methods.prior.config import PRIORConfig
from medvlp.methods.registry import build_method
from tests.methods.mgca.test_mgca_configs import load_files
from tests.methods.small_mgca import VOCABULARY
from tests.methods.small_prior import SMALL, report_batch


def test_official_turns_on_everything_published() -> None:
    sound, official = load_files("methods/prior"), load_files("methods/prior", "methods/prior-official")
    quirks = {item.name for item in dataclasses.fields(PRIORConfig) if "(published" in item.metadata["help"]}
    different = {
        item.name
        for item in dataclasses.fields(PRIORConfig)
        if getattr(official.method, item.name) != getattr(sound.method, item.name)
    }
    assert different == quirks
    assert len(quirks) == 7
    assert official.image == sound.image
    assert official.optimizer.decay_all
    assert official.data.pad_to_max
    assert official.data.transform.flip == 0.5


def test_published_stages() -> None:
    config = load_files("methods/prior")
    assert [phase.epochs for phase in config.optimizer.phases] == [20, 30, 100]
    method = config.method
    assert method.weights(1) == {"global": 1, "local_image": 1, "local_text": 1}
    assert method.weights(2) == {"global": 1, "local_image": 1, "local_text": 1, "bank": 10}
    third = {"local_image": 1, "local_text": 1, "image": 1, "score": 1, "generated": 1}
    assert method.weights(3) == {"global": 10, "bank": 10, "sentence": 10, **third}


@pytest.mark.parametrize("official", [False, True])
def test_small_models_run_through_all_stages(official: bool) -> None:
    files = ["methods/prior", *(["methods/prior-official"] if official else [])]
    small = [f"method.{name}={value}" for name, value in SMALL.items() if name != "bank_noise"]
    overrides = [
        "data.image_size=64",
        "data.max_tokens=12",
        "image.pretrained=false",
        *small,
    ]
    overrides += ["image.name=resnet10t", "image.options={channels: [8, 8, 16, 16], stem_width: 8}"]
    config = load_files(*files, "models/bert_cpu", overrides=overrides)
    model = build_method(config, VOCABULARY)
    batch = report_batch([[3], [2, 4]], length=12)
    batch = dataclasses.replace(batch, image=batch.image.repeat(1, 1, 2, 2))
    for phase in range(3):
        model.on_progress(Progress(phase, phase, 3, phase))
        model(batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_input_channel_sums_the_kernels_of_published_weights(tmp_path) -> None:
    options = {"channels": [8, 8, 16, 16], "stem_width": 8}
    colour = ImageEncoder(ImageConfig(name="resnet10t", options=options), 32)
    file = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in colour.backbone.state_dict().items()}, file)
    one = ImageConfig(name="resnet10t", options=options, in_channels=1, weights=str(file))
    gray = ImageEncoder(one, 32).backbone

    def first(module: nn.Module) -> torch.Tensor:
        return next(part.weight for part in module.modules() if isinstance(part, nn.Conv2d))

    torch.testing.assert_close(first(gray), first(colour.backbone).sum(1, keepdim=True))

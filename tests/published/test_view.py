"""What imported weights see of an image: the view of the published evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

import medvlp
from medvlp.config import Config
from medvlp.data.cache import open_reader
from medvlp.data.transforms import evaluation_crop
from medvlp.library.images import see
from medvlp.methods.registry import build_method
from medvlp.published import medslip, mgca, prior
from medvlp.published.backbones import import_timm
from medvlp.published.card import Card
from medvlp.published.run import config_of, no_words
from medvlp.published.run_files import write_run
from medvlp.runs import saved_run
from medvlp.runs.identity import IDENTITY, IdentityError

IMAGE = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small backbone of chance with MGCA's origin, written as an import writes it."""
    values = {
        "data": {"image_size": 224},
        "image": {"name": "resnet10t", "in_channels": 1},
        "method": {"name": "backbone", "side": "image"},
    }
    config, tokenizer = config_of(values, tmp_path / "run"), no_words()
    method = build_method(config, tokenizer.vocab_size).eval()
    return write_run(
        tmp_path / "run", config, method, tokenizer, Card(mgca.recipe([]).origin, "vit_base.ckpt")
    )


def test_weights_of_mgca_see_the_middle_of_the_square_that_its_evaluation_cuts(run: Path) -> None:
    model = medvlp.load(run, "cpu")
    middle = torch.from_numpy(np.ascontiguousarray(IMAGE[16:240, 16:240]))[None, None]
    with torch.no_grad():
        expected = model.method.image_features(middle)
    torch.testing.assert_close(model.image_features(IMAGE), expected)
    assert "fitted into 256 x 256, of which evaluation sees the middle" in (run / "README.md").read_text()


def test_a_dataset_of_other_squares_is_told(run: Path, data: Path) -> None:
    source, said = saved_run.locate(run), list[str]()
    config = saved_run.load_config(source, [], str(data))
    saved_run.check_data(source, config, open_reader(config.data).index, True, said.append)
    assert "the middle 224 of 256 pixels" in said[-1]


@pytest.mark.parametrize("side", ["0", "-256", "1e9", "256 "])
def test_a_side_that_is_none_is_refused(side: str, run: Path) -> None:
    source = saved_run.locate(run)
    assert source.stored is not None
    source.stored[0].origin["stored_side"] = side
    with pytest.raises(IdentityError, match="no side in pixels"):
        saved_run.stored_side(source, saved_run.load_config(source, [], reads_data=False))


def test_the_side_is_part_of_what_a_checkpoint_belongs_to(run: Path) -> None:
    identity = json.loads((run / IDENTITY).read_text())
    identity["origin"]["stored_side"] = "512"
    (run / IDENTITY).write_text(json.dumps(identity))
    with pytest.raises(IdentityError, match="not of the run's checkpoint"):
        medvlp.load(run, "cpu")


@pytest.mark.parametrize("recipe", [prior.recipe([]), prior.image_recipe(), medslip.recipe([])])
def test_prior_and_medslip_see_the_whole_image(recipe: prior.Recipe, tmp_path: Path) -> None:
    config: Config = config_of(recipe.values, tmp_path)
    assert evaluation_crop(config.data.transform) == "none"
    seen = see(IMAGE, 256, config.data.image_size, evaluation_crop(config.data.transform))
    assert (seen.where.left, seen.where.top, seen.where.width) == (0, 0, 256)


@pytest.mark.parametrize(
    ("facts", "stored", "seen"),
    [
        ({"crop_pct": 0.5}, 64, 32),
        ({"crop_pct": 32 / 48}, 48, 32),
        ({"crop_pct": 1.0}, 32, 32),
        ({"crop_pct": 0.5, "crop_mode": "squash"}, 32, 32),
    ],
)
def test_a_backbone_of_timm_sees_what_timm_evaluates(
    facts: dict[str, Any], stored: int, seen: int, tmp_path: Path
) -> None:
    backbone = timm.create_model("resnet10t", in_chans=1, num_classes=0)
    described = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_mode": "center"} | facts
    save_for_hf(backbone, str(tmp_path / "timm"), safe_serialization=True, data_config=described)
    run = import_timm(str(tmp_path / "timm"), tmp_path / "run", print)
    model = medvlp.load(run, "cpu")
    where = model._seen(IMAGE).where
    assert (model._stored, where.width) == (stored, seen)
    larger = see(IMAGE, 256, 32, evaluation_crop(model.config.data.transform))
    assert larger.where.width == (32 if stored > 32 else 256), "of a dataset the middle, or all"

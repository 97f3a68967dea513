"""Configs of imported checkpoints hold what the published code does, as the official configs do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from medvlp import config_files
from medvlp.methods.registry import schemas
from medvlp.published import medslip, mgca, prior
from medvlp.published.recipe import Recipe
from medvlp.published.run import config_of
from medvlp.run_page.history import flat

#: Where weights and words come from: the file and the folder of the run, not the hub.
SOURCES = {"image.name", "image.pretrained", "data.tokenizer", "text.name"}
#: An import trains further as stage 3 alone, in fp32, and draws no noise at test time (its card says so).
PRIOR = {
    "optimizer.phases", "optimizer.lr", "optimizer.min_lr", "optimizer.warmup", "train.epochs", "precision",
    "method.bank_noise",
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "files", "words", "allowed"),
    [
        (mgca.recipe([]), ["mgca", "mgca-official"], [], set()),
        (
            mgca.recipe(["img_encoder_q.model.layer1.x"]),
            ["mgca-resnet50", "mgca-official"],
            ["method.normalise_patch_context=true"],  # as mgca-official.yaml says of a ResNet
            set(),
        ),
        (prior.recipe([]), ["prior", "prior-official"], [], PRIOR),
        (medslip.recipe([]), ["medslip", "medslip-official"], [], set()),
    ],
)
def test_an_import_behaves_as_the_official_config(
    repository: Path, tmp_path: Path, recipe: Recipe, files: list[str], words: list[str], allowed: set[str]
) -> None:
    """Training that went on from an import masked samples of one study, and took lateral films."""
    folder, given = repository / "configs" / "methods", [f"run.dir={tmp_path}", "data.root=unknown", *words]
    official = config_files.load([folder / f"{name}.yaml" for name in files], given, schemas())
    imported = config_of(recipe.values, tmp_path)
    one, other = (dict[str, Any](flat(asdict(config))) for config in (imported, official))
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    # The text model that the official config names is described by options here.
    assert {key for key in differing if not key.startswith("text.options")} - SOURCES == allowed

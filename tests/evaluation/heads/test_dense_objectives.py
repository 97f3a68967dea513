"""Segmentation and detection trained: losses, frozen batch norms, both tasks from end to end on phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medvlp.config import ImageConfig
from medvlp.data.batch import Batch, Text
from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.heads import boxes, masks
from medvlp.evaluation.heads.detection import Detection
from medvlp.evaluation.heads.pyramids import encoder_of
from medvlp.evaluation.heads.segmentation import Segmentation
from medvlp.evaluation.report import examples
from medvlp.evaluation.supervised import train_here
from medvlp.evaluation.task import EvaluationError
from shards.reader import ShardReader
from tests.launcher.tiny_run import make_run, make_shards

RESNET = ImageConfig(name="resnet10t", options={"channels": [8, 8, 16, 24], "stem_width": 8})
SIZE = 32


class Seeing(nn.Module):
    """As much of a method as a head reads."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        config = ImageConfig(name=RESNET.name, options=RESNET.options, frozen=frozen)
        self.image_encoder = ImageEncoder(config, SIZE)


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (4, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    drawn = (torch.rand(4, 2, SIZE, SIZE, generator=generator) < 0.2).to(torch.uint8)
    drawn[0, 1] = 255
    held = torch.tensor(
        [[[0.0, 4, 4, 20, 20]], [[1.0, 8, 2, 30, 20]], [[-1.0, 0, 0, 0, 0]], [[0.0, 1, 1, 9, 9]]]
    )
    labels = torch.tensor([[1.0, 0], [0, 1], [0, 0], [-1, 0]])
    ids = torch.zeros(4, 1, dtype=torch.long)
    keys = [str(i) for i in range(4)]
    text, fields = Text(ids, ids, ids, ids), {"masks": drawn, "boxes": held}
    return Batch(image, text, torch.arange(4), labels, keys, fields=fields)


@pytest.mark.parametrize("loss", ["ours", "mgca", "medslip", "mrm"])
def test_what_is_unknown_changes_no_loss(loss: Any) -> None:
    torch.manual_seed(0)
    method: Any = Seeing(frozen=False)
    head = masks.build_head("unet", method.image_encoder, 2)
    objective = Segmentation(method, head, [0, 1], loss, [np.nan] * 2).eval()
    first, other = batch(), batch()
    other.fields["masks"][3, 0] = 1 - other.fields["masks"][3, 0]  # hedged
    assert objective(first).loss == objective(other).loss
    other.fields["masks"][2, 0] = 1 - other.fields["masks"][2, 0]
    assert objective(first).loss != objective(other).loss
    nothing = batch()
    nothing.fields["masks"][:] = 255
    objective(nothing).loss.backward()
    assert objective(nothing).loss == 0
    assert objective.predict(first)["pixels"].shape == (4, 2, 50, 3)


@pytest.mark.parametrize("loss", ["ours", "mgca"])
def test_our_head_begins_with_empty_masks_a_published_one_with_half_of_each(loss: Any) -> None:
    torch.manual_seed(0)
    method: Any = Seeing(frozen=False)
    head = masks.build_head("unet", method.image_encoder, 2)
    objective = Segmentation(method, head, [0, 1], loss, [np.nan] * 2)
    logits = objective._answers(batch())[0]
    low, high = (0.001, 0.05) if loss == "ours" else (0.2, 0.8)
    assert low < logits.mean().sigmoid() < high


@pytest.mark.parametrize("task", ["masks", "boxes"])
def test_frozen_batch_norms_stand_still_unless_they_drift_as_published(task: str) -> None:
    for drifting in (False, True):
        torch.manual_seed(0)
        method: Any = Seeing(frozen=True)
        objective: Segmentation | Detection
        if task == "masks":
            head = masks.build_head("unet", method.image_encoder, 2)
            objective = Segmentation(method, head, [0, 1], "ours", [np.nan] * 2, drifting)
        else:
            found = boxes.build_head("retinanet", method.image_encoder, 2)
            objective = Detection(method, found, [0, 1], boxes.Suppression(), drifting=drifting)
        before = {name: of.clone() for name, of in method.image_encoder.named_buffers() if "running" in name}
        first = method.image_encoder.eval().pyramid(batch().image)[-1]
        objective.train()(batch()).loss.backward()
        after = dict(method.image_encoder.named_buffers())
        assert any(not torch.equal(after[name], of) for name, of in before.items()) == drifting
        assert all(parameter.grad is None for parameter in method.image_encoder.parameters())
        assert all(parameter.grad is not None for parameter in objective.head.parameters())
        second = method.image_encoder.eval().pyramid(batch().image)[-1]
        assert torch.equal(first, second) != drifting


def test_a_method_without_an_image_encoder_is_refused() -> None:
    nothing: Any = nn.Module()
    with pytest.raises(EvaluationError, match="no image encoder"):
        encoder_of(nothing)


FAST = [
    "evaluation.bootstrap=20", "monitor.wandb=disabled", "monitor.progress=false", "zero.stage=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    shards = make_shards(folder / "phantom")
    options = "image.options={channels: [8, 8, 16, 24], stem_width: 8}"
    return make_run(shards, folder / "run", "image.name=resnet10t", options)


@pytest.mark.parametrize(
    ("task", "models", "metric"),
    [
        ("segmentation", ["trained", "untrained", "pixels", "mean-mask", "empty"], "dice_all@50%/macro"),
        ("detection", ["trained", "untrained", "pixels", "mean-box"], "map_40_75@50%/macro"),
    ],
)
def test_a_task_on_phantoms_from_end_to_end(run: Path, task: str, models: list[str], metric: str) -> None:
    where = f"evaluation.tasks.{task}"
    words = [
        f"{where}.fractions=[0.5]",
        f"{where}.training={{train: {{steps: 2, min_steps: 0, global_batch: 4, threads: 1}}}}",
    ]
    options = EvaluationOptions(run, tasks=[task], overrides=[*FAST, *words], train=train_here)
    found = evaluate(options, lambda line: None)
    assert list(found.results[task]) == models
    for model in models:
        value = found.results[task][model][metric]
        assert 0 <= value.value <= 1
        assert value.low is not None
    assert set(found.notes[task]["training"]) == {"fraction-0.5-seed-0"}
    kept = examples.read(run, found, task, "fraction-0.5-seed-0")
    assert (kept.side, kept.crop) == (32, "none")
    reader = ShardReader(Path(found.data["root"]))
    for mask in kept.masks:
        stored = reader.masks("test", mask.sample)[mask.finding]
        np.testing.assert_array_equal(examples.mask_of(mask.truth, 32), stored)
    for of in kept.boxes:
        held = reader.metadata("test", of.sample)["boxes"]
        places = [(box["label"], box["x"], box["y"]) for box in held]
        assert of.truth
        assert {(box.finding, box.left, box.top) for box in of.truth} <= set(places)
    assert len(kept.masks if task == "segmentation" else kept.boxes) >= 6
    # By which `compare --published` finds the rows of this test set.
    assert found.data["splits"]["test"] == {
        "samples": reader.sample_count("test"),
        "patients": reader.index.splits["test"].patients,
        "corrupt": 0,
    }
    again: list[str] = []
    evaluate(options, again.append)
    assert any("is finished" in line for line in again)

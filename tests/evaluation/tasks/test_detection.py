"""Detection: what images hold, baselines, published switches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.evaluation.box_baselines import taught
from medvlp.evaluation.examples import Box
from medvlp.evaluation.heads.detection import box_truth, held_rows
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.task import EvaluationError, TaskResult, Unit
from medvlp.evaluation.tasks.detection import Detection, DetectionConfig
from medvlp.evaluation.trained import Fitted
from medvlp.training.predictions import Predictions

NAMES = ["mass", "edema", "scar"]
SIZE, COUNT = 64, 24
BOX = [8.0, 8.0, 40.0, 40.0]
ALL = torch.arange(3)


def batch_of(boxes: list[list[list[float]]], labels: list[list[float]]) -> Batch:
    """Of each image the boxes [label, left, top, right, bottom] and the labels."""
    most = max(len(of) for of in boxes)
    table = torch.full((len(boxes), most, 5), 0.0)
    table[:, :, 0] = -1
    for row, of in zip(table, boxes, strict=True):
        for place, box in zip(row, of, strict=False):
            place[:] = torch.tensor(box)
    image = torch.zeros(len(boxes), 1, SIZE, SIZE, dtype=torch.uint8)
    for i, of in enumerate(boxes):
        for _, left, top, right, bottom in of:
            image[i, 0, int(top) : int(bottom), int(left) : int(right)] = 200
    ids = torch.zeros(len(boxes), 1, dtype=torch.long)
    keys = [str(i) for i in range(len(boxes))]
    return Batch(
        image, Text(ids, ids, ids, ids), ids[:, 0], torch.tensor(labels), keys, fields={"boxes": table}
    )


def made(start: int, end: int) -> Batch:
    """A mass in two of three images, left or right; no edema; "scar" never looked for."""
    boxes, labels = [], []
    for row in range(start, end):
        left = 4.0 + 24.0 * (row % 2)
        boxes.append([[0, left, 8.0, left + 32, 40.0]] if row % 3 else [])
        labels.append([float(row % 3 > 0), 0.0, float("nan")])
    return batch_of(boxes, labels)


def batches() -> list[Batch]:
    return [made(start, min(start + 7, COUNT)) for start in range(0, COUNT, 7)]


class Rows:
    """What `score` asks of a network and of a view: images of the split, patients, resamples."""

    facts = SimpleNamespace(roles={"evaluated": "test"}, index=SimpleNamespace(label_names=NAMES))
    config = Config()
    config.data.image_size = SIZE

    def batches(self, view: Any, role: str, positions: np.ndarray) -> list[Batch]:
        assert (role, len(positions)) == ("evaluated", COUNT)
        return batches()

    def patients(self, role: str, sample: np.ndarray) -> np.ndarray:
        return sample // 2

    def bootstrap(self, patients: np.ndarray) -> PatientBootstrap:
        return PatientBootstrap(patients, 30, 0)


def predictions(shift: float, confidence: float) -> Predictions:
    """Of a network that finds every mass `shift` pixels beside itself, in half of the images hesitantly."""
    held = torch.cat([held_rows(box_truth(batch, ALL, 2.0)) for batch in batches()]).numpy()
    found = np.full((COUNT, 100, 6), -1.0)
    for row, of in enumerate(held):
        mass = of[(of[:, 4] == 0) & (of[:, 5] == 0)]
        for place, box in zip(found[row], mass, strict=False):
            left, top, right, bottom = box[:4]
            place[:] = [left + shift, top, right + shift, bottom, 0, confidence if row % 2 else 0.9]
    return Predictions(np.arange(COUNT), {"found": found, "held": held})


def scored(trained: Predictions | None = None, **settings: Any) -> TaskResult:
    task, rows = Detection(DetectionConfig(**settings)), Rows()
    networks = {
        "trained": predictions(0, 0.3) if trained is None else trained,
        "untrained": predictions(14, 0.3),
    }
    fitted = Fitted({"trained": rows}, NAMES, taught(batches(), [0, 1, 2], 2.0))  # type: ignore[dict-item]
    return task.score(rows, Unit(1.0, 0), networks, fitted)  # type: ignore[arg-type]


def test_what_images_hold() -> None:
    batch = batch_of(
        [[[0, *BOX], [1, *BOX], [0, 1, 1, 2.5, 30]], []],
        [[1.0, -1.0, 0.0], [1.0, 0.0, float("nan")]],
    )
    truth = box_truth(batch, ALL, smallest=2.0)
    (_, classes, hedged), (boxes, absent, doubtful) = map(truth.of, (0, 1))
    assert classes.tolist() == [0, 1, 0]
    assert hedged.tolist() == [False, True, True]
    assert absent.tolist() == [0, 2]
    assert doubtful.all()
    assert boxes.tolist() == [[0, 0, SIZE, SIZE]] * 2
    assert truth.anywhere.tolist() == [[False] * 3, [True, False, True]]
    learned = box_truth(batch, ALL, smallest=2.0, as_boxes=False)
    assert [len(learned.of(image)[0]) for image in (0, 1)] == [3, 0]
    assert learned.anywhere.equal(truth.anywhere)
    assert box_truth(batch, torch.tensor([1]), smallest=2.0).of(0)[1].tolist() == [0]
    nowhere = batch_of([[], []], [[0.0, 0.0, 1.0]] * 2)
    assert box_truth(nowhere, ALL, 2.0, as_boxes=False).classes.tolist() == [[-1], [-1]]
    rows = held_rows(truth)
    assert rows.shape == (2, 100, 6)
    assert (rows[0, 3:] == -1).all()
    assert rows[0, 1].tolist() == [*BOX, 1, 1]
    many = batch_of([[[0, *BOX]] * 101], [[1.0, 0.0, 0.0]])
    with pytest.raises(EvaluationError, match="more than 100"):
        held_rows(box_truth(many, torch.tensor([0]), 2.0))


def test_networks_stand_beside_boxes_without_a_network() -> None:
    result = scored()
    value = {model: {name: of.value for name, of in found.items()} for model, found in result.models.items()}
    assert list(value) == ["trained", "untrained", "pixels", "mean-box"]
    assert value["trained"]["map_50_95/macro"] == pytest.approx(1.0)
    assert value["untrained"]["ap50/mass"] == 0
    assert value["pixels"]["ap50/mass"] > 0.9 > value["mean-box"]["ap50/mass"]
    assert result.notes["boxes"] == {"mass": 16, "edema": 0, "scar": 0}
    assert [of["finding"] for of in result.notes["not_evaluable"]] == ["edema", "scar"]
    assert not [name for name in value["trained"] if name.endswith(("edema", "scar"))]


def test_examples_hold_found_and_true_boxes_of_images_that_have_some() -> None:
    found = predictions(14, 0.3)
    found.arrays["found"][1, 1] = [-5, 0, 70, 20, 1, 0.95]
    examples = scored(found).examples
    assert examples is not None
    assert [of.sample for of in examples.boxes] == [1, 2, 4, 5, 7, 8]
    first, second = examples.boxes[:2]
    assert first.truth == [Box("mass", 28, 8, 60, 40)]
    assert first.found == [Box("edema", 0, 0, 64, 20, 0.95), Box("mass", 42, 8, 64, 40, 0.3)]
    assert second.found == [Box("mass", 18, 8, 50, 40, 0.9)]


def test_published_switches_change_numbers_in_their_direction() -> None:
    metric = "map_40_75/mass"
    assert scored().models["trained"][metric].value == pytest.approx(1.0)
    cut = scored(min_confidence=0.5)
    assert cut.models["trained"][metric].value == pytest.approx(51 / 101)
    skipped = scored(min_confidence=0.5, skip_images="no_prediction_or_no_box")
    assert skipped.models["trained"][metric].value == pytest.approx(1.0)


def test_validation_gives_the_metric_that_chooses_the_epoch() -> None:
    data: Any = SimpleNamespace(reader=SimpleNamespace(index=SimpleNamespace(label_names=NAMES)))
    found = Detection(DetectionConfig()).metrics(predictions(0, 0.3), data)
    assert found["map_40_75/macro"] == pytest.approx(1.0)


def test_without_a_box_there_is_no_result() -> None:
    nothing = predictions(0, 0.3)
    nothing.arrays["held"][:] = -1
    with pytest.raises(EvaluationError, match="no box to be found"):
        scored(nothing)

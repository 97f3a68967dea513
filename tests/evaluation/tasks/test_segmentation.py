"""Segmentation: what is counted and known, thresholds of the selection split, baselines, switches."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import Config, ConfigError
from medvlp.data.batch import Batch, Text
from medvlp.data.fields import Masks
from medvlp.evaluation.heads import segmentation as heads
from medvlp.evaluation.heads.segmentation import mask_counts, mask_truth
from medvlp.evaluation.mask_baselines import taught
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.segmentation import THRESHOLDS, pixel_counts
from medvlp.evaluation.report.examples import mask_of
from medvlp.evaluation.task import TaskResult, Unit
from medvlp.evaluation.tasks.segmentation import Chosen, Segmentation, SegmentationConfig, _counted, _counts
from medvlp.evaluation.trained import Fitted
from medvlp.training.predictions import Predictions
from shards.errors import NotFiniteError

NAMES = ["mass", "edema", "scar"]
SIZE, COUNT = 32, 24
#: Columns of the findings, and what hedged ones teach: nothing.
ALL, NOTHING = torch.arange(3), torch.full((3,), torch.nan)


def made(rows: np.ndarray, seed: int = 0) -> Batch:
    """Images with a bright square where the mass is, in two of three images; "edema" is hedged in every
    fourth, "scar" has no masks."""
    masks = torch.zeros(len(rows), 3, SIZE, SIZE, dtype=torch.uint8)
    masks[:, 2] = Masks.UNKNOWN
    labels = torch.zeros(len(rows), 3)
    image = torch.zeros(len(rows), 1, SIZE, SIZE, dtype=torch.uint8)
    for i, row in enumerate(rows.tolist()):
        y, x = np.random.default_rng([seed, row]).integers(0, 2, 2) * 16
        if row % 3:
            masks[i, 0, y : y + 16, x : x + 16] = 1
            labels[i, 0] = 1
        if row % 2 == 0:
            masks[i, 1, 8:24, 8:24] = 1
            labels[i, 1] = -1 if row % 4 == 0 else 1
        image[i, 0] = masks[i, 0] * 200
    sample = torch.from_numpy(rows)
    ids = torch.zeros(len(rows), 1, dtype=torch.long)
    text = Text(ids, ids, ids, ids)
    return Batch(image, text, sample, labels, [str(row) for row in rows], fields={"masks": masks})


def batches() -> list[Batch]:
    return [made(np.arange(start, min(start + 7, COUNT))) for start in range(0, COUNT, 7)]


class Drawing(heads.Segmentation):
    """Draws the truth, moved to the right by 4 pixels, with probability 0.7."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.register_buffer("columns", ALL)
        self.register_buffer("uncertain", NOTHING)

    def _answers(self, batch: Batch) -> list[torch.Tensor]:
        truth, _ = mask_truth(batch, ALL, NOTHING)
        return [(truth.roll(4, 3).float() * 0.7 + 0.1).logit()]


class Rows:
    """What `score` asks of a network and of a view: images of the split, patients, resamples."""

    facts = SimpleNamespace(
        roles={"evaluated": "test", "selection": "valid"}, index=SimpleNamespace(label_names=NAMES)
    )

    config = Config()

    def batches(self, view: Any, role: str, positions: np.ndarray) -> list[Batch]:
        assert (role, len(positions)) == ("evaluated", COUNT)
        return batches()

    def predict(self, view: Any, role: str, positions: np.ndarray, look: Any) -> Predictions:
        assert role == "evaluated"
        rows = np.sort(positions)
        found = look(Drawing(), made(rows))
        return Predictions(rows, {name: of.numpy().astype(np.uint8) for name, of in found.items()})

    def patients(self, role: str, sample: np.ndarray) -> np.ndarray:
        return sample // 2

    def bootstrap(self, patients: np.ndarray) -> PatientBootstrap:
        return PatientBootstrap(patients, 50, 0)


def predictions(shift: int) -> Predictions:
    """Of a network that sees the truth moved to the right by `shift` pixels, with probability 0.7."""
    pixels, known = [], []
    for batch in batches():
        truth, of = mask_truth(batch, ALL, NOTHING)
        pixels.append(mask_counts(truth.roll(shift, 3).float() * 0.7 + 0.1, truth))
        known.append(of)
    arrays = {"pixels": torch.cat(pixels).numpy(), "known": torch.cat(known).numpy().astype(np.uint8)}
    return Predictions(np.arange(COUNT), arrays)


def scored(**settings: Any) -> TaskResult:
    task = Segmentation(SegmentationConfig(**settings))
    rows: Any = Rows()
    networks = {"trained": predictions(0), "untrained": predictions(4)}
    draws = taught(batches, lambda batch: mask_truth(batch, ALL, NOTHING))
    at = {model: dict.fromkeys(NAMES, 25) for model in (*networks, *draws)}
    fitted = Fitted({"trained": rows}, NAMES, Chosen(at, draws))
    return task.score(rows, Unit(1.0, 0), networks, fitted)


def test_pixels_are_counted_above_every_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(2, 3, 8, 8, generator=generator)
    probability[0, 0, 0, :3] = torch.tensor([0.0, 1.0, 0.5])
    truth = torch.rand(2, 3, 8, 8, generator=generator) < 0.4
    truth[1, 1] = False
    counts = mask_counts(probability, truth)
    assert counts.shape == (2, 3, THRESHOLDS, 3)
    for step in range(THRESHOLDS):
        called = probability.double().numpy() > step / THRESHOLDS
        np.testing.assert_array_equal(counts[:, :, step].numpy(), pixel_counts(called, truth.numpy()))
    broken = probability.clone()
    broken[1, 2, 0, 0] = torch.nan
    found = mask_counts(broken, truth)
    assert (found[1, 2] == -1).all()
    found[1, 2] = counts[1, 2]
    assert torch.equal(found, counts), "the other masks are counted"
    seen = Predictions(np.arange(2), {"pixels": mask_counts(broken, truth).numpy(), "known": np.ones((2, 3))})
    with pytest.raises(NotFiniteError, match="masks are NaN or infinite: if training has diverged"):
        _counts(seen)


def test_hedged_findings_and_those_without_a_mask_are_not_known() -> None:
    batch = made(np.arange(4))
    truth, known = mask_truth(batch, ALL, NOTHING)
    assert known.tolist() == [[True, row % 4 != 0, False] for row in range(4)]
    assert not truth[:, 2].any()
    truth, known = mask_truth(batch, torch.tensor([1]), torch.tensor([1.0]))
    assert known.all()
    assert truth[0].any()
    truth, known = mask_truth(batch, torch.tensor([1]), torch.tensor([0.0]))
    assert known.all()
    assert not truth[0].any()
    assert truth[2].any()


def test_networks_stand_beside_masks_without_a_network() -> None:
    result = scored()
    value = {model: {name: of.value for name, of in found.items()} for model, found in result.models.items()}
    assert list(value) == ["trained", "untrained", "pixels", "mean-mask", "empty"]
    assert value["trained"]["dice_all/macro"] == 1.0
    assert value["untrained"]["dice_pos/mass"] == pytest.approx(0.75)
    assert value["empty"]["dice_neg/mass"] == 1.0
    assert value["empty"]["dice_all/mass"] == pytest.approx(1 / 3)
    assert value["pixels"]["dice_pos/mass"] > 0.9 > value["mean-mask"]["dice_pos/mass"]
    assert value["mean-mask"]["dice_pos/edema"] == 1.0
    assert result.notes["counts"]["edema"] == {"positives": 6, "known": 18}
    assert [of["finding"] for of in result.notes["not_evaluable"]] == ["scar"]
    assert result.models["untrained"]["dice_pos/mass"].low is not None


def test_examples_are_of_every_finding_and_of_what_is_absent_and_show_what_was_drawn() -> None:
    examples = scored().examples
    assert examples is not None
    assert [(of.sample, of.finding) for of in examples.masks] == [
        (1, "mass"), (2, "edema"), (4, "mass"), (6, "edema"), (5, "mass"), (10, "edema"),
        (0, "mass"), (3, "edema"),
    ]  # fmt: skip
    assert (examples.side, examples.crop) == (SIZE, "center")
    for example in examples.masks:
        truth, _ = mask_truth(made(np.array([example.sample])), ALL, NOTHING)
        of = truth[0, NAMES.index(example.finding)].numpy()
        np.testing.assert_array_equal(mask_of(example.truth, SIZE), of)
        np.testing.assert_array_equal(mask_of(example.predicted, SIZE), np.roll(of, 4, 1))


def test_published_switches_change_numbers_in_their_direction() -> None:
    sound = scored().models
    dropped = scored(last_batch="drop", batch=16).models
    weighed = scored(reduction="batch_mean", batch=16).models
    smooth = scored(smooth=1.0).models
    metric = "dice_all/mass"
    empty = {name: of["empty"][metric].value for name, of in (("sound", sound), ("dropped", dropped))}
    assert empty == {"sound": pytest.approx(8 / 24), "dropped": pytest.approx(6 / 16)}
    assert weighed["empty"][metric].value == pytest.approx((6 / 16 + 2 / 8) / 2)
    assert smooth["empty"]["iou_pos/mass"].value == pytest.approx(1 / 257)
    assert sound["empty"]["iou_pos/mass"].value == 0


def test_masks_are_read_batch_by_batch_and_not_kept() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def read() -> Iterator[Batch]:
        for start in range(0, 40, 4):
            batch = made(np.arange(start, start + 4))
            held.append(weakref.ref(batch.fields["masks"]))
            alive.append(sum(of() is not None for of in held))
            yield batch

    def truth(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return mask_truth(batch, ALL, NOTHING)

    _counted(taught(read, truth), read(), truth)
    assert len(alive) == 30
    assert max(alive) <= 2


def test_thresholds_are_chosen_on_the_selection_alone_or_fixed() -> None:
    task = Segmentation(SegmentationConfig())
    of = predictions(0)
    pixels, known = of.arrays["pixels"], of.arrays["known"].astype(bool)
    chosen = task._thresholds(NAMES, pixels, known)
    assert 0.1 <= chosen["mass"] / THRESHOLDS < 0.8
    assert chosen["scar"] == THRESHOLDS // 2
    fixed = Segmentation(SegmentationConfig(threshold=0.5))._thresholds(NAMES, pixels, known)
    assert set(fixed.values()) == {THRESHOLDS // 2}
    data: Any = SimpleNamespace(reader=SimpleNamespace(index=SimpleNamespace(label_names=NAMES)))
    assert task.metrics(of, data) == {"dice/mass": 1.0, "dice/edema": 1.0, "dice/macro": 1.0}
    with pytest.raises(ConfigError, match=r"multiples of 0\.02"):
        SegmentationConfig(threshold=0.333).check(Config())

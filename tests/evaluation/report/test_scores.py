"""The file of scores: it comes back as it was, and is read only if it is the one the evaluation means."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from medvlp.evaluation.report import scores
from medvlp.evaluation.report.curves import lines_of
from medvlp.evaluation.report.results import FOLDER, Evaluation, KeptFile
from medvlp.evaluation.task import EvaluationError, Scores

FINGERPRINT = "0123456789abcdef" * 2
MADE = Scores(
    np.array([3, 5, 9]),
    ["edema", "mass"],
    np.array([[1, 0], [np.nan, 1], [0, 0]]),
    {"trained": np.array([[0.1, 1 / 3], [2, -1], [0, 0]]), "pixels": np.zeros((3, 2))},
    {"trained": {"edema": 1 / 3}},
    frozenset({"trained"}),
)


def kept(run: Path, checksum: str, task: str = "toy", unit: str = "whole") -> Evaluation:
    return Evaluation({}, {}, {}, scores={task: {unit: KeptFile(FINGERPRINT, checksum)}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / FOLDER / "toy" / f"whole-{FINGERPRINT[:16]}"
    place.mkdir(parents=True)
    return place


@pytest.mark.parametrize("order", ["C", "F"])
def test_they_come_back_to_the_last_bit(order: Literal["C", "F"], tmp_path: Path, folder: Path) -> None:
    laid = {model: np.asarray(of, order=order) for model, of in MADE.models.items()}
    checksum = scores.write(
        dataclasses.replace(MADE, truth=np.asarray(MADE.truth, order=order), models=laid), folder
    )
    found = scores.read(tmp_path, kept(tmp_path, checksum), "toy", "whole")
    for item in dataclasses.fields(Scores):
        np.testing.assert_equal(getattr(found, item.name), getattr(MADE, item.name))
    assert set(load_file(folder / scores.FILE)) == {"sample", "truth", "scores/trained", "scores/pixels"}


def test_another_file_at_their_place_is_refused(tmp_path: Path, folder: Path) -> None:
    checksum = scores.write(MADE, folder)
    scores.write(dataclasses.replace(MADE, truth=np.zeros((3, 2))), folder)
    with pytest.raises(EvaluationError, match="not the scores of this evaluation"):
        scores.read(tmp_path, kept(tmp_path, checksum), "toy", "whole")
    (folder / scores.FILE).unlink()
    with pytest.raises(EvaluationError, match="cannot be read"):
        scores.read(tmp_path, kept(tmp_path, checksum), "toy", "whole")
    for task, unit in (("../toy", "whole"), ("toy", "../whole"), ("other", "whole")):
        of = kept(tmp_path, checksum, *(("toy", "whole") if task == "other" else (task, unit)))
        with pytest.raises(EvaluationError, match="no scores are stored"):
            scores.read(tmp_path, of, task, unit)


def test_too_many_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "LIMIT", 100)
    assert scores.write(MADE, folder) == ""
    assert not (folder / scores.FILE).exists()


def test_rubbish_is_one_line(tmp_path: Path, folder: Path) -> None:
    """Also where a stranger's evaluation.json has the checksum of the rubbish."""
    scores.write(MADE, folder)
    file, draw = folder / scores.FILE, random.Random(0)
    whole = file.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.3 else data)
        checksum = xxhash.xxh3_128_hexdigest(file.read_bytes())
        try:
            found = scores.read(tmp_path, kept(tmp_path, checksum), "toy", "whole")
        except EvaluationError:  # any other exception fails the test
            refused += 1
        else:
            assert all(np.isfinite(of).all() and of.shape == (3, 2) for of in found.models.values())
    assert refused > 100


def test_a_model_has_the_same_place_in_every_plot() -> None:
    models = dict.fromkeys(("untrained", "pixels", "trained"), MADE.models["trained"])
    of = dataclasses.replace(MADE, models=models, truth=np.array([[1, 0], [0, 1], [0, 0]]))
    assert {tuple(lines.whole) for lines in lines_of(of)[:2]} == {("trained", "pixels", "untrained")}

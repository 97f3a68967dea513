"""Examples of a unit: which are chosen, their file, and what of a file is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from medvlp.evaluation.examples import (
    Box,
    BoxExample,
    Examples,
    TextExample,
    by_finding,
    evenly,
    mask_example,
)
from medvlp.evaluation.report import examples as files
from medvlp.evaluation.report.results import FOLDER, Evaluation, KeptFile
from medvlp.evaluation.task import EvaluationError

MASK = np.zeros((8, 8), dtype=bool)
MASK[2:5, 3:7] = True
MADE = Examples(
    "The first ones.", 8, "center",
    [mask_example(3, "edema", MASK, ~MASK), mask_example(4, "mass", MASK & False, MASK)],
    [BoxExample(0, [Box("mass", 1, 2, 3, 4, 0.5)], [Box("mass", 0, 0, 8, 8)])],
    [TextExample(7, "no effusion .", "small effusion é .")],
)  # fmt: skip


def stored(run: Path, examples: Examples = MADE) -> Evaluation:
    """An evaluation whose unit "whole" of "toy" has these examples."""
    folder = run / FOLDER / "toy" / f"whole-{'0' * 16}"
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(model={}, data={}, settings={})
    evaluation.examples = {"toy": {"whole": KeptFile("0" * 32, files.write(examples, folder))}}
    return evaluation


def test_the_findings_take_turns_and_no_sample_comes_twice() -> None:
    shows = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=bool)
    assert by_finding(shows, 6) == [(0, 0), (2, 1), (1, 0), (4, 0)]
    assert by_finding(shows, 3) == [(0, 0), (2, 1), (1, 0)]
    assert by_finding(np.zeros((4, 0), dtype=bool), 3) == []
    assert evenly(100, 3) == [0, 50, 99]
    assert evenly(2, 6) == [0, 1]
    assert evenly(1, 6) == [0]


def test_examples_come_back_as_they_were(tmp_path: Path) -> None:
    found = files.read(tmp_path, stored(tmp_path), "toy", "whole")
    assert found == MADE
    np.testing.assert_array_equal(files.mask_of(found.masks[0].predicted, 8), MASK)
    np.testing.assert_array_equal(files.mask_of(found.masks[0].truth, 8), ~MASK)
    assert not files.mask_of(found.masks[1].predicted, 8).any()


def test_what_is_not_stored_or_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="by a version that kept none"):
        files.read(tmp_path, Evaluation({}, {}, {}), "toy", "whole")
    evaluation = stored(tmp_path)
    stored(tmp_path, replace(MADE, chosen="Others."))
    with pytest.raises(EvaluationError, match="not the examples of this evaluation"):
        files.read(tmp_path, evaluation, "toy", "whole")
    next(tmp_path.rglob(files.FILE)).unlink()
    with pytest.raises(EvaluationError, match="cannot be read"):
        files.read(tmp_path, evaluation, "toy", "whole")
    escaping = Evaluation({}, {}, {}, examples={"..": {"whole": KeptFile("0", "0")}})
    with pytest.raises(EvaluationError, match="none"):
        files.read(tmp_path, escaping, "..", "whole")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("side", 1 << 20), ("side", 0), ("crop", "../x"),
        ("masks", [{"sample": -1, "finding": "edema", "predicted": "", "truth": ""}]),
        ("masks", [{"sample": 0, "finding": "edema", "predicted": "60 9", "truth": ""}]),
        ("masks", [{"sample": 0, "finding": "edema", "predicted": 3, "truth": ""}]),
        ("boxes", [{"sample": 0, "found": [], "truth": [asdict(Box("mass", 0, 0, 9, 1))]}]),
        ("boxes", [{"sample": 0, "found": [asdict(Box("mass", 0, 0, 1, 1, 1.0))] * 101, "truth": []}]),
        ("texts", [{"sample": 0, "generated": "x" * 20_001, "reference": ""}]),
        ("more", 1),
    ],
)  # fmt: skip
def test_files_of_strangers_that_cannot_be_drawn_are_refused(
    tmp_path: Path, name: str, value: object
) -> None:
    import xxhash

    evaluation = stored(tmp_path)
    data = json.dumps(asdict(MADE) | {name: value}).encode()
    next(tmp_path.rglob(files.FILE)).write_bytes(data)
    evaluation.examples["toy"]["whole"].checksum = xxhash.xxh3_128_hexdigest(data)
    with pytest.raises(EvaluationError, match="no examples of this program"):
        files.read(tmp_path, evaluation, "toy", "whole")


def test_a_file_that_would_be_too_large_is_not_written(tmp_path: Path) -> None:
    many = [TextExample(0, "x" * 1000, "")] * 5000
    assert files.write(replace(MADE, texts=many), tmp_path) == ""
    assert not list(tmp_path.iterdir())

"""Tasks evaluated apart become one evaluation, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report.joining import join
from medvlp.evaluation.report.results import Evaluation, EvaluationError


def part(task: str, split: str = "test", **changes: Any) -> Evaluation:
    evaluation = Evaluation(
        {"name": "run", "checkpoint": "step-00000004", "step": 4},
        {"root": "/data", "fingerprint": "x", "splits": {split: {"samples": 3}}},
        {"tasks": [task], "seed": 0},
        {task: {"trained": {"auroc": Estimate(0.7, 0.6, 0.8)}}},
        {task: {"threshold_split": split}},
        {"train": {"steps": 4}},
    )
    for name, value in changes.items():
        getattr(evaluation, name).update(value)
    return evaluation


def test_tasks_notes_and_splits_are_put_together() -> None:
    first, second = part("zero-shot"), part("retrieval", "valid")
    joined = join({Path("a.json"): first, Path("b.json"): second})
    assert joined.results == first.results | second.results
    assert joined.notes == first.notes | second.notes
    assert joined.settings == {"tasks": ["zero-shot", "retrieval"], "seed": 0}
    assert joined.data["splits"] == {"test": {"samples": 3}, "valid": {"samples": 3}}
    assert joined.model == first.model
    assert first.settings["tasks"] == ["zero-shot"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (part("retrieval", model={"checkpoint": "step-00000008"}), "another checkpoint than a.json"),
        (part("retrieval", data={"fingerprint": "y"}), "another data than a.json"),
        (part("retrieval", settings={"seed": 1}), "another settings than a.json"),
        (part("zero-shot"), "zero-shot is in another file too"),
    ],
)
def test_what_does_not_belong_together_is_refused(other: Evaluation, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        join({Path("a.json"): part("zero-shot"), Path("b.json"): other})

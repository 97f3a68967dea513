"""Retrieval on numbers whose answer is known: a perfect model, a blind one, duplicates, missing reports."""

from __future__ import annotations

import pytest

from medvlp.config import TaskConfig
from medvlp.evaluation.splits import Split
from medvlp.evaluation.task import EvaluationError
from medvlp.evaluation.tasks.retrieval import DIRECTIONS, Retrieval
from tests.evaluation.prepared import Prepared, make_splits


@pytest.fixture
def splits() -> dict[str, Split]:
    return make_splits()


def test_retrieval_beside_its_baselines_and_chance(splits: dict[str, Split]) -> None:
    result = Prepared(splits).run(Retrieval(TaskConfig()))
    for direction in DIRECTIONS:
        found = {model: metrics[f"{direction}/R@10"] for model, metrics in result.models.items()}
        assert found["trained"].low > found["chance"].value
        assert found["untrained"].low < found["chance"].value * 1.5
        assert found["pixels"].low > found["chance"].value, "the pixels hold the words of the reports"
        precision = {
            model: metrics[f"{direction}/P@5/edema"].value for model, metrics in result.models.items()
        }
        assert precision["trained"] > 0.8 > 0.6 > precision["untrained"]
        assert precision["chance"] == pytest.approx(splits["test"].labels[:, 0].mean())
    assert (
        result.notes["distinct_reports"] == len(set(splits["test"].reports)) < result.notes["queries"] == 160
    )


def test_retrieval_leaves_out_samples_without_a_report(splits: dict[str, Split]) -> None:
    test = splits["test"]
    test.reports[:100] = [" "] * 100
    alone = Prepared({"test": test})
    result = alone.run(Retrieval(TaskConfig()))
    assert (result.notes["queries"], result.notes["without_report"]) == (60, 100)
    assert "pixels" not in result.models
    assert {"finding": "edema", "reason": "P@100: only 60 labelled candidates"} in result.notes[
        "not_evaluable"
    ]
    test.reports[:] = [""] * 160
    with pytest.raises(EvaluationError, match="0 samples of test have a report"):
        alone.run(Retrieval(TaskConfig()))

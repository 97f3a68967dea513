"""Retrieval on numbers whose answer is known: a perfect model, a blind one, duplicates, missing reports."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medvlp.evaluation.metrics.ranking import average_precision, chance_average_precision
from medvlp.evaluation.splits import Split
from medvlp.evaluation.task import EvaluationError
from medvlp.evaluation.tasks import retrieval
from medvlp.evaluation.tasks.retrieval import DIRECTIONS, Retrieval, RetrievalConfig
from tests.evaluation.prepared import Prepared, make_splits


@pytest.fixture
def splits() -> dict[str, Split]:
    return make_splits()


def test_retrieval_beside_its_baselines_and_chance(splits: dict[str, Split]) -> None:
    result = Prepared(splits).run(Retrieval(RetrievalConfig()))
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


def test_pixels_are_taught_with_so_many_reports_at_most(
    splits: dict[str, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "MOST_REPORTS", 50)
    result = Prepared(splits).run(Retrieval(RetrievalConfig()))
    assert result.notes["pixels"] == "ridge regression to TF-IDF, trained on 50 reports of train"
    assert "image_to_text/R@10" in result.models["pixels"]


def test_retrieval_leaves_out_samples_without_a_report(splits: dict[str, Split]) -> None:
    test = splits["test"]
    test.reports[:100] = [" "] * 100
    alone = Prepared({"test": test})
    result = alone.run(Retrieval(RetrievalConfig()))
    assert (result.notes["queries"], result.notes["without_report"]) == (60, 100)
    assert "pixels" not in result.models
    assert {"finding": "edema", "reason": "P@100: only 60 labelled candidates"} in result.notes[
        "not_evaluable"
    ]
    test.reports[:] = [""] * 160
    with pytest.raises(EvaluationError, match="0 samples of test have a report"):
        alone.run(Retrieval(RetrievalConfig()))


def test_sentences_of_the_own_report_among_all(splits: dict[str, Split]) -> None:
    """Average precision as a loop counts it; a sentence that another report shares is correct for both."""
    test = splits["test"]
    said = ["Edema.", "no edema.", "A mass.", "no mass."]
    for split in splits.values():
        split.sentences = [
            [said[0 if labels[0] else 1], said[2 if labels[1] else 3].upper(), f"Remark {number % 40}."]
            for number, labels in enumerate(split.labels)
        ]
    distinct = list(dict.fromkeys(text.lower() for own in test.sentences for text in own))
    rng = np.random.default_rng(0)
    embedded = rng.normal(size=(len(distinct), 8))
    for place, text in enumerate(said):
        embedded[distinct.index(text.lower())] = 3 * np.eye(8)[place // 2] * (1 if place % 2 == 0 else -1)
    session = Prepared(splits, {"trained": embedded, "untrained": None})
    result = session.run(Retrieval(RetrievalConfig(sentences=True)))
    found = result.models["trained"]["image_to_sentence/AP"]
    expected = []
    for image, own in zip(test.arrays.models["trained"].image, test.sentences, strict=True):
        order = np.argsort(-(embedded @ image))
        hits = [distinct[place] in {text.lower() for text in own} for place in order]
        expected.append(np.mean([sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits) if hit]))
    assert found.value == pytest.approx(np.mean(expected))
    assert found.low < found.value < found.high
    assert found.low > result.models["chance"]["image_to_sentence/AP"].value
    assert result.models["pixels"]["image_to_sentence/AP"].low > 0
    assert "image_to_sentence/AP" not in result.models["untrained"], "it scores pairs in its own way"
    assert result.notes["distinct_sentences"] == len(distinct) == 44


def test_average_precision_of_ties_and_of_chance() -> None:
    alike = np.ones((2, 1))
    relevant = np.array([[True, False, False, False], [True, True, False, False]])
    np.testing.assert_allclose(average_precision(alike, np.ones((4, 1)), relevant), [1 / 4, 2 / 4])
    with pytest.raises(ValueError, match="no relevant candidate"):
        average_precision(alike, np.ones((4, 1)), ~relevant & False)
    orders = [
        np.mean([sum(order[: k + 1]) / (k + 1) for k, hit in enumerate(order) if hit])
        for order in set(itertools.permutations([1, 1, 0, 0, 0]))
    ]
    np.testing.assert_allclose(chance_average_precision(np.array([2]), 5), np.mean(orders))

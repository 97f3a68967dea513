"""Accuracy of answers: normalisation by examples, groups by a loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.data.questions import normalised
from medvlp.evaluation.metrics.answers import answer_accuracy, matches, reachable
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" Yes ", "yes"),
        ("The left lung.", "left lung"),
        ("two", "2"),
        ("None", "0"),
        ("X-ray", "x ray"),
        ("left/right", "left right"),
        ("left, right", "left right"),
        ("left , right-sided", "left right sided"),  # only the comma stands beside a space
        ("1,000 ml (left)", "1000 ml left"),
        ("2.5 cm", "2.5 cm"),
        ("cant be seen", "can't be seen"),
        ("it's its", "it's its"),
        ("a", ""),
        ("", ""),
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_only_32_periods_are_dropped() -> None:
    assert normalised("x." * 40) == "x" * 32 + "x." * 8


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_whitespace_never_matters_at_the_ends(text: str) -> None:
    assert normalised(f"  {text}\n") == normalised(text)
    assert normalised(text) == " ".join(normalised(text).split())


def test_kinds_are_pooled_and_topics_counted() -> None:
    rng = np.random.default_rng(0)
    count = 200
    truth = rng.choice(["yes", "no", "left", "two"], count).tolist()
    answers = rng.choice(["Yes.", "no", "the left", "2", "unheard of"], count).tolist()
    kinds = rng.choice(["CLOSED ", "open", ""], count).tolist()
    topics = rng.choice(["size", "Plane", ""], count).tolist()
    found = answer_accuracy(
        matches(answers, truth), kinds, topics, PatientBootstrap(np.arange(count) // 2, 100, 0)
    )
    same = {"yes": "Yes.", "no": "no", "left": "the left", "two": "2"}

    def share(keep: list[bool]) -> float:
        kept = [
            same[true] == answer for true, answer, chosen in zip(truth, answers, keep, strict=True) if chosen
        ]
        return sum(kept) / len(kept)

    assert found["accuracy/overall"].value == pytest.approx(share([True] * count))
    assert found["accuracy/closed"].value == pytest.approx(share([kind == "CLOSED " for kind in kinds]))
    assert found["accuracy/open"].value == pytest.approx(share([kind == "open" for kind in kinds]))
    assert found["accuracy/plane"].value == pytest.approx(share([topic == "Plane" for topic in topics]))
    assert set(found) == {f"accuracy/{name}" for name in ("overall", "closed", "open", "size", "plane")}
    mean = (found["accuracy/closed"].value + found["accuracy/open"].value) / 2
    assert found["accuracy/overall"].value != pytest.approx(mean, abs=1e-6)


def test_a_kind_without_questions_has_no_number() -> None:
    found = answer_accuracy(matches(["yes"], ["yes"]), ["closed"], [""], PatientBootstrap(["p"], 5, 0))
    assert set(found) == {"accuracy/overall", "accuracy/closed"}


def test_no_questions_and_unlike_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        answer_accuracy(matches([], []), [], [], PatientBootstrap([], 5, 0))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        matches(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="2 answers, 1 kinds and 1 topics"):
        answer_accuracy(np.ones(2, dtype=bool), [""], [""], PatientBootstrap(["p"], 5, 0))


def test_answers_that_only_the_test_split_has_are_out_of_reach() -> None:
    """With a vocabulary of all splits every answer can be reached: the published ceiling is higher."""
    train, test = ["yes", "No", "left"], ["no.", "right", "the left", "7"]
    assert reachable(test, {normalised(answer) for answer in train}) == 0.5
    assert reachable(test, {normalised(answer) for answer in train + test}) == 1

"""Accuracy of answers to questions: exact match after both sides are normalised (VQA's rules, as in M3AE)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np

from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap
from medvlp.evaluation.metrics.pairs import weighted_mean

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
#: Published code passes a flag where the count of replacements belongs, so that later periods stay.
_PERIODS = 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split(" "))} | {"none": "0"}
_NOT = "are ca could did does do had has have is might must need ought should was were wo would"
_IS = "that there what where who how here"
#: Words that have lost their apostrophe; those that are words of their own without it ("its", "well") stay.
_CONTRACTIONS = {f"{stem}nt": f"{stem}n't" for stem in _NOT.split(" ")} | {
    f"{stem}s": f"{stem}'s" for stem in _IS.split(" ")
}


def normalised(answer: str) -> str:
    """An answer as answers are compared.

    Lower case; a punctuation mark is taken away where it stands beside a space anywhere in the answer (all of
    them if a number has a comma), and becomes a space otherwise; periods that no digit follows are dropped
    (the first 32); number words become digits and "none" 0; articles are dropped; lost apostrophes put back.
    """
    text = answer.lower().replace("\n", " ").replace("\t", " ").strip()
    joined = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or joined else " ")
    words = [_DIGITS.get(word, word) for word in _LONE_PERIOD.sub("", result, count=_PERIODS).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_accuracy(
    answers: Sequence[str],
    truth: Sequence[str],
    kinds: Sequence[str],
    topics: Sequence[str],
    bootstrap: PatientBootstrap,
) -> dict[str, Estimate]:
    """Shares of right answers: of all questions pooled, of each kind, and of each topic.

    Args:
        answers, truth: of N questions. An answer that no vocabulary holds is wrong like any other.
        kinds: "closed", "open" or "", whatever their case and the spaces around them. topics: "" for none.
        bootstrap: resamples of the patients of the N questions.

    Returns:
        "accuracy/overall", "accuracy/closed", "accuracy/open", and "accuracy/<topic>"; a kind or topic of no
        question has no number. "overall" is not the mean of the two kinds.

    Raises:
        ValueError: no questions, or lists of unlike lengths.
    """
    if not truth:
        raise ValueError("no questions to score")
    right = np.array(
        [
            normalised(answer) == normalised(true)
            for answer, true, *_ in zip(answers, truth, kinds, topics, strict=True)
        ],
        dtype=np.float64,
    )
    groups = {"overall": np.arange(len(right))}
    plain_kinds = np.array([kind.strip().lower() for kind in kinds])
    groups |= {kind: np.flatnonzero(plain_kinds == kind) for kind in ("closed", "open")}
    plain_topics = np.array([topic.strip().lower() for topic in topics])
    groups |= {
        topic: np.flatnonzero(plain_topics == topic) for topic in np.unique(plain_topics[plain_topics != ""])
    }
    return {
        f"accuracy/{name}": bootstrap.estimate(partial(weighted_mean, right[rows]), rows)
        for name, rows in groups.items()
        if len(rows)
    }


def reachable(truth: Sequence[str], vocabulary: Collection[str]) -> float:
    """Share of questions whose normalised answer is in a vocabulary of normalised answers: the ceiling."""
    return float(np.mean([normalised(answer) in vocabulary for answer in truth]))

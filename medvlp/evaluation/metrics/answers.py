"""Accuracy of answers to questions: exact match after both sides are normalised."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medvlp.data.questions import normalised
from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap
from medvlp.evaluation.metrics.pairs import weighted_mean


def answer_accuracy(
    right: NDArray[np.bool_],
    kinds: Sequence[str],
    topics: Sequence[str],
    bootstrap: PatientBootstrap,
) -> dict[str, Estimate]:
    """Shares of right answers: of all questions pooled, of each kind, and of each topic.

    Args:
        right: [N] whether each of N questions is answered right (`matches`). An answer that no vocabulary
            holds is wrong like any other.
        kinds: "closed", "open" or "", whatever their case and the spaces around them. topics: "" for none.
        bootstrap: resamples of the patients of the N questions.

    Returns:
        "accuracy/overall", "accuracy/closed", "accuracy/open", and "accuracy/<topic>"; a kind or topic of no
        question has no number. "overall" is not the mean of the two kinds.

    Raises:
        ValueError: no questions, or lists of unlike lengths.
    """
    if len({len(right), len(kinds), len(topics)}) > 1:
        raise ValueError(f"{len(right)} answers, {len(kinds)} kinds and {len(topics)} topics")
    if not len(right):
        raise ValueError("no questions to score")
    values = right.astype(np.float64)
    groups = {"overall": np.arange(len(values))}
    plain_kinds = np.array([kind.strip().lower() for kind in kinds])
    groups |= {kind: np.flatnonzero(plain_kinds == kind) for kind in ("closed", "open")}
    plain_topics = np.array([topic.strip().lower() for topic in topics])
    groups |= {
        topic: np.flatnonzero(plain_topics == topic) for topic in np.unique(plain_topics[plain_topics != ""])
    }
    return {
        f"accuracy/{name}": bootstrap.estimate(partial(weighted_mean, values[rows]), rows)
        for name, rows in groups.items()
        if len(rows)
    }


def matches(answers: Sequence[str], truth: Sequence[str]) -> NDArray[np.bool_]:
    """[N] whether answers equal the true ones, both normalised.

    Raises:
        ValueError: lists of unlike lengths.
    """
    pairs = zip(answers, truth, strict=True)
    return np.array([normalised(answer) == normalised(true) for answer, true in pairs], dtype=bool)


def reachable(truth: Sequence[str], vocabulary: Collection[str]) -> float:
    """Share of questions whose normalised answer is in a vocabulary of normalised answers: the ceiling."""
    return float(np.mean([normalised(answer) in vocabulary for answer in truth]))

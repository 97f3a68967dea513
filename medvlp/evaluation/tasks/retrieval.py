"""Image-to-text and text-to-image retrieval among all samples of a split that have a report.

- `R@K`: share of queries with a correct candidate among the first K. Candidates with the same report text as
  the query's own are all correct. `median_rank` is the median rank of the best correct one.
- `P@K/<finding>`: queries are the samples with the finding; the share of the first K candidates whose own
  labels state it. Candidates without a label for it stand aside. `P@K/macro` is the mean over findings.

Intervals resample the queries by patient; the candidates stay as they are. Chance is that of a random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.baselines import report_embeddings
from medvlp.evaluation.labels import NotEvaluable, Uncertain, as_notes, binary, not_evaluable
from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, estimate
from medvlp.evaluation.metrics.ranking import (
    best_ranks,
    chance_median_rank,
    chance_miss,
    median_rank,
    precision_at,
    recall_at,
)
from medvlp.evaluation.report.results import EvaluationError, Metrics, TaskResult
from medvlp.evaluation.splits import Split, report_groups

RECALL_AT = (1, 5, 10)
PRECISION_AT = (5, 10, 100)
DIRECTIONS = ("image_to_text", "text_to_image")

Floats = NDArray[np.float64]


def evaluate(
    split: Split,
    train: Split | None,
    names: Sequence[str],
    columns: Sequence[int],
    uncertain: Uncertain,
    resamples: int,
    seed: int,
) -> TaskResult:
    """Both directions for every model in the split's arrays, the pixel baseline and chance.

    Args:
        split: evaluated split, with image and text embeddings of each model.
        train: split that teaches the pixel baseline; None leaves it out (noted).
        names, columns: labels of `P@K` and their positions; may be empty.
        uncertain: what becomes of uncertain labels.
        resamples, seed: bootstrap by patient.

    Raises:
        EvaluationError: fewer than two samples have a report.
    """
    rows = np.flatnonzero([bool(report.strip()) for report in split.reports])
    if len(rows) < 2:
        raise EvaluationError(
            f"retrieval: {len(rows)} samples of {split.name} have a report, it needs at least 2"
        )
    groups = report_groups([split.reports[row] for row in rows])
    bootstrap = PatientBootstrap(split.patients[rows], resamples, seed)
    truth = binary(split.labels[:, list(columns)], uncertain)[rows]
    listed = not_evaluable(truth, names, split.name)
    out = {item.finding for item in listed}
    classes = {name: truth[:, number] for number, name in enumerate(names) if name not in out}
    ranker = _Ranker(groups, classes, bootstrap)
    result = TaskResult(notes=as_notes(truth, names, listed + ranker.too_few()))
    result.notes |= {
        "queries": len(rows),
        "without_report": len(split.reports) - len(rows),
        "distinct_reports": int(groups.max()) + 1,
    }
    for model, arrays in split.arrays.models.items():
        assert arrays.image is not None, "image embeddings have been asked for"
        assert arrays.text is not None, "text embeddings have been asked for"
        result.models[model] = ranker.metrics(arrays.image[rows], arrays.text[rows])
    taught = [] if train is None else [row for row, report in enumerate(train.reports) if report.strip()]
    if train is not None and taught:
        images, texts = report_embeddings(
            train.ridge,
            np.array(taught),
            [train.reports[row] for row in taught],
            split.arrays.pixels[rows],
            [split.reports[row] for row in rows],
        )
        result.models["pixels"] = ranker.metrics(images, texts)
        result.notes["pixels"] = (
            f"ridge regression to TF-IDF, trained on {len(taught)} reports of {train.name}"
        )
    else:
        result.notes["pixels"] = "not available: the dataset has no training reports"
    result.models["chance"] = ranker.chance()
    return result


class _Ranker:
    """Metrics of N image-report pairs with report groups [N] and the labels [N] of each finding."""

    def __init__(self, groups: NDArray[Any], classes: dict[str, Floats], bootstrap: PatientBootstrap):
        self._groups, self._classes, self._bootstrap = groups, classes, bootstrap

    def too_few(self) -> list[NotEvaluable]:
        """Findings with fewer labelled candidates than the largest K."""
        sizes = {name: int((~np.isnan(labels)).sum()) for name, labels in self._classes.items()}
        return [
            NotEvaluable(name, f"P@{k}: only {size} labelled candidates")
            for name, size in sizes.items()
            for k in PRECISION_AT
            if size < k
        ]

    def metrics(self, images: NDArray[Any], texts: NDArray[Any]) -> Metrics:
        """Estimates by `<direction>/<metric>`."""
        found: Metrics = {}
        for direction, queries, gallery in zip(DIRECTIONS, (images, texts), (texts, images), strict=True):
            ranks = best_ranks(queries, gallery, self._groups, self._groups)
            for k in RECALL_AT:
                found[f"{direction}/R@{k}"] = self._bootstrap.estimate(partial(recall_at, ranks, k))
            found[f"{direction}/median_rank"] = self._bootstrap.estimate(partial(median_rank, ranks))
            for k in PRECISION_AT:
                found |= {
                    f"{direction}/P@{k}/{name}": value for name, value in self._precision(queries, gallery, k)
                }
        return found

    def _precision(self, queries: NDArray[Any], gallery: NDArray[Any], k: int) -> list[tuple[str, Estimate]]:
        macro, found = Macro(), []
        for name, labels in self._classes.items():
            known = ~np.isnan(labels)
            if known.sum() < k:
                continue
            rows = np.flatnonzero(labels == 1)
            precision = precision_at(queries[rows], gallery[known], labels[known] == 1, k)
            value, draws = float(precision.mean()), self._bootstrap.draws(partial(_mean, precision), rows)
            found.append((name, estimate(value, draws)))
            macro.add(value, draws)
        return [("macro", macro.estimate()), *found] if found else []

    def chance(self) -> Metrics:
        """The same metrics for a random order of the candidates."""
        correct = np.bincount(self._groups)[self._groups]
        candidates = len(self._groups)
        found: Metrics = {}
        for direction in DIRECTIONS:
            for k in RECALL_AT:
                found[f"{direction}/R@{k}"] = Estimate(1 - chance_miss(correct, candidates, k))
            found[f"{direction}/median_rank"] = Estimate(float(chance_median_rank(correct, candidates)))
            for k in PRECISION_AT:
                shares = {
                    name: float(np.nanmean(labels))
                    for name, labels in self._classes.items()
                    if (~np.isnan(labels)).sum() >= k
                }
                if shares:
                    found[f"{direction}/P@{k}/macro"] = Estimate(float(np.mean(list(shares.values()))))
                    found |= {f"{direction}/P@{k}/{name}": Estimate(share) for name, share in shares.items()}
        return found


def _mean(values: Floats, weights: Floats) -> Floats:
    """[R] means of `values` [n] under each row of weights [R, n]; NaN where all weights are 0."""
    total = weights.sum(axis=1)
    means: Floats = np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)
    return means

"""Image-to-text and text-to-image retrieval among all samples of a split that have a report.

- `R@K`: share of queries with a correct candidate among the first K. Candidates with the same report text as
  the query's own are all correct. `median_rank` is the median rank of the best correct one.
- `P@K/<finding>`: queries are the samples with the finding; the share of the first K candidates whose own
  labels state it. Candidates without a label for it stand aside. `P@K/macro` is the mean over findings.
- `image_to_sentence/AP` (key `sentences`): candidates are the distinct sentences of all reports, correct
  those of the image's own; average precision, mean over images. The same said in other words is wrong.

Intervals resample the queries by patient; the candidates stay as they are. Chance is that of a random order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvlp.config import TaskConfig, key
from medvlp.evaluation.baselines import MOST_REPORTS, ReportWords
from medvlp.evaluation.labels import NotEvaluable, as_notes, not_evaluable
from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, estimate
from medvlp.evaluation.metrics.ranking import (
    average_precision,
    best_ranks,
    chance_average_precision,
    chance_median_rank,
    chance_miss,
    median_rank,
    precision_at,
    recall_at,
)
from medvlp.evaluation.task import (
    EvaluationError,
    Facts,
    Metrics,
    Needs,
    Reading,
    Role,
    Task,
    TaskResult,
    Unit,
    register,
)

if TYPE_CHECKING:
    from medvlp.evaluation.session import View
    from medvlp.evaluation.splits import Split
    from medvlp.methods.base import Method

RECALL_AT = (1, 5, 10)
PRECISION_AT = (5, 10, 100)
DIRECTIONS = ("image_to_text", "text_to_image")

Floats = NDArray[np.float64]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def report_groups(reports: Sequence[str]) -> NDArray[np.int64]:
    """[N] numbers that are equal where report texts are equal but for case and white space."""
    plain = [_plain(report) for report in reports]
    return np.unique(np.asarray(plain, dtype=object), return_inverse=True)[1].astype(np.int64)


def _with_report(split: Split) -> NDArray[np.int64]:
    return np.flatnonzero([bool(report.strip()) for report in split.reports])


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    if "queries" not in notes:
        return []
    without = notes["without_report"]
    left_out = f", {without} samples without a report left out" if without else ""
    return [f"{notes['queries']} queries, {notes['distinct_reports']} distinct reports{left_out}"]


def _truth(data: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    """The order of the sections changes no text for another."""
    counts = {"queries": notes.get("queries"), "distinct reports": notes.get("distinct_reports")}
    return {"data.sections": sorted(data.get("sections", [])), **counts}


@dataclass
class RetrievalConfig(TaskConfig):
    sentences: bool = key(False, "also the sentences of an image's own report among those of all reports")


@register
class Retrieval(Task):
    """See the module."""

    name = "retrieval"
    config = RetrievalConfig
    settings: RetrievalConfig
    summary = "reports from images and images from reports, among all samples of the split"
    reading = Reading(
        names={
            "image_to_text": "image→text",
            "text_to_image": "text→image",
            "image_to_sentence": "image→sentence",
            "median_rank": "median rank",
        },
        summary=lambda metric: metric.endswith(("/macro", "/median_rank", "/AP")) or "/R@" in metric,
        whole=frozenset({"median_rank"}),
        remarks=_remarks,
        truth=_truth,
    )

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        return {"evaluated": Needs(image=True, text=True), "train": Needs()}

    def unavailable_with(self, method: Method) -> str | None:
        return None if method.embeds_reports and method.embeds_images else "does not embed reports"

    def fit(self, view: View, unit: Unit) -> tuple[ReportWords | None, str]:
        """Teach the pixel baseline the words of the training reports; and how it was taught."""
        train = view.split("train")
        taught = np.empty(0, dtype=np.int64) if train is None else _with_report(train)
        if train is None or not len(taught):
            return None, "not available: the dataset has no training reports"
        if len(taught) > MOST_REPORTS:  # evenly spread over the split
            taught = taught[np.linspace(0, len(taught) - 1, MOST_REPORTS).astype(int)]
        words = ReportWords(train.ridge, taught, [train.reports[row] for row in taught])
        return words, f"ridge regression to TF-IDF, trained on {len(taught)} reports of {train.name}"

    def measure(self, view: View, unit: Unit, fitted: tuple[ReportWords | None, str]) -> TaskResult:
        """Both directions for every network, the pixel baseline and chance."""
        split = view.split("evaluated")
        assert split is not None
        rows = _with_report(split)
        if len(rows) < 2:
            raise EvaluationError(
                f"{self.name}: {len(rows)} samples of {split.name} have a report, it needs at least 2"
            )
        reports, names = [split.reports[row] for row in rows], view.facts.findings
        groups, truth = report_groups(reports), view.truth(split)[rows]
        listed = not_evaluable(truth, names, split.name)
        out = {item.finding for item in listed}
        classes = {name: truth[:, number] for number, name in enumerate(names) if name not in out}
        ranker = _Ranker(groups, classes, view.bootstrap(split.patients[rows]))
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
        words, result.notes["pixels"] = fitted
        if words is not None:
            pixels = split.arrays.pixels[rows]
            result.models["pixels"] = ranker.metrics(words.images(pixels), words.texts(reports))
        result.models["chance"] = ranker.chance()
        if self.settings.sentences:
            self._add_sentences(view, split, rows, words, result)
        return result

    def _add_sentences(
        self, view: View, split: Split, rows: NDArray[np.int64], words: ReportWords | None, result: TaskResult
    ) -> None:
        """The metric of sentences for every network that compares embeddings, the pixels and chance."""
        first: dict[str, str] = {}
        for row in rows:
            for sentence in split.sentences[row]:
                first.setdefault(_plain(sentence), sentence)
        number = {plain: place for place, plain in enumerate(first)}
        relevant = np.zeros((len(rows), len(first)), dtype=bool)
        for place, row in enumerate(rows):
            relevant[place, [number[_plain(sentence)] for sentence in split.sentences[row]]] = True
        texts, bootstrap = tuple(first.values()), view.bootstrap(split.patients[rows])
        sides = {}
        for model, embedded in view.prompt_embeddings(texts).items():
            images = split.arrays.models[model].image
            if embedded is not None and images is not None:
                sides[model] = images[rows], embedded
        if words is not None:
            sides["pixels"] = words.images(split.arrays.pixels[rows]), words.texts(texts)
        for model, (queries, sentences) in sides.items():
            found = average_precision(queries, sentences, relevant)
            result.models[model]["image_to_sentence/AP"] = bootstrap.estimate(partial(_mean, found))
        by_chance = chance_average_precision(relevant.sum(axis=1), len(texts)).mean()
        result.models["chance"]["image_to_sentence/AP"] = Estimate(float(by_chance))
        result.notes["distinct_sentences"] = len(texts)


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

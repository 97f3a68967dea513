"""Zero-shot classification: an image is compared with sentences that state and that deny each finding.

Score of a finding = similarity to its positive prompts - similarity to its negative prompts. (The published
softmax over the two similarities is a rising function of this difference, so every metric here is the same.)
The prompts of a side are an ensemble: their embeddings are averaged and normalised again. A method that
scores image-text pairs in its own way (it overrides `Method.score`) has its scores averaged instead. A
finding without negative prompts has the score of its positive ones.

Published ways of measuring are switches: `pool=max_similarity` (GLoRIA, PRIOR), `normalise=over_evaluated`
(GLoRIA), `threshold_source=evaluated` and `threshold_tie=gt` (MedKLIP, MeDSLIP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import TaskConfig, key
from medvlp.evaluation import prompts as prompt_files
from medvlp.evaluation.labels import NotEvaluable, as_notes, no_threshold, not_evaluable
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.metrics.classification import chance, score_classes, score_findings, thresholds
from medvlp.evaluation.prompts import PromptBook, Prompts
from medvlp.evaluation.task import (
    EvaluationError,
    Facts,
    Needs,
    Reading,
    Role,
    Scores,
    Task,
    TaskResult,
    Unit,
    register,
)

if TYPE_CHECKING:
    from medvlp.evaluation.baselines import FittedRidge
    from medvlp.evaluation.features import ModelArrays
    from medvlp.evaluation.session import View
    from medvlp.evaluation.splits import Split
    from medvlp.methods.base import Method

Floats = NDArray[np.float64]
Pool = Literal["mean", "max_similarity"]


@dataclass(frozen=True)
class Ensemble:
    """All prompts of all findings as one list of sentences, and the rows of each finding and side."""

    sentences: list[str]
    rows: dict[str, tuple[slice, slice]]

    @classmethod
    def of(cls, prompts: Mapping[str, Prompts]) -> Ensemble:
        """Flatten the prompts of the findings."""
        sentences: list[str] = []
        rows = {}
        for name, sides in prompts.items():
            start, middle = len(sentences), len(sentences) + len(sides.positive)
            sentences += [*sides.positive, *sides.negative]
            rows[name] = (slice(start, middle), slice(middle, len(sentences)))
        return cls(sentences, rows)


def prompts_of(book: PromptBook, names: Sequence[str]) -> dict[str, Prompts]:
    """Prompts of the labels that have any."""
    found = {name: book.prompts(name) for name in names}
    return {name: prompts for name, prompts in found.items() if prompts is not None}


def finding_scores(
    arrays: ModelArrays,
    prompt_embeddings: NDArray[Any] | None,
    ensemble: Ensemble,
    names: Sequence[str],
    pool: Pool = "mean",
) -> Floats:
    """[N, C] scores of the findings (see the module).

    Args:
        arrays: the model's image embeddings, or its own similarities to the prompts.
        prompt_embeddings: [prompts, D] unit-norm embeddings; None if the model scores in its own way.
        ensemble: which prompts belong to which finding.
        names: the C findings. pool: of the prompts of a side: their mean, or the most similar one.
    """
    scores = []
    for name in names:
        positive, negative = ensemble.rows[name]
        if prompt_embeddings is None:
            own = arrays.scores[tuple(ensemble.sentences)]
            scores.append(_pooled(own[:, positive], pool) - _pooled(own[:, negative], pool))
            continue
        assert arrays.image is not None, "image embeddings have been asked for"
        image = arrays.image.astype(np.float64)
        if pool == "mean":
            scores.append(
                image @ (_center(prompt_embeddings[positive]) - _center(prompt_embeddings[negative]))
            )
        else:
            sides = (image @ prompt_embeddings[side].T for side in (positive, negative))
            above, below = (_pooled(side, pool) for side in sides)
            scores.append(above - below)
    return np.stack(scores, axis=1)


def _pooled(scores: NDArray[Any], pool: Pool) -> Floats:
    """[N] of [N, prompts] scores; 0 without a prompt."""
    if not scores.shape[1]:
        return np.zeros(len(scores))
    wide = scores.astype(np.float64)
    found: Floats = wide.mean(axis=1) if pool == "mean" else wide.max(axis=1)
    return found


def _standardised(scores: Floats) -> Floats:
    """[N, C] z-scores over the N images; zeros where all are alike."""
    spread = scores.std(axis=0)
    found: Floats = (scores - scores.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return found


def _center(embeddings: NDArray[Any]) -> Floats:
    """Unit vector of the mean of unit vectors; 0 for none."""
    mean = embeddings.astype(np.float64).sum(axis=0) / max(len(embeddings), 1)
    direction: Floats = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return direction


@dataclass
class ZeroShotConfig(TaskConfig):
    prompts: str | None = key(
        None,
        "YAML with prompts; a relative path is looked for beside the config file first; default: templates",
        file=True,
    )
    kind: Literal["multi_label", "multi_class"] = key(
        "multi_label", "multi_class: each image is of exactly one of the findings, too (CheXpert 5x200)"
    )
    pool: Literal["mean", "max_similarity"] = key(
        "mean",
        "prompts of a side: the mean of their embeddings, or the most similar (published GLoRIA, PRIOR)",
    )
    normalise: Literal["none", "over_evaluated"] = key(
        "none",
        "over_evaluated: classes are compared by z-scores over all evaluated images together, so that an "
        "answer depends on the other images (published GLoRIA; of kind multi_class)",
    )
    threshold_source: Literal["selection", "evaluated"] = key(
        "selection",
        "evaluated: F1 and accuracy at the threshold with the best F1 on the evaluated split itself "
        "(published MedKLIP and MeDSLIP; raises F1)",
    )
    threshold_tie: Literal["ge", "gt"] = key(
        "ge", "gt: for accuracy, a score at the threshold is negative, for F1 positive (published, same)"
    )


@dataclass
class Fitted:
    """What was chosen and taught without the evaluated split.

    Attributes:
        names: findings that have prompts and can be evaluated. scored: those that have scores: of classes of
            which each image has one, all.
        thresholds: model -> finding -> score from which on it is called positive.
        ridge: pixel baseline; None where it cannot be taught. pixels: how it was taught, or why it was not.
    """

    names: list[str]
    scored: list[str]
    thresholds: dict[str, dict[str, float]]
    ridge: FittedRidge | None
    pixels: str


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    if "threshold_split" not in notes:
        return []
    if not notes["threshold_split"]:
        return ["no F1 and accuracy: no other split to choose a threshold on"]
    seen = " itself (published; it has seen the answers)" if notes.get("threshold_seen") else ""
    return [
        f"F1 and accuracy at the threshold with the best F1 on the split {notes['threshold_split']}{seen}"
    ]


@register
class ZeroShot(Task):
    """See the module."""

    name = "zero-shot"
    version = 2
    summary = "findings by similarity to sentences that state and that deny them"
    config = ZeroShotConfig
    keeps_scores = True
    reading = Reading(
        # The macro accuracy of rare findings looks high, so it stands with the single findings.
        summary=lambda metric: metric.endswith("/macro") and not metric.startswith("accuracy"),
        by_finding="auroc",
        remarks=_remarks,
    )

    @cached_property
    def book(self) -> PromptBook:
        """The configured prompts."""
        return prompt_files.read(self.settings.prompts)

    def ensemble(self, facts: Facts) -> Ensemble:
        """The prompts of all labels of the dataset that have any."""
        return Ensemble.of(prompts_of(self.book, facts.index.label_names))

    def unavailable_on(self, facts: Facts) -> str | None:
        if not facts.findings:
            return "the dataset has no labels"
        asked = self.ensemble(facts).rows.keys()
        if not set(facts.findings) & asked:
            return f"no prompts for any of the labels; set evaluation.tasks.{self.name}.prompts=FILE.yaml"
        without = [name for name in facts.findings if name not in asked]
        if without and self.settings.kind == "multi_class":
            return (
                f"kind=multi_class compares all classes, and {', '.join(without)} has no prompts: "
                f"give some in evaluation.tasks.{self.name}.prompts=FILE.yaml, or name the rest with --label"
            )
        return None

    def unavailable_with(self, method: Method) -> str | None:
        return None if method.scores_prompts else "shares no space of images and prompts"

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        images = Needs(image=True, prompts=tuple(self.ensemble(facts).sentences))
        return {"evaluated": images, "selection": images, "train": Needs()}

    def fit(self, view: View, unit: Unit) -> Fitted:
        """Choose the thresholds on the selection split and teach the pixel baseline."""
        for finding in self.book.unused(view.facts.index.label_names):
            view.say(f"{self.settings.prompts}: {finding!r} is no label of the dataset")
        ensemble = self.ensemble(view.facts)
        names = [name for name in view.facts.findings if name in ensemble.rows and name in view.evaluable]
        scored = list(view.facts.findings) if self.settings.kind == "multi_class" else names
        ridge, pixels = self._ridge(view, scored)
        selection = view.split("selection")
        chosen: dict[str, dict[str, float]] = {}
        if selection is not None and names:
            truth, columns = view.truth(selection, names), [scored.index(name) for name in names]
            for model, scores in self._scores(view, selection, scored, ridge).items():
                chosen[model] = thresholds(scores[:, columns], truth, names)
        return Fitted(names, scored, chosen, ridge, pixels)

    def measure(self, view: View, unit: Unit, fitted: Fitted) -> TaskResult:
        """Metrics of every network, of the pixel baseline and of chance."""
        split = view.split("evaluated")
        assert split is not None
        ensemble, findings, names = self.ensemble(view.facts), view.facts.findings, fitted.names
        truth = view.truth(split)
        listed = [NotEvaluable(name, "no prompts") for name in findings if name not in ensemble.rows]
        listed += not_evaluable(truth, findings, split.name)
        if not names:
            reasons = "; ".join(f"{item.finding}: {item.reason}" for item in listed)
            raise EvaluationError(f"{self.name}: no finding can be evaluated ({reasons})")
        every = self._scores(view, split, fitted.scored, fitted.ridge)
        columns = [fitted.scored.index(name) for name in names]
        scores = {model: of[:, columns] for model, of in every.items()}
        if fitted.thresholds and self.settings.threshold_source == "selection":
            listed += no_threshold(names, fitted.thresholds["trained"], view.facts.roles["selection"])
        result = TaskResult(notes=as_notes(truth, findings, listed))
        result.notes |= {
            "threshold_split": view.facts.roles.get(self.settings.threshold_source),
            "threshold_seen": self.settings.threshold_source == "evaluated",
            "prompts": {name: asdict(prompts) for name, prompts in _sentences(ensemble, names).items()},
            "pixels": fitted.pixels,
        }
        truth, bootstrap = view.truth(split, names), view.bootstrap(split.patients)
        chosen = fitted.thresholds
        if self.settings.threshold_source == "evaluated":
            chosen = {model: thresholds(of, truth, names) for model, of in scores.items()}
        result.notes["thresholds"] = {model: chosen.get(model, {}) for model in scores}
        strict = self.settings.threshold_tie == "gt"
        for model, of in scores.items():
            result.models[model] = score_findings(
                of, truth, names, bootstrap, chosen.get(model), strict_accuracy=strict
            )
        result.models["chance"] = chance(truth, names)
        result.scores = Scores(split.arrays.sample, names, truth, scores, chosen)
        if self.settings.kind == "multi_class":  # a class without a number of its own competes all the same
            truth = view.truth(split, fitted.scored)
            for model, of in every.items():
                compared = _standardised(of) if self.settings.normalise == "over_evaluated" else of
                result.models[model] |= score_classes(compared, truth, fitted.scored, bootstrap)
            result.models["chance"]["balanced_accuracy/macro"] = Estimate(1 / len(fitted.scored))
        return result

    def _scores(
        self, view: View, split: Split, names: Sequence[str], ridge: FittedRidge | None
    ) -> dict[str, Floats]:
        """[N, C] scores of the findings by every network, and by the pixel baseline where there is one."""
        ensemble = self.ensemble(view.facts)
        embedded = view.prompt_embeddings(tuple(ensemble.sentences))
        scores = {
            model: finding_scores(arrays, embedded[model], ensemble, names, self.settings.pool)
            for model, arrays in split.arrays.models.items()
        }
        return scores | ({"pixels": ridge.predict(split.arrays.pixels)} if ridge is not None else {})

    def _ridge(self, view: View, names: Sequence[str]) -> tuple[FittedRidge | None, str]:
        train = view.split("train")
        if train is None or not names:
            return None, "not available: there is no other split to train on"
        targets = view.truth(train, names)
        unlabelled = [name for name, column in zip(names, targets.T, strict=True) if np.isnan(column).all()]
        if unlabelled:
            return None, f"not available: no training labels of {', '.join(unlabelled)}"
        return train.ridge.fit(targets), f"ridge regression trained with all labels of {train.name}"


def _sentences(ensemble: Ensemble, names: Sequence[str]) -> dict[str, Prompts]:
    rows = ((name, ensemble.rows[name]) for name in names)
    return {
        name: Prompts(tuple(ensemble.sentences[positive]), tuple(ensemble.sentences[negative]))
        for name, (positive, negative) in rows
    }

"""Zero-shot classification: an image is compared with sentences that state and that deny each finding.

Score of a finding = similarity to its positive prompts - similarity to its negative prompts. (The published
softmax over the two similarities is a rising function of this difference, so every metric here is the same.)
The prompts of a side are an ensemble: their embeddings are averaged and normalised again. A method that
scores image-text pairs in its own way (it overrides `Method.score`) has its scores averaged instead. A
finding without negative prompts has the score of its positive ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.baselines import FittedRidge
from medvlp.evaluation.features import ModelArrays
from medvlp.evaluation.labels import NotEvaluable, Uncertain, as_notes, binary, not_evaluable
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.classification import Selection, chance, score_findings
from medvlp.evaluation.prompts import PromptBook, Prompts
from medvlp.evaluation.report.results import EvaluationError, TaskResult
from medvlp.evaluation.splits import Split

Floats = NDArray[np.float64]


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
    arrays: ModelArrays, prompt_embeddings: NDArray[Any] | None, ensemble: Ensemble, names: Sequence[str]
) -> Floats:
    """[N, C] scores of the findings (see the module).

    Args:
        arrays: the model's image embeddings, or its own similarities to the prompts.
        prompt_embeddings: [prompts, D] unit-norm embeddings; None if the model scores in its own way.
        ensemble: which prompts belong to which finding.
        names: the C findings.
    """
    scores = []
    for name in names:
        positive, negative = ensemble.rows[name]
        if prompt_embeddings is None:
            assert arrays.scores is not None, "a method with its own score has been run on the prompts"
            scores.append(_mean(arrays.scores[:, positive]) - _mean(arrays.scores[:, negative]))
        else:
            assert arrays.image is not None, "image embeddings have been asked for"
            direction = _center(prompt_embeddings[positive]) - _center(prompt_embeddings[negative])
            scores.append(arrays.image.astype(np.float64) @ direction)
    return np.stack(scores, axis=1)


def _mean(scores: NDArray[Any]) -> Floats:
    """[N] means of [N, prompts] scores; 0 without a prompt."""
    mean: Floats = scores.astype(np.float64).sum(axis=1) / max(scores.shape[1], 1)
    return mean


def _center(embeddings: NDArray[Any]) -> Floats:
    """Unit vector of the mean of unit vectors; 0 for none."""
    mean = embeddings.astype(np.float64).sum(axis=0) / max(len(embeddings), 1)
    direction: Floats = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return direction


@dataclass
class ZeroShot:
    """The task with everything that does not depend on the model."""

    split: Split
    selection: Split | None
    train: Split | None
    names: Sequence[str]
    columns: Sequence[int]
    ensemble: Ensemble
    uncertain: Uncertain
    bootstrap: PatientBootstrap

    def evaluate(self, prompt_embeddings: Mapping[str, NDArray[Any] | None]) -> TaskResult:
        """Metrics of every model in the split's arrays, of the pixel baseline and of chance.

        Args:
            prompt_embeddings: each model's embeddings of the ensemble's sentences (None: own scores).

        Raises:
            EvaluationError: no finding can be evaluated.
        """
        truth = self._truth(self.split)
        listed = [NotEvaluable(name, "no prompts") for name in self.names if name not in self.ensemble.rows]
        listed += not_evaluable(truth, self.names, self.split.name)
        out = {item.finding for item in listed}
        kept = [number for number, name in enumerate(self.names) if name not in out]
        if not kept:
            reasons = "; ".join(f"{item.finding}: {item.reason}" for item in listed)
            raise EvaluationError(f"zero-shot: no finding can be evaluated ({reasons})")
        names, truth_kept = [self.names[number] for number in kept], truth[:, kept]
        result = TaskResult(notes=as_notes(truth, self.names, listed))
        result.notes["threshold_split"] = self.selection.name if self.selection else None
        result.notes["prompts"] = {name: asdict(prompts) for name, prompts in self._sentences(names).items()}
        scorers: dict[str, Callable[[Split], Floats]] = {
            model: partial(self._model_scores, model, texts, names)
            for model, texts in prompt_embeddings.items()
        }
        targets, unlabelled = self._targets(kept)
        if self.train is None:
            result.notes["pixels"] = "not available: there is no other split to train on"
        elif unlabelled:
            result.notes["pixels"] = f"not available: no training labels of {', '.join(unlabelled)}"
        else:
            result.notes["pixels"] = f"ridge regression trained with all labels of {self.train.name}"
            scorers["pixels"] = partial(_pixel_scores, self.train.ridge.fit(targets))
        result.notes["thresholds"] = {}
        for model, scorer in scorers.items():
            selection = None
            if self.selection is not None:
                chosen_on = self.selection
                selection = Selection(chosen_on.name, scorer(chosen_on), self._truth(chosen_on)[:, kept])
            scored = score_findings(scorer(self.split), truth_kept, names, self.bootstrap, selection)
            result.models[model], result.notes["thresholds"][model] = scored.metrics, scored.thresholds
        result.models["chance"] = chance(truth_kept, names)
        return result

    def _model_scores(
        self, model: str, texts: NDArray[Any] | None, names: Sequence[str], split: Split
    ) -> Floats:
        return finding_scores(split.arrays.models[model], texts, self.ensemble, names)

    def _targets(self, kept: Sequence[int]) -> tuple[Floats, list[str]]:
        """Training labels of the findings, and the findings that have none."""
        if self.train is None:
            return np.empty((0, len(kept))), []
        targets = self._truth(self.train)[:, kept]
        return targets, [
            self.names[number]
            for number, column in zip(kept, targets.T, strict=True)
            if np.isnan(column).all()
        ]

    def _truth(self, split: Split) -> Floats:
        return binary(split.labels[:, list(self.columns)], self.uncertain)

    def _sentences(self, names: Sequence[str]) -> dict[str, Prompts]:
        rows = ((name, self.ensemble.rows[name]) for name in names)
        return {
            name: Prompts(tuple(self.ensemble.sentences[positive]), tuple(self.ensemble.sentences[negative]))
            for name, (positive, negative) in rows
        }


def _pixel_scores(ridge: FittedRidge, split: Split) -> Floats:
    return ridge.predict(split.arrays.pixels)

"""Linear probes: logistic regression on frozen backbone features with 1, 10 and 100 % of the training labels.

- Fractions are drawn by patient with the evaluation seed; a smaller one is a part of every larger one.
- Features are standardised with mean and deviation of all training images (which takes no labels).
- One penalty C for all findings of a model and fraction: the one with the best macro AUROC on the selection
  split. The pixel baseline chooses its own penalties by leave-one-out error on its training rows.
- A finding takes part in a fraction when the fraction holds a positive and a negative of it.

scikit-learn's solver, not the published recipe (AdamW, early stopping): the same protocol for every model,
convex, with nothing left to tune by hand.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from medvlp.evaluation.labels import Uncertain, as_notes, binary, not_evaluable
from medvlp.evaluation.metrics.binary import auroc
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.classification import chance, score_findings
from medvlp.evaluation.report.results import EvaluationError, TaskResult
from medvlp.evaluation.splits import Split

Floats = NDArray[np.float64]
#: Standardised features.
Features = NDArray[np.float32]

#: Inverse penalties to choose from.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ITERATIONS = 1000
#: Newton's method up to so many features (its cost an iteration grows with their square), above it L-BFGS.
NEWTON_FEATURES = 512


def patient_fraction(patients: NDArray[Any], fraction: float, seed: int) -> NDArray[np.int64]:
    """Rows of the first ceil(fraction * patients) patients in a random order of all (at least one)."""
    names = np.unique(patients)
    order = np.random.default_rng(seed).permutation(len(names))
    count = max(1, int(np.ceil(fraction * len(names) - 1e-9)))
    return np.flatnonzero(np.isin(patients, names[order[:count]]))


@dataclass
class Fitted:
    """Scores [M, C] on the evaluated split with the chosen C, and the fits that did not converge."""

    scores: Floats
    penalty: float
    unconverged: int


def fit(train: tuple[Features, Floats], selection: tuple[Features, Floats], inputs: Features) -> Fitted:
    """Fit one logistic regression a finding for each C, choose C on the selection split, score `inputs`.

    Args:
        train: features [N, F] and labels [N, C] (1, 0, NaN); each finding has both classes.
        selection: features [V, F] and labels [V, C].
        inputs: features [M, F] to score.

    Raises:
        EvaluationError: no finding has both classes in the selection split.
    """
    best, best_value = None, -np.inf
    started = [_logistic(train[0].shape[1]) for _ in train[1].T]
    for penalty in PENALTIES:
        models = [
            _fitted(model, penalty, train[0], labels)
            for model, labels in zip(started, train[1].T, strict=True)
        ]
        areas = []
        for model, labels in zip(models, selection[1].T, strict=True):
            known = ~np.isnan(labels)
            if (labels == 1).any() and (labels == 0).any():
                areas.append(auroc(model.decision_function(selection[0][known]), labels[known] == 1)[0])
        if not areas:
            raise EvaluationError(
                "linear-probe: C cannot be chosen: no finding has both classes in the selection split"
            )
        if np.mean(areas) > best_value:
            # Copies: the next penalty goes on from these coefficients in place.
            best_value, best = float(np.mean(areas)), (penalty, copy.deepcopy(models))
    assert best is not None
    penalty, models = best
    unconverged = sum(int(model.n_iter_[0]) >= ITERATIONS for model in models)
    return Fitted(
        np.stack([model.decision_function(inputs) for model in models], axis=1), penalty, unconverged
    )


def _logistic(features: int) -> LogisticRegression:
    """Warm start: each penalty begins at the solution of the stronger one before it."""
    solver = "newton-cholesky" if features <= NEWTON_FEATURES else "lbfgs"
    return LogisticRegression(solver=solver, max_iter=ITERATIONS, warm_start=True)


def _fitted(
    model: LogisticRegression, penalty: float, features: Features, labels: Floats
) -> LogisticRegression:
    known = ~np.isnan(labels)
    with warnings.catch_warnings():
        # Reported as `unconverged` in the notes, not as a line for every fit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.set_params(C=penalty).fit(features[known], labels[known])


@dataclass
class LinearProbe:
    """The task with its three splits and settings."""

    split: Split
    selection: Split
    train: Split
    names: Sequence[str]
    columns: Sequence[int]
    uncertain: Uncertain
    fractions: Sequence[float]
    seed: int
    bootstrap: PatientBootstrap

    def evaluate(self) -> TaskResult:
        """AUROC (`auroc@10%/<finding>`) of every model in the splits' arrays, the pixel baseline and chance.

        Raises:
            EvaluationError: no finding can be evaluated at any fraction.
        """
        truth = self._truth(self.split)
        listed = not_evaluable(truth, self.names, self.split.name)
        result = TaskResult(notes=as_notes(truth, self.names, listed))
        result.notes |= {"selection_split": self.selection.name, "fractions": {}}
        for fraction in self.fractions:
            self._evaluate_fraction(fraction, truth, {item.finding for item in listed}, result)
        if not result.models:
            raise EvaluationError(
                "linear-probe: no finding can be trained and evaluated; see the label counts"
            )
        return result

    def _evaluate_fraction(self, fraction: float, truth: Floats, out: set[str], result: TaskResult) -> None:
        rows = patient_fraction(self.train.patients, fraction, self.seed)
        targets = self._truth(self.train)[rows]
        missing = not_evaluable(targets, self.names, f"{share(fraction)} of {self.train.name}", fewest=1)
        out = out | {item.finding for item in missing}
        kept = [number for number, name in enumerate(self.names) if name not in out]
        result.notes["not_evaluable"] += [vars(item) for item in missing]
        notes: dict[str, Any] = {
            "samples": len(rows),
            "patients": len(np.unique(self.train.patients[rows])),
            "findings": len(kept),
            "penalties": {},
            "unconverged": {},
        }
        result.notes["fractions"][share(fraction)] = notes
        if not kept:
            return
        names, truth, targets = [self.names[number] for number in kept], truth[:, kept], targets[:, kept]
        for model in self.split.arrays.models:
            features, selection_features, inputs = self._features(model)
            selection_truth = self._truth(self.selection)[:, kept]
            fitted = fit((features[rows], targets), (selection_features, selection_truth), inputs)
            notes["penalties"][model], notes["unconverged"][model] = fitted.penalty, fitted.unconverged
            self._add(result, model, fraction, fitted.scores, truth, names)
        scores = self.train.ridge.fit(targets, rows).predict(self.split.arrays.pixels)
        self._add(result, "pixels", fraction, scores, truth, names)
        chances = chance(truth, names, only_auroc=True)
        result.models.setdefault("chance", {}).update(
            {_at(metric, fraction): value for metric, value in chances.items()}
        )

    def _add(
        self,
        result: TaskResult,
        model: str,
        fraction: float,
        scores: Floats,
        truth: Floats,
        names: Sequence[str],
    ) -> None:
        metrics = score_findings(scores, truth, names, self.bootstrap, only_auroc=True).metrics
        named = {_at(metric, fraction): value for metric, value in metrics.items()}
        result.models.setdefault(model, {}).update(named)

    def _features(self, model: str) -> tuple[Features, Features, Features]:
        """Standardised features of the training, selection and evaluated split."""
        arrays = [split.arrays.models[model].features for split in (self.train, self.selection, self.split)]
        scaler = StandardScaler().fit(np.asarray(arrays[0], dtype=np.float64))
        # The networks give float32, and fits in it take half the time.
        train, selection, inputs = (
            scaler.transform(np.asarray(array, dtype=np.float64)).astype(np.float32) for array in arrays
        )
        return train, selection, inputs

    def _truth(self, split: Split) -> Floats:
        return binary(split.labels[:, list(self.columns)], self.uncertain)


def share(fraction: float) -> str:
    """0.01 -> "1%"."""
    return f"{100 * fraction:g}%"


def _at(metric: str, fraction: float) -> str:
    name, _, finding = metric.partition("/")
    return f"{name}@{share(fraction)}/{finding}"

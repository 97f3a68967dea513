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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvlp.config import Config, ConfigError, TaskConfig, key
from medvlp.evaluation.labels import NotEvaluable, as_notes, not_evaluable
from medvlp.evaluation.metrics.binary import auroc
from medvlp.evaluation.metrics.classification import chance, score_findings
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
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from medvlp.evaluation.baselines import FittedRidge
    from medvlp.evaluation.session import View
    from medvlp.evaluation.splits import Split
    from medvlp.methods.base import Method

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
class Probe:
    """A logistic regression a finding, with the chosen C, and how many did not converge."""

    models: list[LogisticRegression]
    penalty: float
    unconverged: int

    def scores(self, features: Features) -> Floats:
        """[M, F] standardised features -> [M, C] scores."""
        return np.stack([model.decision_function(features) for model in self.models], axis=1)


def fit(train: tuple[Features, Floats], selection: tuple[Features, Floats]) -> Probe:
    """Fit one logistic regression a finding for each C, and choose C on the selection split.

    Args:
        train: features [N, F] and labels [N, C] (1, 0, NaN); each finding has both classes.
        selection: features [V, F] and labels [V, C].

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
    return Probe(models, penalty, unconverged)


def _logistic(features: int) -> LogisticRegression:
    """Warm start: each penalty begins at the solution of the stronger one before it."""
    from sklearn.linear_model import LogisticRegression

    solver = "newton-cholesky" if features <= NEWTON_FEATURES else "lbfgs"
    return LogisticRegression(solver=solver, max_iter=ITERATIONS, warm_start=True)


def _fitted(
    model: LogisticRegression, penalty: float, features: Features, labels: Floats
) -> LogisticRegression:
    from sklearn.exceptions import ConvergenceWarning

    known = ~np.isnan(labels)
    with warnings.catch_warnings():
        # Reported as `unconverged` in the notes, not as a line for every fit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.set_params(C=penalty).fit(features[known], labels[known])


@dataclass
class LinearProbeConfig(TaskConfig):
    fractions: list[float] = key(
        [0.01, 0.1, 1.0], "shares of the training labels of the linear probe", 1e-6, 1, (1, 100)
    )

    def check(self, config: Config) -> None:
        if len({share(fraction) for fraction in self.fractions}) < len(self.fractions):
            where = f"evaluation.tasks.{LinearProbe.name}.fractions"
            raise ConfigError(f"{where}={self.fractions}: one of them stands twice; remove it")


@dataclass
class Fitted:
    """The probes of one fraction; `kept` findings are trained and evaluated.

    Attributes:
        missing: findings of which the fraction does not hold both classes.
        probes: model -> scaler of its features and its probe.
        ridge: the pixel baseline.
        notes: samples, patients and findings of the fraction, chosen penalties.
    """

    kept: list[str]
    missing: list[NotEvaluable]
    notes: dict[str, Any]
    probes: dict[str, tuple[StandardScaler, Probe]]
    ridge: FittedRidge | None = None


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    lines = [f"C chosen on the split {notes['selection_split']}"] if "selection_split" in notes else []
    for fraction, of in notes.get("fractions", {}).items():
        unconverged = sum(of["unconverged"].values())
        stopped = f", {unconverged} fits stopped before they converged" if unconverged else ""
        samples = f"{of['samples']} images of {of['patients']} patients"
        lines.append(f"{fraction} of the labels: {samples}, {of['findings']} findings{stopped}")
    return lines


@register
class LinearProbe(Task):
    """See the module. A unit is a fraction; its metrics are `auroc@10%/<finding>`."""

    name = "linear-probe"
    summary = "logistic regression on frozen features with a part of the training labels"
    config = LinearProbeConfig
    unit_keys = frozenset({"fractions"})
    fits_to_labels = True
    keeps_scores = True
    reading = Reading(remarks=_remarks)

    def unavailable_with(self, method: Method) -> str | None:
        return None if method.has_image_features else "has no image encoder"

    def unavailable_on(self, facts: Facts) -> str | None:
        if not facts.findings:
            return "the dataset has no labels"
        if not {"train", "selection"} <= facts.roles.keys():
            return (
                "needs the splits train and valid beside the evaluated one; "
                f"{facts.index.name} has {', '.join(facts.available)}"
            )
        return None

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        features = Needs(features=True)
        return {"train": features, "selection": features, "evaluated": features}

    def units(self) -> Sequence[Unit]:
        return [Unit(fraction) for fraction in self.settings.fractions]

    def fit(self, view: View, unit: Unit) -> Fitted:
        """Fit the probes of one fraction and the pixel baseline; choose C on the selection split."""
        train, selection = view.split("train"), view.split("selection")
        assert train is not None
        assert selection is not None
        assert unit.fraction is not None
        rows = patient_fraction(train.patients, unit.fraction, view.seed)
        findings = view.facts.findings
        drawn = f"{share(unit.fraction)} of {train.name}"
        missing = not_evaluable(view.truth(train)[rows], findings, drawn, fewest=1)
        out = {item.finding for item in missing}
        kept = [name for name in findings if name in view.evaluable and name not in out]
        notes: dict[str, Any] = {
            "samples": len(rows),
            "patients": len(np.unique(train.patients[rows])),
            "findings": len(kept),
            "penalties": {},
            "unconverged": {},
        }
        fitted = Fitted(kept, missing, notes, {})
        if not kept:
            return fitted
        targets, choosing = view.truth(train, kept)[rows], view.truth(selection, kept)
        for model in train.arrays.models:
            scaler = _scaler(train, model)
            features, choice = _features(train, model, scaler), _features(selection, model, scaler)
            probe = fit((features[rows], targets), (choice, choosing))
            fitted.probes[model] = scaler, probe
            notes["penalties"][model], notes["unconverged"][model] = probe.penalty, probe.unconverged
        fitted.ridge = train.ridge.fit(targets, rows)
        return fitted

    def measure(self, view: View, unit: Unit, fitted: Fitted) -> TaskResult:
        """AUROC of every network, the pixel baseline and chance."""
        split = view.split("evaluated")
        assert split is not None
        assert unit.fraction is not None
        findings = view.facts.findings
        truth = view.truth(split)
        listed = not_evaluable(truth, findings, split.name) + fitted.missing
        result = TaskResult(notes=as_notes(truth, findings, listed))
        result.notes["selection_split"] = view.facts.roles["selection"]
        result.notes["fractions"] = {share(unit.fraction): fitted.notes}
        if not fitted.kept:
            return result
        scores = {
            model: probe.scores(_features(split, model, scaler))
            for model, (scaler, probe) in fitted.probes.items()
        }
        assert fitted.ridge is not None
        scores["pixels"] = fitted.ridge.predict(split.arrays.pixels)
        truth, bootstrap = view.truth(split, fitted.kept), view.bootstrap(split.patients)
        found = {
            model: score_findings(of, truth, fitted.kept, bootstrap, only_auroc=True)
            for model, of in scores.items()
        }
        found["chance"] = chance(truth, fitted.kept, only_auroc=True)
        # Logistic regression has learned log-odds; the ridge of the pixels has not.
        logistic = frozenset(fitted.probes)
        result.scores = Scores(split.arrays.sample, fitted.kept, truth, scores, log_odds=logistic)
        for model, metrics in found.items():
            result.models[model] = {_at(metric, unit.fraction): value for metric, value in metrics.items()}
        return result

    def join(self, parts: Mapping[Unit, TaskResult]) -> TaskResult:
        """The metrics of all fractions beside each other.

        Raises:
            EvaluationError: there are none.
        """
        first = next(iter(parts.values()))
        joined = TaskResult(notes=first.notes | {"fractions": {}, "not_evaluable": []})
        for part in parts.values():
            for model, metrics in part.models.items():
                joined.models.setdefault(model, {}).update(metrics)
            joined.notes["fractions"] |= part.notes["fractions"]
            # What the evaluated split lacks stands in every part.
            known = joined.notes["not_evaluable"]
            known += [item for item in part.notes["not_evaluable"] if item not in known]
        if not joined.models:
            raise EvaluationError(
                f"{self.name}: no finding can be trained and evaluated; see the label counts"
            )
        return joined


def _scaler(train: Split, model: str) -> StandardScaler:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit(np.asarray(train.arrays.models[model].features, dtype=np.float64))


def _features(split: Split, model: str, scaler: StandardScaler) -> Features:
    """Standardised features. The networks give float32, and fits in it take half the time."""
    features = np.asarray(split.arrays.models[model].features, dtype=np.float64)
    standardised: Features = scaler.transform(features).astype(np.float32)
    return standardised


def share(fraction: float) -> str:
    """0.01 -> "1%"."""
    return f"{100 * fraction:g}%"


def _at(metric: str, fraction: float) -> str:
    name, _, finding = metric.partition("/")
    return f"{name}@{share(fraction)}/{finding}"

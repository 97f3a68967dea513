"""What is known about the samples of a split, beside what the models make of their images."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.baselines import PixelRidge
from medvlp.evaluation.features import SplitArrays
from medvlp.evaluation.task import EvaluationError
from shards.errors import DataError, UsageError
from shards.reader import ShardReader

#: Splits on which thresholds and penalties may be chosen, in this order; never the evaluated one.
SELECTION_ORDER = ("valid", "train")


@dataclass
class Split:
    """N samples of one split, in one order everywhere.

    Attributes:
        name: "train", "valid", "test", ...
        patients: [N] patient of each sample (decides resamples and label fractions; never written out).
        reports: N report texts of the configured sections, "" where there is none.
        labels: [N, C] stored labels in the order of the index: 1, 0, -1 (uncertain), NaN (unknown).
        arrays: embeddings, features and pixels.
        phrases: texts of each sample's phrases, in stored order.
        sentences: those of each report, in its order.
    """

    name: str
    patients: NDArray[Any]
    reports: list[str]
    labels: NDArray[Any]
    arrays: SplitArrays
    phrases: list[list[str]] = field(default_factory=list)
    sentences: list[list[str]] = field(default_factory=list)

    @cached_property
    def ridge(self) -> PixelRidge:
        """The pixel baseline taught by this split, one for all tasks."""
        return PixelRidge(self.arrays.pixels)


def selection_split(available: Sequence[str], evaluated: str, fits_to_labels: bool = False) -> str | None:
    """The split that chooses thresholds and penalties when `evaluated` is reported; None if there is none.

    `fits_to_labels`: the choice is about a model fitted to the training labels, so it cannot be made on them.
    """
    for name in SELECTION_ORDER:
        if name in available and name != evaluated and not (fits_to_labels and name == "train"):
            return name
    return None


def shared_patients(reader: ShardReader, splits: Sequence[str]) -> dict[str, int]:
    """Number of patients in each two of the splits that have any in common: "train, test" -> 3."""
    found: dict[str, set[str]] = {}
    for split in splits:
        known = (_patient(reader, split, i) for i in range(reader.sample_count(split)))
        found[split] = {patient for patient in known if patient is not None}
    pairs = {
        f"{one}, {other}": len(found[one] & found[other]) for one, other in itertools.combinations(found, 2)
    }
    return {pair: count for pair, count in pairs.items() if count}


def check_apart(
    reader: ShardReader, splits: Sequence[str], allowed: bool, say: Callable[[str], None]
) -> None:
    """Say how many patients are in several of the splits.

    Raises:
        EvaluationError: there are some, and they are not allowed.
    """
    shared = shared_patients(reader, splits)
    if not shared:
        return
    counts = "; ".join(f"{count} patients in both {pair}" for pair, count in shared.items())
    said = f"{reader.index.name}: {counts}: what is measured has been seen in training or in choosing"
    if not allowed:
        raise EvaluationError(
            f"{said}. `medvlp shards verify` names the shards; evaluation.shared_patients=true goes on"
        )
    say(said)


def _patient(reader: ShardReader, split: str, i: int) -> str | None:
    """None for a corrupt sample, which is neither learned nor measured."""
    try:
        patient: str = reader.metadata(split, i)["patient_id"]
    except DataError:
        return None
    return patient


def chosen_labels(label_names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The chosen labels (all for none chosen).

    Raises:
        UsageError: the dataset has no such label.
    """
    for name in chosen:
        if name not in label_names:
            raise UsageError(f"--label {name!r}: the dataset has {', '.join(label_names) or 'no labels'}")
        if chosen.count(name) > 1:
            raise UsageError(f"--label {name!r} stands twice, and would weigh twice: leave one out")
    return list(chosen or label_names)


def stratified_fraction(
    patients: NDArray[Any], labels: NDArray[Any], fraction: float, seed: int
) -> NDArray[np.int64]:
    """Rows of a share of the patients with about the labels of all; smaller shares are parts of larger.

    Patients are ordered once: those with the same labels stand in an order of chance, evenly spaced with a
    random offset, so that every beginning of the order holds about its share of each kind.

    Args:
        patients: [N] patient of each sample.
        labels: [N, C]: 1, 0, -1 or NaN; a patient has a label that one of the samples has.
        fraction: in (0, 1].
        seed: of the order.

    Returns:
        Ascending rows of max(1, round(fraction * patients)) patients.
    """
    names, of_row = np.unique(patients, return_inverse=True)
    has = np.zeros((len(names), labels.shape[1]), dtype=bool)
    np.logical_or.at(has, of_row, labels == 1)
    _, kinds = np.unique(has, axis=0, return_inverse=True)
    kinds = kinds.reshape(-1)
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(names))
    places = np.empty(len(names))
    for kind in range(kinds.max(initial=-1) + 1):
        own = shuffled[kinds[shuffled] == kind]
        places[own] = (np.arange(len(own)) + random.random()) / len(own)
    count = max(1, round(fraction * len(names)))
    drawn = np.argsort(places, kind="stable")[:count]
    return np.flatnonzero(np.isin(of_row, drawn))

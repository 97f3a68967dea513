"""Splits whose answer is known, and a session that hands them out: a perfect model, a blind one, pixels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from medvlp.config import Config
from medvlp.evaluation.features import ModelArrays, SplitArrays
from medvlp.evaluation.session import Session
from medvlp.evaluation.splits import Split
from medvlp.evaluation.task import Task, TaskResult, Unit
from shards.format import Index, SplitTotals
from shards.reader import ShardReader

NAMES = ["edema", "mass"]
SIZES = {"train": 240, "valid": 100, "test": 160}


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def make_split(name: str, count: int, seed: int, models: tuple[str, ...] = ("trained", "untrained")) -> Split:
    """Two images a patient. "trained" and the pixels see the labels, "untrained" is noise."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 2)) < 0.4).astype(float)
    seen = np.concatenate([2 * labels - 1, np.zeros((count, 6))], axis=1) + 0.5 * rng.normal(size=(count, 8))
    report_axis = rng.normal(size=(count, 8))
    blind = rng.normal(size=(count, 8))
    made = {
        "trained": ModelArrays(unit(seen), unit(report_axis + 3 * seen), seen),
        "untrained": ModelArrays(unit(blind), unit(rng.normal(size=(count, 8))), blind),
    }
    pixels = np.concatenate([labels, rng.random((count, 62))], axis=1).astype(np.float32)
    words = [
        " ".join(word if label else f"no{word}" for word, label in zip(NAMES, row, strict=True))
        for row in labels
    ]
    reports = [f"{text} remark{number % 40}" for number, text in enumerate(words)]
    patients = np.array([f"{name}-{number // 2}" for number in range(count)])
    arrays = SplitArrays(np.arange(count), pixels, {model: made[model] for model in models})
    return Split(name, patients, reports, labels, arrays)


def make_splits() -> dict[str, Split]:
    return {name: make_split(name, count, seed) for seed, (name, count) in enumerate(SIZES.items())}


class Prepared(Session):
    """A session whose splits and prompt embeddings are given in place of a checkpoint and a dataset."""

    def __init__(
        self,
        splits: dict[str, Split],
        prompts: dict[str, np.ndarray | None] | None = None,
        names: list[str] | None = None,
        findings: list[str] | None = None,
    ) -> None:
        self.config = Config()
        self.config.evaluation.bootstrap = 200
        totals = {name: SplitTotals(len(split.patients), 0, 0, 0, 0) for name, split in splits.items()}
        names = NAMES if names is None else names
        index = Index("made", names, totals, [], 32, None, "", {})
        self.reader = cast(ShardReader, SimpleNamespace(index=index))
        self.findings = names if findings is None else findings
        self.uncertain = "exclude"
        self.said: list[str] = []
        self.say = self.said.append
        self._splits, self._needs, self._given = splits, {}, prompts or {}

    def prompt_embeddings(self, sentences: tuple[str, ...]) -> dict[str, Any]:
        return self._given

    def run(self, task: Task, unit: Unit | None = None) -> TaskResult:
        """Fit and measure one unit, or all and join them."""
        units = task.units() if unit is None else [unit]
        found = {}
        for one in units:
            fitted = task.fit(self.view(task, ("train", "selection"), None), one)
            found[one] = task.measure(self.view(task, ("evaluated",), None), one, fitted)
        return task.join(found) if unit is None else found[unit]

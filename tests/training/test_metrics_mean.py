"""Means of metrics that some micro-batches, ranks or chunks have nothing of."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medvlp import distributed
from medvlp.methods.base import StepOutput, is_metric
from medvlp.training.monitor import _means
from medvlp.training.predictions import _Collected
from medvlp.training.trainer import mean_of

PRECISION = "prototypes/mask_precision"
NAN = math.nan


def test_losses_are_no_metrics() -> None:
    for name in ("loss", "loss/instance", "mgca/loss/instance", "instance"):
        assert not is_metric(name)
    for name in (PRECISION, "retrieval/top1", "mgca/retrieval/top1"):
        assert is_metric(name)


def test_micro_batches_without_a_metric_do_not_count() -> None:
    values = [torch.tensor(value) for value in (0.5, NAN, 1.0)]
    assert mean_of(PRECISION, values) == 0.75
    assert mean_of(PRECISION, values[1:2]).isnan()
    assert mean_of("loss/instance", values).isnan(), "a loss that is NaN is a fault"
    assert mean_of("loss/instance", [values[0], values[2]]) == 0.75


def test_ranks_without_a_metric_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [{"loss": 1.0, PRECISION: NAN}, {"loss": 3.0, PRECISION: 0.5}, {"loss": 2.0, PRECISION: 1.0}]
    told: list[list[float]] = []

    def remember(values: list[float]) -> list[float]:
        told.append(values)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "mean_over_ranks", remember)
        for terms in ranks:
            _means(terms, [4.0])
    monkeypatch.setattr(
        distributed, "mean_over_ranks", lambda values: [sum(column) / 3 for column in zip(*told, strict=True)]
    )
    found, others = _means(ranks[0], [4.0])
    assert found == {"loss": pytest.approx(2), PRECISION: pytest.approx(0.75)}
    assert others == [4.0]
    told[:] = [[NAN, 0.0, 1.0, 0.0, 4.0]] * 3
    found, _ = _means(ranks[0], [4.0])
    assert all(map(math.isnan, found.values()))


def test_chunks_without_a_metric_do_not_count() -> None:
    collected = _Collected()
    for number, (rows, value) in enumerate([(3, 0.5), (2, NAN), (1, 1.0)]):
        batch: Any = SimpleNamespace(keys=[""] * rows, sample=torch.arange(rows) + 3 * number)
        terms = {PRECISION: torch.tensor(value), "loss/pairs": torch.tensor(value)}
        collected.add(number, batch, StepOutput(torch.tensor(1.0), terms), {})
    losses = collected.gathered().losses
    assert losses["loss"] == pytest.approx(1)
    assert losses[PRECISION] == pytest.approx(2.5 / 4)
    assert math.isnan(losses["loss/pairs"])

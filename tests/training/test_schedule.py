"""Learning rates against the published schedules of MGCA, PRIOR and MeDSLIP, and steps from epochs."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import Config, PhaseConfig
from medvlp.training.schedule import (
    build_schedule,
    epoch_cosine,
    phase_rates,
    total_steps,
    warmup_cosine,
    warmup_steps,
)  # fmt: skip


def test_the_published_schedule_is_met(golden_dir: Path) -> None:
    files = sorted(golden_dir.glob("mgca_lr*.npz"))
    assert files
    for file in files:
        golden = np.load(file, allow_pickle=False)
        for name in golden.files:
            steps = int(name.removeprefix("lr_T"))
            rates = warmup_cosine(steps, int(0.4 * steps), 2e-5, 1e-8)
            cycle = np.arange(len(golden[name])) % steps  # the published one starts again after the last step
            np.testing.assert_allclose(rates[cycle], golden[name], rtol=1e-12)


@settings(max_examples=50)
@given(steps=st.integers(1, 300), share=st.floats(0, 0.999))
def test_it_rises_then_falls_between_the_limits(steps: int, share: float) -> None:
    warmup = int(share * steps)
    rates = warmup_cosine(steps, warmup, 1.0, 0.1)
    assert len(rates) == steps
    assert rates.min() >= 0.1 - 1e-12
    assert rates.max() <= 1 + 1e-12
    assert (np.diff(rates[: warmup + 1]) > 0).all()
    assert (np.diff(rates[warmup:]) < 0).all()
    assert rates[warmup] == pytest.approx(1.0)


def test_steps_stand_above_epochs() -> None:
    config = Config()
    config.train.epochs = 2.5
    assert total_steps(config, steps_per_epoch=10) == 25
    config.train.steps = 7
    assert total_steps(config, steps_per_epoch=10) == 7


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    rates = warmup_cosine(5, 20, 1.0, 0.0)
    np.testing.assert_allclose(rates, np.arange(5) / 20)


def test_warmup_steps_stand_above_the_share() -> None:
    config = Config()
    config.optimizer.warmup = 0.25
    assert warmup_steps(config, steps=100) == 25
    config.optimizer.warmup_steps = 7
    assert warmup_steps(config, steps=100) == 7


def test_the_published_epoch_schedule_is_met(golden_dir: Path) -> None:
    files = sorted(golden_dir.glob("medslip_lr_schedule*.npz"))
    assert files
    per_epoch = 3001
    rates = epoch_cosine(100 * per_epoch, per_epoch, warmup=500, stair=100, peak=1e-4, low=1e-5)
    for file in files:
        golden = np.load(file, allow_pickle=False)
        iterations, warming = golden["warmup_iter_lr"].T
        np.testing.assert_allclose(rates[iterations.astype(int)], warming, rtol=1e-12)
        np.testing.assert_allclose(rates.reshape(100, per_epoch)[:, -1], golden["epoch_lr"], rtol=1e-12)
    assert (rates[100:200] == rates[100]).all()
    epochs = rates.reshape(100, per_epoch)
    assert (epochs[1:] == epochs[1:, :1]).all()


def test_a_warmup_by_epochs_ends_with_epoch_zero() -> None:
    rates = epoch_cosine(30, 10, warmup=20, stair=1, peak=1.0, low=0.0)
    np.testing.assert_allclose(rates[:10], np.arange(10) / 20)
    np.testing.assert_allclose(rates[10:], np.repeat([0.75, 0.25], 10))


@settings(max_examples=25)
@given(per_epoch=st.integers(1, 40), epochs=st.integers(1, 6), share=st.floats(0, 0.9))
def test_a_phase_follows_the_published_rule(per_epoch: int, epochs: int, share: float) -> None:
    phase = PhaseConfig(epochs=epochs, lr=1e-5, start_lr=1e-7, warmup_epochs=share * epochs)
    rates = phase_rates(phase, per_epoch)
    total, warmup = per_epoch * epochs, round(share * epochs * per_epoch)
    assert len(rates) == total
    for step, rate in enumerate(rates):
        if step >= warmup:
            expected = 0.5 * 1e-5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        elif warmup == 1:
            expected = 1e-7
        else:
            expected = 1e-7 + step * (1e-5 - 1e-7) / (warmup - 1)
        assert rate == pytest.approx(expected, rel=1e-12)


def test_phases_follow_each_other_and_make_the_length_of_the_run() -> None:
    config = Config()
    config.optimizer.phases = [
        PhaseConfig(epochs=1.5, lr=2.0),
        PhaseConfig(epochs=1, lr=1.0, min_lr=0.5, warmup_epochs=0.2, start_lr=0.1),
        PhaseConfig(epochs=0.01, lr=3.0),
    ]
    schedule = build_schedule(config, steps_per_epoch=10)
    assert schedule.steps == total_steps(config, 10) == 26
    assert schedule.phases.tolist() == [0] * 15 + [1] * 10 + [2]
    assert [step for step in range(26) if schedule.restarts_at(step)] == [15, 25]
    assert schedule.rates[[0, 15, 16, 17, 25]].tolist() == [2.0, 0.1, 1.0, 1.0, 3.0]
    assert schedule.rates[24] == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi * 7 / 8)))


def test_one_schedule_of_steps_has_one_phase() -> None:
    config = Config()
    config.train.steps, config.optimizer.schedule = 12, "epoch_cosine"
    config.optimizer.warmup, config.optimizer.lr, config.optimizer.min_lr = 0.0, 1.0, 0.0
    schedule = build_schedule(config, steps_per_epoch=4)
    np.testing.assert_allclose(schedule.rates, np.repeat([1, 0.75, 0.25], 4))
    assert not schedule.phases.any()

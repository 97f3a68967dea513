"""Learning rates against MGCA's published schedule, and steps from epochs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import Config
from medvlp.training.schedule import total_steps, warmup_cosine, warmup_steps


def test_the_published_schedule_is_met(golden_dir):
    files = sorted(golden_dir.glob("mgca_lr*.npz"))
    assert files
    for file in files:
        golden = np.load(file, allow_pickle=False)
        for name in golden.files:
            steps = int(name.removeprefix("lr_T"))
            rates = warmup_cosine(steps, int(0.4 * steps), 2e-5, 1e-8)
            cycle = np.arange(len(golden[name])) % steps  # the published one starts again after the last step
            np.testing.assert_allclose(rates[cycle], golden[name], rtol=1e-12)


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 300), share=st.floats(0, 0.999))
def test_it_rises_then_falls_between_the_limits(steps, share):
    warmup = int(share * steps)
    rates = warmup_cosine(steps, warmup, 1.0, 0.1)
    assert len(rates) == steps
    assert rates.min() >= 0.1 - 1e-12
    assert rates.max() <= 1 + 1e-12
    assert (np.diff(rates[: warmup + 1]) > 0).all()
    assert (np.diff(rates[warmup:]) < 0).all()
    assert rates[warmup] == pytest.approx(1.0)


def test_steps_stand_above_epochs():
    config = Config()
    config.train.epochs = 2.5
    assert total_steps(config, steps_per_epoch=10) == 25
    config.train.steps = 7
    assert total_steps(config, steps_per_epoch=10) == 7


def test_a_run_shorter_than_its_warmup_only_rises():
    rates = warmup_cosine(5, 20, 1.0, 0.0)
    np.testing.assert_allclose(rates, np.arange(5) / 20)


def test_warmup_steps_stand_above_the_share():
    config = Config()
    config.optimizer.warmup = 0.25
    assert warmup_steps(config, steps=100) == 25
    config.optimizer.warmup_steps = 7
    assert warmup_steps(config, steps=100) == 7

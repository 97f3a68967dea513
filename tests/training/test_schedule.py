"""Learning rates against MGCA's published schedule, and steps from epochs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import Config
from medvlp.training.schedule import total_steps, warmup_cosine


def test_the_published_schedule_is_met(golden_dir):
    files = sorted(golden_dir.glob("mgca_lr*.npz"))
    assert files
    for file in files:
        golden = np.load(file, allow_pickle=False)
        for name in golden.files:
            steps = int(name.removeprefix("lr_T"))
            rates = warmup_cosine(steps, 0.4, 2e-5, 1e-8)
            cycle = np.arange(len(golden[name])) % steps  # the published one starts again after the last step
            np.testing.assert_allclose(rates[cycle], golden[name], rtol=1e-12)


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 300), share=st.floats(0, 0.999))
def test_it_rises_then_falls_between_the_limits(steps, share):
    rates = warmup_cosine(steps, share, 1.0, 0.1)
    warmup = int(share * steps)
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

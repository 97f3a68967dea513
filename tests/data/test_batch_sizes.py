"""Dividing the global batch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.batch_sizes import divide_batch


def config(global_batch, micro_batch=None):
    made = Config()
    made.train.global_batch, made.train.micro_batch = global_batch, micro_batch
    return made


@settings(deadline=None, max_examples=50)
@given(ranks=st.integers(1, 16), accumulation=st.integers(1, 8), micro=st.integers(1, 32))
def test_the_parts_make_the_whole(ranks, accumulation, micro):
    sizes = divide_batch(config(ranks * accumulation * micro, micro), ranks)
    assert (sizes.micro_batch, sizes.accumulation, sizes.world_size) == (micro, accumulation, ranks)
    assert divide_batch(config(ranks * micro), ranks).accumulation == 1


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "message"),
    [
        (10, None, 4, "train.global_batch=10 does not divide over 4 ranks; 8 or 12 would"),
        (3, None, 4, "4 would"),
        (16, 3, 2, "train.micro_batch=3 does not divide the 8 samples of each rank .*; 4 would"),
        (16, 16, 2, "train.micro_batch=16 .*; 8 would"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(batch, micro, ranks, message):
    with pytest.raises(ConfigError, match=message):
        divide_batch(config(batch, micro), ranks)

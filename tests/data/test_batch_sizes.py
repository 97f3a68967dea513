"""Dividing the global batch."""

from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp import config_files
from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.batch_sizes import divide_batch
from medvlp.methods.registry import schemas

PHASES = "optimizer.phases=[{epochs: 1, lr: 1e-3}, {epochs: 1, lr: 1e-3}]"


def config(global_batch, micro_batch=None):
    made = Config()
    made.train.global_batch, made.train.micro_batch = global_batch, micro_batch
    return made


@settings(max_examples=50)
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


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["method.name=prior", PHASES], "weights of PRIOR's terms"),
        (["method.prototype_source=clusters"], r"method\.prototype_source=clusters"),
        (
            ["method.name=combination", "method.mgca.prototype_source=clusters", "method.prior_weight=0"],
            r"method\.mgca\.prototype_source=clusters",
        ),
        (["method.name=prior"], None),
        (["method.name=prior", PHASES, "checkpoint.keep_best=valid/loss/global"], None),
        ([], None),
    ],
)
def test_checkpoints_are_not_compared_by_a_loss_that_changes(keys, why):
    words = ["data.root=/d", "run.dir=/r", "validation.every_epochs=1", "checkpoint.keep_best=valid/loss"]
    given = config_files.load([], [*words, *keys], schemas())
    with nullcontext() if why is None else pytest.raises(ConfigError, match=rf"keep_best=valid/loss.*{why}"):
        divide_batch(given, 1)
    given.task = "fine-tuning"
    assert divide_batch(given, 1).world_size == 1, "a task's loss is its own"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["method.name=place"], r"method\.matching=hungarian begins after method\.soft_epochs=1"),
        (["method.name=combination", "method.prior_weight=0"], r"after method\.place\.soft_epochs=1"),
        (["method.name=place", "method.soft_epochs=0"], None),
        (["method.name=place", "method.matching=soft"], None),
        (["method.name=place", "checkpoint.keep_best=valid/loss"], None),
        (["method.prototype_source=clusters"], r"method\.prototype_source=clusters"),
    ],
)
def test_the_loss_of_steps_may_change_where_that_of_validations_does_not(keys, why):
    words = ["data.root=/d", "run.dir=/r", "validation.every_epochs=1", "checkpoint.keep_best=loss"]
    given = config_files.load([], [*words, *keys], schemas())
    with nullcontext() if why is None else pytest.raises(ConfigError, match=rf"keep_best=loss .*{why}"):
        divide_batch(given, 1)


@pytest.mark.parametrize(
    ("keys", "ranks", "message"),
    [
        (
            ["method.negatives=local", "train.global_batch=4"],
            4,
            r"negatives=local.* method\.negatives=global",
        ),
        (["train.global_batch=1"], 1, r"train\.global_batch=1: .*set method\.instance_weight to 0$"),
        (
            [
                "train.global_batch=8",
                "train.micro_batch=1",
                "train.accumulate=plain",
                "method.negatives=local",
            ],
            4,
            r"train\.micro_batch=1 with train\.accumulate=plain",
        ),
        (
            ["train.global_batch=8", "validation.every_steps=1", "validation.batch=1"],
            4,
            r"validation\.batch=1",
        ),
        (["method.name=prior", "train.global_batch=1"], 1, r"method\.global_weights to 0"),
        (["method.name=mpma", "train.global_batch=1"], 1, r"method\.global_weight to 0"),
        (["method.name=place", "train.global_batch=1"], 1, r"method\.instance_weight to 0"),
        (
            ["method.name=combination", "train.global_batch=1"],
            1,
            r"set method\.mgca\.instance_weight and method\.prior\.global_weights .*to 0",
        ),
        (["train.global_batch=4"], 4, None),
        (["method.negatives=local", "train.global_batch=8", "train.micro_batch=1"], 4, None),
        (["method.instance_weight=0", "train.global_batch=1"], 1, None),
        (
            ["method.name=medslip", "text.frozen=true", "method.negatives=local", "train.global_batch=4"],
            4,
            None,
        ),
    ],
)
def test_a_sample_is_contrasted_with_others(keys, ranks, message):
    given = config_files.load([], ["data.root=/d", "run.dir=/r", *keys], schemas())
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        divide_batch(given, ranks)
    given.task = "fine-tuning"
    assert divide_batch(given, ranks).world_size == ranks, "a task's loss is of single samples"

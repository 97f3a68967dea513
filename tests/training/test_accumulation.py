"""Exact accumulation: loss and gradient of a step depend neither on the micro-batch nor on the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medvlp import distributed
from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.batch import Batch, join
from medvlp.data.batch_sizes import BatchSizes
from medvlp.methods.base import DividedMethod, StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.accumulation import accumulates_exactly, what_differs
from medvlp.training.deepspeed_config import check_device, deepspeed_json
from medvlp.training.engine import Engine
from medvlp.training.memory_passes import LiveBytes
from tests.distributed_pool import Pools
from tests.methods.small import names
from tests.methods.small_mgca import rows_of
from tests.training.accumulating import (
    GOAL_OF_RANKS,
    GOALS,
    ROWS,
    References,
    largest_difference,
    prepared,
    samples,
    step,
)
from tests.training.runs import Precision
from tests.training.tiny import TinyMethod, random_batch


@pytest.fixture(scope="module")
def references(gloo_pool: Pools) -> References:
    """The steps that those of this file are compared with."""
    return References(gloo_pool)


def selection() -> Iterator[tuple[str, int, Precision, int]]:
    """Of `accumulation_matrix`: every method at each stage that shards, and once on several ranks."""
    for number, name in enumerate(names()):
        yield name, 1, "fp32", 3
        yield name, 1, "fp32", 1 + number % 2
        yield name, (2, 2, 4)[number % 3], ("fp32", "bf16", "bf16")[number % 3], 2 - number % 2
    for stage in range(4):
        yield "mgca", 1, "bf16", stage
        yield "mgca", 1, "fp16", stage
    yield "mgca", 2, "fp16", 2


@pytest.mark.dist
@pytest.mark.parametrize(("name", "ranks", "precision", "stage"), [*selection()])
def test_micro_batches_have_the_gradient_of_all_at_once(
    references: References, name: str, ranks: int, precision: Precision, stage: int
) -> None:
    """With dropout on; in 16 bit of the right size above all: the loss scale comes in, and goes out, once."""
    assert references.error(name, ranks, precision, stage) < GOALS[precision]


@pytest.mark.dist
def test_dropout_is_on_in_these_steps(references: References) -> None:
    on, off = (references.get("mgca", 1, "fp32", dropout).gradients for dropout in (0.3, 0.0))
    assert largest_difference(on, off) > 0.01


@pytest.mark.dist
@pytest.mark.parametrize("name", names())
def test_micro_batches_of_four_encode_what_one_of_sixteen_does(
    gloo_pool: Pools, references: References, name: str
) -> None:
    """Without dropout, whose draws differ: what `encode` makes of a sample depends on no other."""
    expected = gloo_pool(1).run(step, name, 0, ROWS)[0]
    found = references.get(name, 1, "fp32", 0.0)
    assert found.terms == pytest.approx(expected.terms, rel=1e-5, abs=1e-5, nan_ok=True)
    assert largest_difference(found.gradients, expected.gradients) < 1e-5
    for buffer, value in expected.buffers.items():
        np.testing.assert_allclose(found.buffers[buffer], value, rtol=1e-5, atol=1e-6, err_msg=buffer)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "ranks", "stage"), [("mgca", 2, 3), ("place", 4, 2)])
def test_ranks_with_micro_batches_have_the_gradient_of_one(
    references: References, name: str, ranks: int, stage: int
) -> None:
    assert references.error_of_ranks(name, ranks, stage) < GOAL_OF_RANKS


@pytest.mark.dist
def test_sorted_texts_have_the_same_gradient(gloo_pool: Pools, references: References) -> None:
    found = gloo_pool(2).run(partial(step, "mgca", 2, 4, groups=2))[0]
    expected = references.get("mgca", 1, "fp32", 0.0)
    assert largest_difference(found.gradients, expected.gradients) < GOAL_OF_RANKS


@pytest.mark.dist
def test_batch_norms_of_a_backbone_are_named_and_move_once_a_micro_batch(gloo_pool: Pools) -> None:
    config, method = prepared("prior", "resnet")
    sizes = BatchSizes(ROWS, 4, 4, 1)
    line = what_differs(method, config, sizes)
    assert line is not None
    assert "batch norms inside the encoders" in line
    assert "(4 of 16 samples)" in line
    buffers = gloo_pool(1).run(partial(step, "prior", 0, 4, image="resnet"))[0].buffers
    with torch.no_grad():
        batch = join([rows_of(samples(), 0, ROWS)])
        for start in range(0, ROWS, 4):
            method.encode(batch.rows(start, start + 4))
    for name, value in method.encoders[0].named_buffers():
        np.testing.assert_allclose(buffers[f"image_encoder.{name}"], value, rtol=1e-5, atol=1e-6)


def test_what_is_said_of_other_objectives() -> None:
    config, method = prepared("mgca")
    assert what_differs(method, config, BatchSizes(ROWS, 4, 4, 1)) is None
    assert what_differs(TinyMethod(), config, BatchSizes(ROWS, ROWS, 1, 1)) is None
    line = what_differs(TinyMethod(), config, BatchSizes(ROWS, 4, 4, 1))
    assert line is not None
    assert "TinyMethod is no DividedMethod" in line
    assert not accumulates_exactly(TinyMethod(), config, BatchSizes(ROWS, 4, 4, 1))
    config.train.accumulate = "plain"
    assert not accumulates_exactly(method, config, BatchSizes(ROWS, 4, 4, 1))
    assert what_differs(method, config, BatchSizes(ROWS, 4, 4, 1)) is not None


@pytest.mark.dist
def test_frozen_encoders_need_no_second_pass(gloo_pool: Pools) -> None:
    run = partial(step, "mgca", 2, 4, frozen=True)
    expected, found = (gloo_pool(1).run(run, whole)[0].gradients for whole in (True, False))
    assert largest_difference(found, expected) < 1e-5
    assert all((value == 0).all() for name, value in found.items() if "_encoder." in name)


def test_an_offloaded_optimizer_is_refused() -> None:
    config, method = prepared("mgca")
    config.zero.offload_optimizer = True
    with pytest.raises(ConfigError, match=r"train\.accumulate=plain"):
        Engine(method, config, BatchSizes(ROWS, 4, 4, 1), torch.device("cpu"))


@pytest.mark.dist
def test_stage_two_may_reduce_behind_the_backward_pass(gloo_pool: Pools, references: References) -> None:
    overlapping = {"zero_optimization": {"overlap_comm": True}}
    found = gloo_pool(2).run(partial(step, "mgca", 2, 4, deepspeed=overlapping))[0]
    expected = references.get("mgca", 2, "fp32", 0.0)
    assert largest_difference(found.gradients, expected.gradients) < 1e-5


def test_overlapping_at_stage_one_is_refused() -> None:
    config = Config()
    config.zero.stage, config.train.micro_batch = 1, 8
    check_device(config, "cpu")
    made = deepspeed_json(config, BatchSizes(16, 8, 2, 1), "cuda")
    assert made["zero_optimization"]["overlap_comm"] is False
    config.deepspeed = {"zero_optimization": {"overlap_comm": True}}
    with pytest.raises(ConfigError, match=r"use zero\.stage=2"):
        check_device(config, "cpu")
    config.train.accumulate = "plain"
    check_device(config, "cpu")


class Deep(DividedMethod, TinyMethod):
    """TinyMethod in two parts, whose encoders keep much for the backward pass and give little."""

    @property
    def encoders(self) -> tuple[torch.nn.Module, ...]:
        return self.image_encoder, self.text_encoder

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.image_features(batch.image), self.text_encoder(batch.text.input_ids).mean(1)

    def losses(
        self, encodings: tuple[Tensor, Tensor], batch: Batch, clusters: PrototypeTable | None = None
    ) -> StepOutput:
        image, text = (F.normalize(self.head(value).float(), dim=-1) for value in encodings)
        loss = F.cross_entropy(image @ text.T * self.log_scale.exp(), torch.arange(len(image)))
        return StepOutput(loss, {})


def peak(micro: int, rows: int) -> int:
    """Bytes that the passes of a step hold at most beside weights and batch."""
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.training.accumulation import exact_passes
    from medvlp.training.step_guard import StepGuard

    config = Config()
    config.zero.stage, config.precision = 0, "fp32"
    config.train.global_batch, config.train.micro_batch = rows, micro
    method, device = Deep(), distributed.initialize()
    engine = Engine(method, config, divide_batch(config, 1), device)
    guard, batch = StepGuard(method, 0.0, device), random_batch(0, rows)
    guard.begin()
    with LiveBytes() as live:
        if engine.exact:
            exact_passes(engine, batch, None, guard)
        else:
            engine.backward(engine.forward(batch).loss)
    engine.close()
    return int(live.peak)


@pytest.mark.dist
def test_a_batch_of_a_thousand_takes_the_memory_of_a_micro_batch_and_its_encodings(gloo_pool: Pools) -> None:
    pool = gloo_pool(1)
    one, thousand = pool.run(peak, 32, 32)[0], pool.run(peak, 32, 1024)[0]
    # Values and gradients of 2 x 32 numbers a sample; logits, and what else the losses hold.
    kept, losses = 2 * 4 * 1024 * 64, 4 * 4 * 1024**2 + 8 * 4 * 1024 * 64
    print(f"peak: {one / 2**20:.1f} MiB at 32, {thousand / 2**20:.1f} MiB at 32 x 32")
    assert thousand < one + kept + losses
    assert pool.run(peak, 1024, 1024)[0] > 2 * thousand

"""Exact accumulation: loss and gradient of a step depend neither on the micro-batch nor on the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from medvlp import distributed
from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.batch import Batch, join
from medvlp.data.batch_sizes import BatchSizes
from medvlp.methods.base import DividedMethod, Progress, StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.accumulation import accumulates_exactly, what_differs
from medvlp.training.deepspeed_config import check_device, deepspeed_json
from medvlp.training.engine import Engine
from medvlp.training.memory_passes import LiveBytes
from tests.distributed_pool import Pools
from tests.methods.small import built, names, reordered, small_batch, small_config
from tests.methods.small_mgca import IMAGES, rows_of
from tests.training.runs import Precision
from tests.training.test_loss_scale import fp16_on_cpu
from tests.training.tiny import TinyMethod, random_batch

#: Samples of a step.
ROWS = 8


def prepared(
    name: str,
    image: str = "vit",
    dropout: float = 0.0,
    precision: Precision = "fp32",
    frozen: bool = False,
    groups: int = 1,
) -> tuple[Config, DividedMethod]:
    """The config and the method; `dropout` is that of encoders and decoders alike."""
    config = small_config(name)
    for key, value in IMAGES[image].items():
        setattr(config.image, key, value)
    config.text.dropout, config.text.length_groups = dropout, groups
    config.image.frozen = frozen
    config.text.frozen = config.text.frozen or frozen
    if dropout:
        config.image.options = {**config.image.options, "proj_drop_rate": dropout}
    for key in ("dropout", "fusion_dropout", "decoder_dropout", "channel_dropout"):
        if dropout and hasattr(config.method, key):
            setattr(config.method, key, dropout)
    config.optimizer.name, config.optimizer.betas = "sgd", [0.0, 0.999]
    config.optimizer.weight_decay, config.precision = 0.0, precision
    method = built(config)
    assert isinstance(method, DividedMethod)
    return config, method.train()


def samples(seed: int = 0) -> Batch:
    """All samples of a step, longer texts before shorter ones, so that sorting them moves them."""
    return reordered(small_batch(seed=seed), torch.arange(ROWS).flip(0))


def step(
    name: str, stage: int, micro: int, options: dict[str, Any] | None = None, **prepare: Any
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Terms of this rank, all gradients (the update of SGD at a rate of 1), and all buffers after a step."""
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.training.accumulation import exact_passes
    from medvlp.training.step_guard import StepGuard

    config, method = prepared(name, **prepare)
    config.zero.stage, config.train.global_batch, config.train.micro_batch = stage, ROWS, micro
    config.deepspeed = options or {}
    device = distributed.initialize()
    rank, ranks = distributed.rank(), distributed.world_size()
    sizes = divide_batch(config, ranks)
    method.on_progress(Progress(1, 1, 4))
    engine = Engine(method, config, sizes, device)
    guard = StepGuard(method, 0.0, device)
    before = engine.full_weights()
    # As the loader cuts them: the k-th micro-batch of all ranks is one piece of the global batch.
    starts = [(number * ranks + rank) * micro for number in range(sizes.accumulation)]
    for seed, rate in (1, 0.0), (0, 1.0):  # two steps, so that gradients left by the first would show
        engine.set_learning_rate(rate)
        torch.manual_seed(3)
        guard.begin()
        whole = samples(seed)
        parts = [rows_of(whole, start, start + micro) for start in starts]
        for part in parts:
            part.text.lengths = tuple(part.text.attention_mask.sum(1).tolist())
        batch = join(parts)
        if engine.exact:
            output = exact_passes(engine, batch, None, guard)
        else:
            output = engine.forward(batch)
            engine.backward(output.loss)
        engine.step()
        if rate == 0.0:
            guard.undo()
    after, buffers = engine.full_weights(), {n: v.clone().numpy() for n, v in engine.buffers().items()}
    assert engine._engine.micro_steps == 2 * sizes.accumulation
    engine.close()
    terms = {term: value.item() for term, value in output.named.items()}
    return terms, {n: (before[n] - after[n]).numpy() for n in before if n not in buffers}, buffers


def assert_same(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values() if value.size)
    assert largest > 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance * largest, rtol=0, err_msg=name)


def different(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    largest = max(np.abs(value).max() for value in expected.values() if value.size)
    return max(
        float(np.abs(found[name] - value).max() / largest) for name, value in expected.items() if value.size
    )


@pytest.mark.dist
@pytest.mark.parametrize("name", names())
def test_micro_batches_of_two_have_the_gradient_of_eight(gloo_pool: Pools, name: str) -> None:
    pool = gloo_pool(1)
    terms, expected, buffers = pool.run(step, name, 0, 8)[0]
    found_terms, found, found_buffers = pool.run(step, name, 0, 2)[0]
    assert found_terms == pytest.approx(terms, rel=1e-5, abs=1e-5, nan_ok=True)
    assert_same(found, expected)
    for buffer, value in buffers.items():
        np.testing.assert_allclose(found_buffers[buffer], value, rtol=1e-5, atol=1e-6, err_msg=buffer)


def in_groups(name: str, stage: int, micro: int) -> Any:
    return step(name, stage, micro, groups=2)


@pytest.mark.dist
@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_with_micro_batches_have_the_gradient_of_one(gloo_pool: Pools, stage: int) -> None:
    _, expected, _ = gloo_pool(1).run(step, "mgca", 0, 8)[0]
    for run in step, in_groups:
        _, found, _ = gloo_pool(2).run(run, "mgca", stage, 2)[0]  # rank 0 has the whole weights
        # Batch norms of the heads merge the statistics of two ranks by another formula.
        assert_same(found, expected, 5e-5)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "stage"), [("mgca", 1), ("mgca", 3), ("place", 2)])
def test_four_ranks_with_micro_batches_have_the_gradient_of_one(
    gloo_pool: Pools, name: str, stage: int
) -> None:
    _, expected, _ = gloo_pool(1).run(step, name, 0, 8)[0]
    _, found, _ = gloo_pool(4).run(step, name, stage, 1)[0]
    assert_same(found, expected, 5e-5)


def same_draws(name: str, dropout: float) -> dict[str, np.ndarray]:
    """Gradients of one loss on encodings made in micro-batches of two, all in one graph."""
    _, method = prepared(name, dropout=dropout)
    batch = join([rows_of(samples(), 0, ROWS)])
    method.on_progress(Progress(1, 1, 4))
    torch.manual_seed(3)
    parts = [tree_flatten(method.encode(batch.rows(start, start + 2))) for start in range(0, ROWS, 2)]
    joined = [
        torch.cat(values) if isinstance(values[0], Tensor) else values[0]
        for values in zip(*(values for values, _ in parts), strict=True)
    ]
    loss = method.losses(tree_unflatten(joined, parts[0][1]), batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
        for name, p in method.named_parameters()
    }


@pytest.mark.dist
@pytest.mark.parametrize("name", ["mgca", "mpma"])
def test_the_second_pass_draws_the_dropout_of_the_first(gloo_pool: Pools, name: str) -> None:
    expected = same_draws(name, 0.3)
    _, found, _ = gloo_pool(1).run(dropped, name)[0]
    assert_same(found, expected)
    assert different(same_draws(name, 0.0), expected) > 0.01


def dropped(name: str) -> Any:
    return step(name, 0, 2, dropout=0.3)


def rounded(precision: Precision, stage: int, micro: int) -> Any:
    """A step in 16 bit, at a loss scale that the first gradient survives."""
    with fp16_on_cpu():
        return step("mgca", stage, micro, {"fp16": {"initial_scale_power": 2}}, precision=precision)


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", range(4))
def test_half_precision_has_its_own_gradient_of_eight(
    gloo_pool: Pools, precision: Precision, stage: int
) -> None:
    """Of the right size above all: the loss scale comes in, and goes out, once."""
    (_, expected, _), (_, found, _) = (
        gloo_pool(1).run(rounded, precision, stage, micro)[0] for micro in (8, 2)
    )
    for part in ("image_encoder", "text_encoder", "alignment"):
        a, b = (
            np.concatenate([v.ravel() for n, v in values.items() if n.startswith(part)])
            for values in (found, expected)
        )
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.05)
        assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b)


def convolutional(micro: int) -> Any:
    return step("prior", 0, micro, image="resnet")


@pytest.mark.dist
def test_batch_norms_of_a_backbone_are_named_and_move_once_a_micro_batch(gloo_pool: Pools) -> None:
    config, method = prepared("prior", "resnet")
    sizes = BatchSizes(ROWS, 2, 4, 1)
    line = what_differs(method, config, sizes)
    assert line is not None
    assert "batch norms inside the encoders" in line
    assert "(2 of 8 samples)" in line
    _, _, buffers = gloo_pool(1).run(convolutional, 2)[0]
    with torch.no_grad():
        batch = join([rows_of(samples(), 0, ROWS)])
        for start in range(0, ROWS, 2):
            method.encode(batch.rows(start, start + 2))
    for name, value in method.encoders[0].named_buffers():
        np.testing.assert_allclose(buffers[f"image_encoder.{name}"], value, rtol=1e-5, atol=1e-6)


def test_what_is_said_of_other_objectives() -> None:
    config, method = prepared("mgca")
    assert what_differs(method, config, BatchSizes(ROWS, 2, 4, 1)) is None
    assert what_differs(TinyMethod(), config, BatchSizes(ROWS, 8, 1, 1)) is None
    line = what_differs(TinyMethod(), config, BatchSizes(ROWS, 2, 4, 1))
    assert line is not None
    assert "TinyMethod is no DividedMethod" in line
    assert not accumulates_exactly(TinyMethod(), config, BatchSizes(ROWS, 2, 4, 1))
    config.train.accumulate = "plain"
    assert not accumulates_exactly(method, config, BatchSizes(ROWS, 2, 4, 1))
    assert what_differs(method, config, BatchSizes(ROWS, 2, 4, 1)) is not None


def frozen(micro: int) -> Any:
    """A step whose encoders are both frozen: there is no second pass."""
    return step("mgca", 2, micro, frozen=True)


@pytest.mark.dist
def test_frozen_encoders_need_no_second_pass(gloo_pool: Pools) -> None:
    _, expected, _ = gloo_pool(1).run(frozen, 8)[0]
    _, found, _ = gloo_pool(1).run(frozen, 2)[0]
    assert_same(found, expected)
    assert all((value == 0).all() for name, value in found.items() if "_encoder." in name)


def test_an_offloaded_optimizer_is_refused() -> None:
    config, method = prepared("mgca")
    config.zero.offload_optimizer = True
    with pytest.raises(ConfigError, match=r"train\.accumulate=plain"):
        Engine(method, config, BatchSizes(ROWS, 2, 4, 1), torch.device("cpu"))


@pytest.mark.dist
def test_stage_two_may_reduce_behind_the_backward_pass(gloo_pool: Pools) -> None:
    _, expected, _ = gloo_pool(2).run(step, "mgca", 2, 2)[0]
    options = {"zero_optimization": {"overlap_comm": True}}
    _, found, _ = gloo_pool(2).run(step, "mgca", 2, 2, options)[0]
    assert_same(found, expected)


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

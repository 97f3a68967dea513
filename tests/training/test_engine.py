"""The engine itself, on real ranks: Adam's first step, the learning rate, whole weights."""

from typing import Any

import pytest
import torch
from deepspeed import comm

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.training.engine import Engine
from tests.distributed_pool import Pools
from tests.training.runs import OptimizerName, Precision
from tests.training.tiny import TinyMethod, random_batch

pytestmark = pytest.mark.dist


def first_update(stage: int, precision: Precision) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights before and after one AdamW step at a learning rate of 0.01 (image encoder: 0.02)."""
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.training.engine import Engine

    config = Config()
    config.zero.stage, config.precision, config.train.global_batch = stage, precision, 8
    config.optimizer.image_lr_scale, config.optimizer.weight_decay = 2.0, 0.0
    device = distributed.initialize()
    torch.manual_seed(0)
    engine = Engine(TinyMethod(), config, divide_batch(config, distributed.world_size()), device)
    before = engine.full_weights()
    engine.set_learning_rate(0.01)
    outputs = engine.forward(random_batch(0, 8, distributed.rank(), distributed.world_size()))
    engine.backward(outputs.loss)
    engine.step()
    after = engine.full_weights()
    engine.close()
    return before, after


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_step_moves_weights_by_the_learning_rate(
    gloo_pool: Pools, stage: int, precision: Precision
) -> None:
    """Adam's first update is lr * sign(gradient). DeepSpeed's stage 0 in 16 bit would make it 0.74 lr."""
    before, after = gloo_pool(2).run(first_update, stage, precision)[0]
    head = (after["head.weight"] - before["head.weight"]).abs()
    image = after["image_encoder.pos_embed"] - before["image_encoder.pos_embed"]
    assert head.median().item() == pytest.approx(0.01, rel=0.01)
    assert image.abs().median().item() == pytest.approx(0.02, rel=0.01)
    assert all(value.dtype == torch.float32 for value in after.values())


def test_whole_weights_are_the_methods_at_every_stage(gloo_pool: Pools) -> None:
    torch.manual_seed(0)
    expected = TinyMethod().state_dict()
    for stage in (0, 3):
        before, _ = gloo_pool(2).run(first_update, stage, "fp32")[0]
        assert before.keys() == expected.keys()
        assert all(torch.equal(before[name], expected[name]) for name in expected)


def types_between_ranks(stage: int, deepspeed: dict[str, str]) -> set[torch.dtype]:
    """Types in which one step's gradients travel in bf16."""
    found: set[torch.dtype] = set()
    config = Config()
    config.zero.stage, config.precision, config.train.global_batch = stage, "bf16", 8
    config.deepspeed = dict(deepspeed)
    device = distributed.initialize()
    engine = Engine(TinyMethod(), config, divide_batch(config, distributed.world_size()), device)
    outputs = engine.forward(random_batch(0, 8, distributed.rank(), distributed.world_size()))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_fn"):
            original = getattr(comm, name)

            def noting(*given: Any, original: Any = original, **named: Any) -> Any:
                tensors = [t for t in (*given, *named.values()) if isinstance(t, torch.Tensor)]
                found.update(t.dtype for t in tensors if t.numel() > 1000)
                return original(*given, **named)

            patch.setattr(comm, name, noting)
        engine.backward(outputs.loss)
        engine.step()
    engine.close()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_bf16_travel_in_the_models_type_or_as_deepspeed_is_told(
    gloo_pool: Pools, stage: int
) -> None:
    pool = gloo_pool(2)
    assert pool.run(types_between_ranks, stage, {}) == [{torch.bfloat16}] * 2
    told = {"communication_data_type": "fp32"}
    assert pool.run(types_between_ranks, stage, told) == [{torch.float32}] * 2


def update_after_idle_steps(
    stage: int, precision: Precision, optimizer: OptimizerName, idle: int, restart: bool
) -> dict[str, torch.Tensor]:
    """All weights after `idle` steps that change only the optimiser's state, and one step that counts."""
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.training.engine import Engine

    config = Config()
    config.zero.stage, config.precision, config.train.global_batch = stage, precision, 8
    config.optimizer.name = optimizer
    device = distributed.initialize()
    torch.manual_seed(0)
    engine = Engine(TinyMethod(), config, divide_batch(config, distributed.world_size()), device)
    for seed in range(1, idle + 1):
        make_step(engine, seed, 0.0)
    if restart:
        engine.restart_optimizer()
    make_step(engine, 0, 0.01)
    make_step(engine, 99, 0.01)
    weights = engine.full_weights()
    engine.close()
    return {name: value for name, value in weights.items() if name != "mean"}


def make_step(engine: Engine, seed: int, learning_rate: float) -> None:
    """One step on the global batch of a seed."""
    engine.set_learning_rate(learning_rate)
    outputs = engine.forward(random_batch(seed, 8, distributed.rank(), distributed.world_size()))
    engine.backward(outputs.loss)
    engine.step()


@pytest.mark.parametrize(
    ("precision", "optimizer", "stage"),
    [(precision, "adamw", stage) for precision in ("fp32", "bf16") for stage in range(4)]
    + [("fp32", "sgd", 0), ("fp32", "sgd", 3), ("bf16", "sgd", 2)],
)
def test_a_restarted_optimizer_steps_as_a_fresh_one(
    gloo_pool: Pools, precision: Precision, optimizer: OptimizerName, stage: int
) -> None:
    pool = gloo_pool(2)
    fresh = pool.run(update_after_idle_steps, stage, precision, optimizer, 0, False)[0]
    restarted = pool.run(update_after_idle_steps, stage, precision, optimizer, 2, True)[0]
    assert all(torch.equal(fresh[name], restarted[name]) for name in fresh)
    carried_on = pool.run(update_after_idle_steps, stage, precision, optimizer, 2, False)[0]
    assert not all(torch.equal(fresh[name], carried_on[name]) for name in fresh), "the test would see nothing"

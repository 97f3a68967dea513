"""MGCA on several ranks: the single-process gradient, and prototypes that stay frozen under ZeRO."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from medvlp.config import OptimizerConfig, PrototypesConfig
from medvlp.data.batch_sizes import BatchSizes
from medvlp.distributed import rank
from medvlp.methods.base import Progress
from medvlp.prototypes.initialise import initialise_prototypes
from medvlp.training.engine import Engine
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small_mgca import rows_of, small_batch, small_config, small_mgca

WORDS = [3, 7, 1, 5, 2, 6, 4, 1]


def gradients(ranks: int, image: str, method: dict) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    model = small_mgca(image, **method).double()
    terms, averaged = averaged_gradients(model, small_batch(WORDS), ranks)
    buffers = {name: value.double().numpy() for name, value in model.named_buffers() if "running" in name}
    return terms, averaged | buffers


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_gradient_equals_the_single_process_one(gloo_pool, ranks: int, image: str) -> None:
    terms, expected = gradients(1, image, {})
    results = gloo_pool(ranks).run(gradients, ranks, image, {})
    for name, value in terms.items():
        mean = np.mean([own[name] for own, _ in results])
        assert mean == pytest.approx(value, rel=1e-6), name
    assert_equal_gradients(results, expected)


@pytest.mark.dist
def test_local_options_differ_from_global_ones(gloo_pool) -> None:
    local = {"negatives": "local", "batch_norm": "local"}
    terms, _ = gradients(1, "vit", {})
    results = gloo_pool(2).run(gradients, 2, "vit", local)
    mean = np.mean([own["loss/instance"] for own, _ in results])
    assert abs(mean - terms["loss/instance"]) > 1e-2
    halves = [small_mgca(**local).double()(rows_of(small_batch(WORDS), k, k + 4)).loss.item() for k in (0, 4)]
    np.testing.assert_allclose([own["loss"] for own, _ in results], halves, rtol=1e-9)


def kmeans_start(ranks: int) -> np.ndarray:
    """Prototypes after the k-means start on this rank's parts of six batches, in float64."""
    model = small_mgca().double().train()
    each = len(WORDS) // ranks
    batches = [small_batch(WORDS, seed=seed) for seed in range(6)]
    own = [rows_of(batch, rank() * each, (rank() + 1) * each) for batch in batches] if ranks > 1 else batches
    config = PrototypesConfig(init="kmeans", init_samples=48, iterations=5)
    initialise_prototypes(model, lambda: own, config, seed=0)
    return model.alignment.objective.prototypes.weight.detach().numpy()


@pytest.mark.dist
def test_kmeans_start_does_not_depend_on_ranks(gloo_pool) -> None:
    alone = kmeans_start(1)
    for ranks in (2, 4):
        for prototypes in gloo_pool(ranks).run(kmeans_start, ranks):
            np.testing.assert_allclose(prototypes, alone, atol=1e-6)


def train_with_deepspeed(stage: int, precision: str, frozen_steps: int, steps: int) -> list[np.ndarray]:
    """Prototype weights on rank 0 before the first step and after each one."""
    config = small_config()
    config.zero.stage, config.precision = stage, precision
    config.optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.5, decay_all=True)
    # Everything is sharded, however small.
    config.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    model = small_mgca()
    engine = Engine(model, config, BatchSizes(8, 4, 1, 2), torch.device("cpu"))
    name = "alignment.objective.prototypes.weight"
    own = rows_of(small_batch(WORDS), rank() * 4, rank() * 4 + 4)
    history = [copy.deepcopy(engine.full_weights().get(name))]
    for step in range(steps):
        model.on_progress(Progress(0 if step < frozen_steps else 1, step, steps))
        engine.set_learning_rate(1e-2)
        engine.backward(engine.forward(own).loss)
        engine.step()
        history.append(copy.deepcopy(engine.full_weights().get(name)))
    engine.close()
    return [] if history[0] is None else [weight.numpy() for weight in history]


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_prototypes_stay_exactly_the_same(gloo_pool, stage: int, precision: str) -> None:
    start, *frozen, moved, _ = gloo_pool(2).run(train_with_deepspeed, stage, precision, 3, 5)[0]
    assert len(frozen) == 3
    for weight in frozen:
        np.testing.assert_array_equal(weight, start)
    assert np.abs(moved - start).max() > 1e-3

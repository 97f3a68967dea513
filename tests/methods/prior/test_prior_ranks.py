"""PRIOR on several ranks: the single-process gradient, and parts that a stage leaves out under ZeRO."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import OptimizerConfig, PhaseConfig
from medvlp.data.batch_sizes import BatchSizes
from medvlp.distributed import rank
from medvlp.methods.base import Progress
from medvlp.methods.registry import build_method
from medvlp.training.engine import Engine
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small_mgca import VOCABULARY, rows_of
from tests.methods.small_prior import report_batch, small_prior, small_prior_config

REPORTS = [[3, 2], [1, 4, 2, 1], [5], [2, 2, 2], [1], [3, 3], [2, 1, 1, 1, 1], []]


def gradients(
    ranks: int, image: str, method: dict[str, Any]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    model = small_prior(image, **method).double()
    return averaged_gradients(model, report_batch(REPORTS), ranks)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("stage", "image", "norm"),
    [(1, "vit", "none"), (2, "vit", "none"), (3, "vit", "none"), (3, "resnet", "batch")],
)
def test_gradient_equals_the_single_process_one(
    gloo_pool: Any, ranks: int, stage: int, image: str, norm: str
) -> None:
    terms, expected = gradients(1, image, {"stage": stage, "head_norm": norm})
    results = gloo_pool(ranks).run(gradients, ranks, image, {"stage": stage, "head_norm": norm})
    for name, value in terms.items():
        mean = np.mean([own[name] for own, _ in results])
        assert mean == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert_equal_gradients(results, expected)


@pytest.mark.dist
def test_local_options_differ_from_global_ones(gloo_pool: Any) -> None:
    terms, _ = gradients(1, "vit", {})
    for options, name in (({"negatives": "local"}, "loss/global"), ({"rank_means": True}, "loss/bank")):
        results = gloo_pool(2).run(gradients, 2, "vit", options)
        mean = np.mean([own[name] for own, _ in results])
        assert abs(mean - terms[name]) > 1e-5, name


def train_with_deepspeed(stage: int, precision: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of five steps through all stages of PRIOR, and rank 0's weights after them."""
    config = small_prior_config()
    config.zero.stage, config.precision = stage, precision
    config.optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.0, phases=[PhaseConfig(epochs=1, lr=1e-3)] * 3)
    # Everything is sharded, however small.
    config.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    torch.manual_seed(0)
    method = build_method(config, VOCABULARY)
    method.train()
    engine = Engine(method, config, BatchSizes(8, 4, 1, 2), torch.device("cpu"))
    own = rows_of(report_batch(REPORTS), rank() * 4, rank() * 4 + 4)
    losses = []
    for step, phase in enumerate((0, 0, 1, 2, 2)):
        method.on_progress(Progress(phase, step, 5, phase))
        engine.set_learning_rate(1e-3)
        terms = engine.forward(own).named
        engine.backward(terms["loss"])
        engine.step()
        losses.append(terms["loss"].item())
    weights = engine.full_weights()
    engine.close()
    return losses, {name: weight.numpy() for name, weight in weights.items()}


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_that_a_stage_leaves_out_train_under_every_zero_stage(gloo_pool: Any, precision: str) -> None:
    """The bank and the decoders get no gradient in stage 1, on which DeepSpeed must neither fail nor wait."""
    runs = [gloo_pool(2).run(train_with_deepspeed, stage, precision) for stage in (0, 1, 2, 3)]
    plain, start = runs[0], small_prior_config()
    start.optimizer.phases = [PhaseConfig(epochs=1, lr=1e-3)] * 3
    torch.manual_seed(0)
    untrained = {n: p.detach().numpy() for n, p in build_method(start, VOCABULARY).named_parameters()}
    for name, value in untrained.items():
        assert np.abs(plain[0][1][name] - value).max() > 0, name
    tolerance = 1e-4 if precision == "fp32" else 0.05
    for run in runs[1:]:
        for own, reference in zip(run, plain, strict=True):
            np.testing.assert_allclose(own[0], reference[0], rtol=tolerance)
    assert plain[0][1]["alignment.reached"].tolist() == [3, 4, 5]

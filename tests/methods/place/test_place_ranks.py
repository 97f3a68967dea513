"""PLACE on several ranks: the single-process gradient; its teacher under every ZeRO stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import OptimizerConfig
from medvlp.data.batch import join
from medvlp.data.batch_sizes import BatchSizes
from medvlp.distributed import rank
from medvlp.methods.base import Progress
from medvlp.training.accumulation import exact_passes
from medvlp.training.engine import Engine
from medvlp.training.step_guard import StepGuard
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small_mgca import rows_of
from tests.methods.small_place import report_batch, small_config, small_place

REPORTS = [[3, 2], [1], [2, 2, 1, 1], [5, 1], [1, 1, 1, 1, 1, 1], [4], [2, 6], []]
EVERYTHING = {"token_weight": 0.5, "report_pool": "attention", "correlation_target": "teacher"}


def gradients(ranks: int, image: str, method: dict[str, Any]) -> tuple[dict, dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    model = small_place(image, **method).double()
    model.on_progress(Progress(1, 1, 2))
    terms, averaged = averaged_gradients(model, report_batch(REPORTS), ranks)
    buffers = {
        name: value.double().numpy() for name, value in model.named_buffers() if value.is_floating_point()
    }
    return terms, averaged | buffers


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("image", "method"),
    [("vit", {}), ("resnet", EVERYTHING), ("vit", {"matching": "soft", "negative_scope": "report"})],
    ids=["hungarian", "everything", "report"],
)
def test_gradient_equals_the_single_process_one(
    gloo_pool, ranks: int, image: str, method: dict[str, Any]
) -> None:
    terms, expected = gradients(1, image, method)
    results = gloo_pool(ranks).run(gradients, ranks, image, method)
    for name, value in terms.items():
        # A share of this rank's pairs, and the reports of this rank's other samples.
        if name not in ("observation/excluded", "correlation/shuffled"):
            mean = np.mean([own[name] for own, _ in results])
            assert mean == pytest.approx(value, rel=1e-6), name
    assert_equal_gradients(results, expected)


@pytest.mark.dist
def test_local_negatives_differ_from_global_ones(gloo_pool) -> None:
    local = {"negatives": "local", "batch_norm": "local"}
    terms, _ = gradients(1, "vit", {})
    results = gloo_pool(2).run(gradients, 2, "vit", local)
    for name in ("loss/instance", "loss/observation"):
        mean = np.mean([own[name] for own, _ in results])
        assert abs(mean - terms[name]) > 1e-2
    batch = report_batch(REPORTS)
    for start, (own, _) in zip((0, 4), results, strict=True):
        model = small_place(**local).double()
        model.on_progress(Progress(1, 1, 2))
        alone = model(rows_of(batch, start, start + 4)).loss.item()
        assert own["loss"] == pytest.approx(alone, rel=1e-9)


def train_with_teacher(stage: int, precision: str, steps: int) -> dict[str, Any]:
    """This rank's teacher at the start and after each step; on rank 0 the weight it follows before each."""
    options: dict[str, Any] = {"correlation_target": "teacher", "teacher_momentum": 0.5}
    config = small_config(**options)
    config.zero.stage, config.precision = stage, precision
    config.optimizer = OptimizerConfig(lr=1e-2)
    # Everything is sharded, however small.
    config.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    model = small_place(**options)
    engine = Engine(model, config, BatchSizes(16, 4, 2, 2), torch.device("cpu"))
    guard = StepGuard(model, 0.0, engine.device)
    name = "alignment.correlation.patches."
    teachers = [dict(model.named_buffers())[f"{name}teacher_weight"].clone()]
    weights = []
    for step in range(steps):
        model.on_progress(Progress(step, step, steps))
        weights.append(engine.full_weights().get(f"{name}weight"))
        engine.set_learning_rate(1e-2)
        parts = [report_batch(REPORTS, seed=10 * step + part) for part in range(2)]
        guard.begin()
        exact_passes(engine, join([rows_of(part, rank() * 4, rank() * 4 + 4) for part in parts]), None, guard)
        engine.step()
        teachers.append(dict(model.named_buffers())[f"{name}teacher_weight"].clone())
    engine.close()
    return {"teachers": teachers, "weights": weights}


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_teacher_follows_the_whole_weight(gloo_pool, stage: int, precision: str) -> None:
    first, second = gloo_pool(2).run(train_with_teacher, stage, precision, 3)
    # Two micro-batches a step, but the average moves once, by the weight from before the step.
    expected = first["teachers"][0]
    for step, weight in enumerate(first["weights"]):
        seen = weight.to(torch.bfloat16 if precision == "bf16" else torch.float32).float()
        expected = 0.5 * expected + 0.5 * seen
        teacher = first["teachers"][step + 1]
        assert teacher.dtype == torch.float32
        torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(teacher, second["teachers"][step + 1])
    assert (first["teachers"][3] - first["teachers"][2]).abs().max() > 1e-3

"""MeDSLIP on several ranks: the gradient equals the single-process one although ranks mention unlike much."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medvlp.data.batch_sizes import BatchSizes
from medvlp.distributed import rank
from medvlp.training.engine import Engine
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small_medslip import random_matrix, small_batch, small_config, small_medslip
from tests.methods.small_mgca import rows_of

SAMPLES = 8


def batch_of_unlike_ranks():
    """The first half mentions much, the last sample nothing, so that per-rank means would differ."""
    matrix = random_matrix(SAMPLES, mentioned=0.03)
    matrix[SAMPLES // 2 :][random_matrix(SAMPLES // 2, seed=1, mentioned=0.2) < 0] = -1
    matrix[-2:] = -1
    return small_batch(matrix)


def gradients(ranks: int, image: str, method: dict) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    model = small_medslip(image, **method).double()
    return averaged_gradients(model, batch_of_unlike_ranks(), ranks)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_gradient_equals_the_single_process_one(gloo_pool, ranks: int, image: str) -> None:
    terms, expected = gradients(1, image, {})
    results = gloo_pool(ranks).run(gradients, ranks, image, {})
    for name, value in terms.items():
        assert np.mean([own[name] for own, _ in results]) == pytest.approx(value, rel=1e-6), name
    assert_equal_gradients(results, expected)


@pytest.mark.dist
def test_local_counts_are_means_of_each_rank(gloo_pool) -> None:
    local = {"negatives": "local", "batch_norm": "local"}
    results = gloo_pool(2).run(gradients, 2, "vit", local)
    batch = batch_of_unlike_ranks()
    halves = [small_medslip("vit", **local).double()(rows_of(batch, k, k + 4)).loss.item() for k in (0, 4)]
    np.testing.assert_allclose([own["loss"] for own, _ in results], halves, rtol=1e-9)
    whole, _ = gradients(1, "vit", {})
    assert abs(np.mean(halves) - whole["loss"]) > 1e-3


def train_with_deepspeed(stage: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights and book on rank 0 before and after two steps in bf16."""
    config = small_config()
    config.zero.stage, config.precision = stage, "bf16"
    # Everything is sharded, however small.
    config.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    engine = Engine(small_medslip(), config, BatchSizes(SAMPLES, SAMPLES // 2, 1, 2), torch.device("cpu"))
    start = engine.full_weights()
    half = SAMPLES // 2
    own = rows_of(batch_of_unlike_ranks(), rank() * half, (rank() + 1) * half)
    for _ in range(2):
        engine.set_learning_rate(1e-2)
        engine.backward(engine.forward(own).loss)
        engine.step()
    end = engine.full_weights()
    engine.close()
    return tuple({name: value.numpy() for name, value in each.items()} for each in (start, end))


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_book_and_text_encoder_stay_and_the_rest_trains(gloo_pool, stage: int) -> None:
    start, end = gloo_pool(2).run(train_with_deepspeed, stage)[0]
    book = small_medslip().book
    np.testing.assert_array_equal(start["book.pathology"], book.pathology.numpy())
    for name, value in end.items():
        stays = name.startswith(("book.", "text_encoder."))
        if stays:
            np.testing.assert_array_equal(value, start[name], err_msg=name)
        elif "norm" not in name and "running" not in name and "batches" not in name:
            assert np.abs(value - start[name]).max() > 1e-4, name

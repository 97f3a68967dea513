"""MPMA on several ranks: the single-process gradient with the same masks, and every ZeRO stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medvlp.config import OptimizerConfig
from medvlp.data.batch_sizes import BatchSizes
from medvlp.distributed import rank
from medvlp.methods.base import Progress
from medvlp.training.engine import Engine
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small_mgca import rows_of, small_batch
from tests.methods.small_mpma import small_config, small_mpma

pytestmark = pytest.mark.dist

WORDS = [3, 7, 1, 5, 2, 6, 4, 1]
NO_GRADIENT = ("key.bias", "qkv.bias", "head.linear1.bias", "head.linear2.bias")
SUMS = ("loss", "loss/image", "loss/report", "loss/global", "loss/local")


def gradients(ranks: int, method: dict) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    model = small_mpma(**method).double()
    model.on_progress(Progress(0, 17, 100))
    terms, averaged = averaged_gradients(model, small_batch(WORDS), ranks)
    return {name: terms[name] for name in SUMS}, averaged


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "method", [{}, {"masking": "separate", "memory": "retrieval", "summary": "mean", "head": "mlp"}]
)
def test_gradient_equals_the_single_process_one(gloo_pool, ranks: int, method: dict) -> None:
    terms, expected = gradients(1, method)
    results = gloo_pool(ranks).run(gradients, ranks, method)
    for name, value in terms.items():
        assert np.mean([own[name] for own, _ in results]) == pytest.approx(value, rel=1e-6), name
    assert_equal_gradients(results, expected)


def test_local_negatives_are_one_ranks_own(gloo_pool) -> None:
    local = {"negatives": "local", "batch_norm": "local"}
    results = gloo_pool(2).run(gradients, 2, local)
    for (own, _), start in zip(results, (0, 4), strict=True):
        model = small_mpma(**local).double()
        model.on_progress(Progress(0, 17, 100))
        alone = model(rows_of(small_batch(WORDS), start, start + 4)).named
        assert own["loss/global"] == pytest.approx(alone["loss/global"].item(), rel=1e-9)
    whole, _ = gradients(1, {})
    assert abs(np.mean([own["loss/global"] for own, _ in results]) - whole["loss/global"]) > 1e-2


def train_with_deepspeed(
    stage: int, precision: str, method: dict, padded: tuple[int, int] = (12, 12)
) -> dict[str, np.ndarray]:
    """Weights on rank 0 after three steps; the reports of each rank are `padded` to so many tokens."""
    config = small_config(**method)
    config.zero.stage, config.precision = stage, precision
    # Adam would scale the rounding noise in the gradients of key biases, which are 0, to full steps.
    config.optimizer = OptimizerConfig(name="sgd", weight_decay=0.0)
    # Everything is sharded, however small.
    config.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    model = small_mpma(**method)
    engine = Engine(model, config, BatchSizes(8, 4, 1, 2), torch.device("cpu"))
    own = rows_of(small_batch(WORDS, padded[rank()]), rank() * 4, rank() * 4 + 4, trim=False)
    for step in range(3):
        model.on_progress(Progress(0, step, 3))
        engine.set_learning_rate(5e-4)  # gradients are up to 200: larger steps make all images alike
        engine.backward(engine.forward(own).loss)
        engine.step()
    weights = engine.full_weights()
    engine.close()
    return {name: value.numpy() for name, value in weights.items()}


@pytest.mark.parametrize(
    "method", [{"tie_words": True}, {"memory": "retrieval", "decoder_reads_report": True}]
)
def test_every_zero_stage_trains_alike(gloo_pool, method: dict) -> None:
    expected = gloo_pool(2).run(train_with_deepspeed, 0, "fp32", method)[0]
    start = small_mpma(**method).state_dict()
    for stage in (2, 3):
        found = gloo_pool(2).run(train_with_deepspeed, stage, "fp32", method)[0]
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=f"stage {stage}: {name}")
    fixed = "image_encoder.backbone.pos_embed"
    np.testing.assert_array_equal(expected[fixed], start[fixed].numpy())
    moved = [name for name in expected if np.abs(expected[name] - start[name].numpy()).max() > 1e-7]
    assert "text_encoder.mask_embedding.weight" in moved
    assert "decoder.mask_token" in moved
    # Softmax leaves the bias of keys without gradient, a batch norm that of the layer before it.
    # Running averages are taken from unmasked passes only, of which three steps have none.
    unmoved = (*NO_GRADIENT, "running_mean", "running_var", "num_batches_tracked")
    still = {name for name in set(expected) - set(moved) if not name.endswith(unmoved)}
    assert still == {fixed}


def test_ranks_make_as_many_parts_whatever_the_length_of_their_reports(gloo_pool) -> None:
    # Parts that one rank alone makes would have it gather the head's weights from a rank that makes none.
    method, padded = {"loss_memory": 0.006}, (10, 40)
    expected = gloo_pool(2).run(train_with_deepspeed, 0, "fp32", method, padded)[0]
    found = gloo_pool(2).run(train_with_deepspeed, 3, "fp32", method, padded)[0]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)


def test_sixteen_bit_at_stage_three(gloo_pool) -> None:
    for weights in gloo_pool(2).run(train_with_deepspeed, 3, "bf16", {}):
        assert all(np.isfinite(value).all() for value in weights.values())

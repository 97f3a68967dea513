"""Sinkhorn against the published numbers, over ranks, and in the corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.distributed import logsumexp_over_ranks, rank
from medvlp.losses.sinkhorn import sinkhorn
from tests.golden_files import Golden, every

# Ours works on logarithms, the published code on exp(score / 0.05): in float32 they differ by its rounding.
FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}


@pytest.mark.parametrize("iterations", [1, 3, 10])
@every("mgca_sinkhorn_s*.npz")
def test_matches_the_published_codes(golden: Golden, iterations: int) -> None:
    logits, epsilon = golden("in_logits"), golden("in_epsilon").item()
    codes = sinkhorn(logits, epsilon, iterations)
    torch.testing.assert_close(codes, golden(f"out_code_it{iterations}", torch.float32), **FLOAT32)
    exact = sinkhorn(logits.double(), epsilon, iterations)
    published = golden(f"out_code64_it{iterations}", torch.float32)
    torch.testing.assert_close(exact, published, rtol=2e-7, atol=1e-9)


def codes_of_this_rank(logits: np.ndarray, everywhere: bool) -> np.ndarray:
    own = torch.from_numpy(logits[rank()])
    options = {"reduce": logsumexp_over_ranks} if everywhere else {}
    return sinkhorn(own, **options).numpy()


@pytest.mark.dist
@every("mgca_sinkhorn_dist_*.npz")
def test_over_ranks_equals_the_concatenated_batch(golden: Golden, gloo_pool) -> None:
    logits = golden("in_logits").numpy()
    joint = golden("out_code_joint_single_process").numpy()
    codes = gloo_pool(len(logits)).run(codes_of_this_rank, logits, True)
    np.testing.assert_allclose(np.concatenate(codes), joint, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(np.stack(codes), golden("out_code_distributed"), rtol=2e-5, atol=1e-6)
    local = gloo_pool(len(logits)).run(codes_of_this_rank, logits, False)
    np.testing.assert_allclose(np.stack(local), golden("out_code_local"), rtol=2e-5, atol=1e-6)


@settings(max_examples=50)
@given(
    batch=st.integers(1, 9),
    prototypes=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_is_a_distribution_for_any_scores(
    batch: int, prototypes: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(batch, prototypes, generator=generator) * 2 - 1).mul(scale).to(dtype)
    codes = sinkhorn(scores)
    assert codes.dtype == torch.float32
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(batch))


def test_uses_prototypes_equally() -> None:
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).tanh()
    scores[:, 0] += 0.5
    used = sinkhorn(scores, iterations=100).sum(0)
    torch.testing.assert_close(used, torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    unbalanced = (scores / 0.05).softmax(1).sum(0)
    assert unbalanced[0] > 16


def test_order_of_samples_does_not_matter() -> None:
    scores = torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(sinkhorn(scores)[order], sinkhorn(scores[order]))

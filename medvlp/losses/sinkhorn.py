"""Sinkhorn-Knopp: soft assignments of samples to equally used prototypes."""

from collections.abc import Callable

import torch
from torch import Tensor

from medvlp.losses.normalise import at_least_float32


def _one_rank(log_sums: Tensor) -> Tensor:
    return log_sums


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    reduce: Callable[[Tensor], Tensor] = _one_rank,
) -> Tensor:
    """Assignment of each sample to prototypes that are used equally over the whole batch.

    Works on logarithms in float32 (or float64): exp(1 / 0.05) = 4.9e8 overflows float16, and the sums stay
    exact for any score. Ends with the columns (samples) normalised, as SwAV and MGCA do.

    Args:
        scores: [b, K] similarities of this rank's samples with the prototypes.
        epsilon: entropy regularisation; smaller is harder.
        iterations: rounds of (prototype, sample) normalisation, at least 1.
        reduce: turns [K] log-sum-exps over this rank's samples into those over all ranks' samples
            (`medvlp.distributed.logsumexp_over_ranks`); the default is one rank alone.

    Returns:
        [b, K] float32, rows sum to 1, no gradient. (MGCA section 3.3; Cuturi 2013; SwAV 2020.)
    """
    log_plan = at_least_float32(scores) / epsilon
    for _ in range(iterations):
        log_plan = log_plan - reduce(log_plan.logsumexp(0))
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan.exp().float()

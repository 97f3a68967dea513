"""What all methods' tests on several ranks do: a rank's part of one batch, gradients averaged over ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from medvlp.data.batch import Batch
from medvlp.distributed import rank
from medvlp.prototypes.table import PrototypeTable
from tests.methods.small_mgca import rows_of


def averaged_gradients(
    model: nn.Module, batch: Batch, ranks: int, clusters: PrototypeTable | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms of this rank, and gradients of its rows averaged over ranks (0 where there is none)."""
    each = len(batch.keys) // ranks
    own = rows_of(batch, rank() * each, (rank() + 1) * each) if ranks > 1 else batch
    terms = model(own, clusters).named
    terms["loss"].backward()
    averaged = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            if ranks > 1:
                dist.all_reduce(gradient)
            averaged[name] = (gradient / ranks).numpy()
    return {name: value.item() for name, value in terms.items()}, averaged


def assert_equal_gradients(
    results: list[tuple[dict[str, float], dict[str, np.ndarray]]], expected: dict[str, np.ndarray]
) -> None:
    """Every rank has the expected gradients: parts in float32 leave about 1e-7 of the largest entry."""
    for _, averaged in results:
        for name, value in expected.items():
            scale = max(1e-3, np.abs(value).max())
            np.testing.assert_allclose(averaged[name], value, atol=2e-6 * scale, err_msg=name)

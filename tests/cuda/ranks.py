"""Checks of two ranks that share one GPU, which NCCL refuses: gloo carries their CUDA tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from medvlp import distributed
from medvlp.encoders.batch_norm import GlobalBatchNorm
from tests.cuda.place import Place
from tests.cuda.runner import Note
from tests.distributed_pool import GlooPool


def two_ranks(place: Place, note: Note) -> None:
    """Batch norm over ranks and the gather with gradient give what one process gives on all rows."""
    pool = GlooPool(2, timeout=200 if place.dry else 50, environment=of_ranks(os.environ))
    try:
        compare(pool.run(on_rank, str(place.device)), note)
    finally:
        pool.close()


def of_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What has ranks see the GPUs of this process, which may be given another than the machine's first."""
    accelerator = environment.get("DS_ACCELERATOR", "cuda")
    return {
        "DS_ACCELERATOR": accelerator,
        "CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0"),
    }


def compare(results: list[dict[str, torch.Tensor]], note: Note) -> None:
    """What `on_rank` gave on two ranks is what one process gives on the rows of both."""
    expected = _alone()
    for rank, found in enumerate(results):
        for name, value in found.items():
            rows = slice(4 * rank, 4 * rank + 4)
            apart = float((value - expected[name.partition(",")[0]][rows]).abs().max())
            note(f"{name} of rank {rank}", apart)
            assert apart < 1e-5, f"{name} on rank {rank}: {apart:.1e} from one process"


def _values() -> torch.Tensor:
    return torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0)[:, None, None]


def on_rank(device: str) -> dict[str, torch.Tensor]:
    """This rank's normalised rows, and the gradient of a loss over the rows of both ranks.

    With a mask of all positions, and without one, where torch's own layer for several GPUs runs.
    """
    own = slice(4 * distributed.rank(), 4 * distributed.rank() + 4)
    found = {}
    for kind, mask in ("masked", torch.ones(4, 5, dtype=torch.bool, device=device)), ("whole", None):
        values = _values()[own].to(device).requires_grad_()
        output = GlobalBatchNorm(3).to(device)(values, mask)
        everyone = distributed.gather_with_gradient(output.flatten(1))
        scores = output.flatten(1) @ everyone.T
        # The mean over ranks of losses over the rank's own rows is the loss over all rows.
        (scores.square().mean() / 2).backward()
        assert values.grad is not None
        found |= {f"output, {kind}": output.detach().cpu(), f"gradient, {kind}": values.grad.cpu()}
    return found


def _alone() -> dict[str, torch.Tensor]:
    values = _values().requires_grad_()
    output = nn.BatchNorm1d(3)(values)
    (output.flatten(1) @ output.flatten(1).T).square().mean().backward()
    assert values.grad is not None
    return {"output": output.detach(), "gradient": values.grad}

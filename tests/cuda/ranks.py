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
    """Collectives are exact; batch norm over ranks and the gather give what one process does."""
    pool = GlooPool(2, timeout=200 if place.dry else 50, environment=of_ranks(os.environ))
    try:
        judge(pool.run(carried, str(place.device)), note)
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


def carried(device: str) -> dict[str, str]:
    """What each collective of a training gave, "exact" or what was wrong, for each type of values."""
    rank, found = distributed.rank(), {}

    def ours(of: int, kind: torch.dtype) -> torch.Tensor:
        return (torch.arange(4).view(2, 2) + 10 * of).to(device, kind)

    for kind in torch.float32, torch.float16, torch.bfloat16, torch.int64:
        first, second = ours(0, kind), ours(1, kind)
        for name, run, expected in (
            ("all-gather", distributed.gather_rows, torch.cat([first, second])),
            ("reduce-scatter", _scattered, (first + second)[rank : rank + 1]),
            ("sum", distributed.sum_over_ranks, first + second),
            ("maximum", distributed.maximum_over_ranks, second),
            ("broadcast", _of_first, first),
        ):
            try:
                exact = torch.equal(run(ours(rank, kind)), expected)
                found[f"{name}, {kind}"] = "exact" if exact else "other values"
            except RuntimeError as error:  # gloo lacks it; of the others something is to be known too
                found[f"{name}, {kind}"] = str(error)[:300]
    return found


def _scattered(values: torch.Tensor) -> torch.Tensor:
    """As the gather with gradient does it in its backward pass."""
    own = values.new_empty((1, 2))
    distributed._reduce_scatter(own, values)
    return own


def _of_first(values: torch.Tensor) -> torch.Tensor:
    torch.distributed.broadcast(values, src=0)
    return values


def judge(results: list[dict[str, str]], note: Note) -> None:
    """Every collective must be exact: small whole numbers are, in every type."""
    note("collectives", results[0])
    wrong = {
        f"{name} on rank {rank}": told
        for rank, found in enumerate(results)
        for name, told in found.items()
        if told != "exact"
    }
    assert not wrong, f"gloo does not carry {wrong}"


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

"""Figures of single decisions: the published networks as they train, and with one thing as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import medvlp.methods.mgca.losses
from medvlp.encoders.projection import ProjectionHead
from medvlp.training.regional_compile import compile_regions
from tests.cuda.figures import make_engine, measure, random_batch, speeds, train_once
from tests.cuda.place import Place
from tests.cuda.runner import Note

#: What DeepSpeed does where it is told nothing.
_TIMERS = {"timers": {"throughput": {"enabled": True, "synchronized": True}}}
_BUCKETS = {
    "zero_optimization": {
        "overlap_comm": False,
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
    }
}


@contextmanager
def _waiting() -> Iterator[None]:
    """Weights of tokens take two numbers from the host, for which a step waits, twice."""
    weights = medvlp.methods.mgca.losses.clamped_weights

    def waits(attention: Tensor, valid: Tensor, quantile: float = 0.1) -> Tensor:
        torch.tensor([quantile, 1 - quantile], device=attention.device)
        return weights(attention, valid, quantile)

    with mock.patch.object(medvlp.methods.mgca.losses, "clamped_weights", waits):
        yield


@contextmanager
def _channels_in_the_middle() -> Iterator[None]:
    """Batch norms of tokens see [B, C, N], which torch's kernels copy."""

    def normalise(norm: Any, values: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = norm(values.movedim(-1, 1), mask).movedim(1, -1)
        return output if mask is None else output.masked_fill(~mask[..., None], 0.0)

    with mock.patch.object(ProjectionHead, "_normalise", staticmethod(normalise)):
        yield


Change = Callable[[], AbstractContextManager[None]]

#: By engine (ZeRO stage and keys of DeepSpeed): figures, and what is changed while they are taken. In bf16 at
#: stage 1 DeepSpeed has no buckets.
_VARIANTS: tuple[tuple[int, dict[str, Any], dict[str, Change]], ...] = (
    (
        1,
        {},
        {
            "stage 1": nullcontext,
            "stage 1, two waits for the host": _waiting,
            "stage 1, batch norm of channels in the middle": _channels_in_the_middle,
        },
    ),
    (1, _TIMERS, {"stage 1, DeepSpeed's timers": nullcontext}),
    (2, {}, {"stage 2": nullcontext}),
    (2, _BUCKETS, {"stage 2, DeepSpeed's buckets": nullcontext}),
)


def variants(place: Place, note: Note) -> None:
    """Samples a second in bf16 at a micro-batch of 256, each beside the same with one thing changed."""
    rows = 4 if place.dry else 256
    for stage, keys, changes in _VARIANTS:
        engine, config = make_engine(place, "bf16", stage, rows, keys)
        batch = random_batch(config, rows, engine.device)
        for name, change in changes.items():
            with change():
                note(name, speeds(measure(lambda e=engine, b=batch: train_once(e, b), place), rows))
        engine.close()
        del engine, batch


def compiled(place: Place, note: Note) -> None:
    """The same with compiled blocks, and the seconds until it is compiled; on a dry run nothing is."""
    rows = 4 if place.dry else 256
    with torch.compiler.set_stance("force_eager" if place.dry else "default"):
        regions: list[int] = []
        engine, config = make_engine(
            place,
            "bf16",
            1,
            rows,
            prepare=lambda method, device: regions.append(compile_regions(method, device)),
        )
        assert regions[0] > 0, "nothing is compiled: the log says why"
        batch = random_batch(config, rows, engine.device)
        first = measure(lambda: train_once(engine, batch), place, steps=(0, 1))
        note("compiling", {"seconds": first.seconds, "regions": regions[0]})
        note("stage 1, compiled", speeds(measure(lambda: train_once(engine, batch), place), rows))
        engine.close()

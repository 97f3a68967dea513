"""Means and sums over rows of large matrices, part by part; the backward pass computes each part again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: MiB of a matrix that losses make at once, where nothing else is said (`method.loss_memory`).
MEMORY = 256.0


def parts_of(rows: int, width: int, memory: float = MEMORY) -> list[slice]:
    """Cut rows of `width` float32 numbers into equal parts of at most `memory` MiB, or of a single row."""
    most = max(1, int(memory * 2**20 / (4 * max(1, width))))
    number = max(1, -(-rows // most))
    size = max(1, -(-rows // number))
    return [slice(start, min(rows, start + size)) for start in range(0, max(1, rows), size)]


def recomputed(function: Callable[..., tuple[Tensor, ...]], *arguments: object) -> tuple[Tensor, ...]:
    """The result of `function`, which draws nothing; the backward pass keeps its arguments alone."""
    result: tuple[Tensor, ...] = checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False
    )
    return result


def mean_in_parts(
    function: Callable[..., tuple[Tensor, ...]],
    rows: Sequence[Tensor | None],
    width: int,
    memory: float = MEMORY,
) -> tuple[Tensor, ...]:
    """What `function(start, *rows)` gives for all rows, from what it gives for some of them.

    Args:
        function: means over the rows it gets, the first of which is number `start` of all.
        rows: tensors of [N, ...] (or None, which stays None).
        width: float32 numbers that it compares a row with.
        memory: MiB of a part; a single part is not computed again.
    """
    count = next(len(value) for value in rows if value is not None)
    parts = parts_of(count, width, memory)
    if len(parts) == 1:
        return function(0, *rows)
    sizes = [where.stop - where.start for where in parts]
    # One split in place of slices: the way back through a slice fills a tensor of all rows.
    split = [[None] * len(parts) if value is None else torch.split(value, sizes) for value in rows]
    total: list[Tensor] = []
    for where, *own in zip(parts, *split, strict=True):
        share = (where.stop - where.start) / count
        found = [share * value for value in recomputed(function, where.start, *own)]
        total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
    return tuple(total)


def sums_in_parts(
    function: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], number: int
) -> tuple[Tensor, ...]:
    """What `function(*rows)`, sums over the [N, ...] rows, gives for all of them, from `number` parts.

    That many calls even of fewer rows; a single part is not computed again.
    """
    if number == 1:
        return function(*rows)
    parts = zip(*(value.tensor_split(number) for value in rows), strict=True)
    found = [recomputed(function, *part) for part in parts]
    return tuple(torch.stack(values).sum() for values in zip(*found, strict=True))

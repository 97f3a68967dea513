"""Counting how often each learned prototype is the nearest one, and which to start anew."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from medvlp.losses.normalise import unit_norm

#: Length of the push beside the prototype a revived one starts from, relative to that one's own length.
_PUSH = 0.05


class CountedPrototypes(nn.Module):
    """A module whose `weight` [K, D] are prototypes, and that counts their use where somebody asks for it.

    Attributes:
        usage: [K] float32 uses since it was last cleared, on the device; None: not counted (the default).
            No buffer: it is no part of the model.
    """

    weight: nn.Parameter
    usage: Tensor | None = None

    def started(self, centroids: Tensor, length: float) -> Tensor:
        """The weight that starts from [K, D] unit-norm centroids of features of a mean length."""
        return unit_norm(centroids)

    @torch.no_grad()
    def set(self, centroids: Tensor, length: float = 1.0) -> None:
        """Start from [K, D] centroids, before any engine owns the weight; see `started`.

        Raises:
            ValueError: another shape than the weight's.
        """
        if centroids.shape != self.weight.shape:
            raise ValueError(f"centroids {tuple(centroids.shape)} for prototypes {tuple(self.weight.shape)}")
        self.weight.copy_(self.started(centroids, length))

    @torch.no_grad()
    def count(self, scores: Tensor, valid: Tensor | None = None) -> None:
        """Count the best-scoring prototype of each row while training; nothing waits for the device.

        Args:
            scores: [..., K]. valid: [...] bool, rows that count; None: all.
        """
        if self.usage is None or not self.training:
            return
        nearest = scores.argmax(-1).flatten()
        weights = torch.ones_like(nearest) if valid is None else valid.flatten()
        self.usage.index_add_(0, nearest, weights.to(self.usage.dtype))


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Inside, no part of `module` counts the use of its prototypes: passes that are no training."""
    counted = [part for part in module.modules() if isinstance(part, CountedPrototypes)]
    uses = [part.usage for part in counted]
    for part in counted:
        part.usage = None
    try:
        yield
    finally:
        for part, usage in zip(counted, uses, strict=True):
            part.usage = usage


def revived_rows(weight: Tensor, usage: Tensor, below: float, seed: int) -> tuple[Tensor, Tensor]:
    """New values for prototypes that are hardly used, each beside the most used one at its turn.

    A prototype that lends its place counts half from then on; those that start anew lend none.

    Args:
        weight: [K, D]. usage: [K] uses over all ranks.
        below: share of an even use below which a prototype starts anew.
        seed: of the directions in which they are pushed aside.

    Returns:
        [m] int64 rows and their [m, D] float32 values, on the CPU; m may be 0.
    """
    weight, left = weight.detach().float().cpu(), usage.double().cpu()
    rows = (left < below * left.mean()).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    left[rows] = 0
    sources = []
    for _ in rows:
        sources.append(int(left.argmax()))
        left[sources[-1]] /= 2
    push = torch.nn.functional.normalize(
        torch.randn(len(sources), weight.shape[1], generator=generator), dim=1
    )
    beside = weight[sources]
    return rows, beside + _PUSH * torch.linalg.vector_norm(beside, dim=1, keepdim=True) * push

"""How patches lie in memory: the sound order, and the one PRIOR's published code reads by mistake."""

from __future__ import annotations

from torch import Tensor

from medvlp.methods.prior_config import PRIORConfig


def patch_vectors(local: Tensor, config: PRIORConfig) -> Tensor:
    """[B, P, D] local features in the order of the grid -> the vectors that count as patches.

    With `local_layout: official_view` the buffer of the [B, D, rows, columns] map is cut into P slices, so
    that a vector holds about D / P channels at all places.
    """
    if config.local_layout == "correct":
        return local
    return local.transpose(1, 2).reshape(local.shape)


def feature_map(patches: Tensor, grid: tuple[int, int], config: PRIORConfig) -> Tensor:
    """[B, P, D] patches -> [B, D, rows, columns] for convolutions; mistaken in the same way, or sound."""
    if config.local_layout == "correct":
        return patches.transpose(1, 2).reshape(len(patches), -1, *grid)
    return patches.reshape(len(patches), -1, *grid)

"""Whether an exported network is the trained one."""

from __future__ import annotations

from torch import Tensor

from medvlp.export.errors import ExportError

#: Largest difference between the features, as a share of the largest of them: other kernels, same weights.
TOLERANCE = 1e-4


def check_agreement(trained: Tensor, exported: Tensor, what: str) -> None:
    """Compare features of the trained network with those of what was written.

    Raises:
        ExportError: other shapes or other numbers.
    """
    if trained.shape != exported.shape:
        raise ExportError(
            f"{what} gives features of shape {list(exported.shape)}, training had {list(trained.shape)}"
        )
    difference, size = (trained - exported).abs().max().item(), trained.abs().max().item()
    # Written so that NaN fails too.
    if not difference <= TOLERANCE * size:
        raise ExportError(f"{what} gives other features than in training (by {difference:.2g} of {size:.2g})")

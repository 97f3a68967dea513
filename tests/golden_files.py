"""Golden files by pattern, for parametrised tests; `MEDVLP_GOLDEN` drops in other seeds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("MEDVLP_GOLDEN", Path(__file__).resolve().parent / "golden"))


def every(pattern: str) -> pytest.MarkDecorator:
    """Parametrise `golden` over every file of the golden folder that matches; none is a failing test."""
    files = sorted(FOLDER.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no golden file {pattern} in {FOLDER}")
    return pytest.mark.parametrize("golden", [Golden(file) for file in files], ids=lambda golden: golden.name)


class Golden:
    """The arrays of one file as torch tensors."""

    def __init__(self, file: Path):
        """Opens nothing yet."""
        self.file, self.name = file, file.stem

    def names(self, prefix: str = "") -> list[str]:
        """Names of the arrays that begin with `prefix`."""
        with np.load(self.file, allow_pickle=False) as arrays:
            return [name for name in arrays.files if name.startswith(prefix)]

    def __call__(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Array `name` as a tensor, floating-point ones in `dtype` if given."""
        with np.load(self.file, allow_pickle=False) as arrays:
            tensor = torch.from_numpy(np.array(arrays[name]))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def text(self, name: str) -> list[str] | str:
        """An array of strings as (nested) lists."""
        with np.load(self.file, allow_pickle=False) as arrays:
            return arrays[name].tolist()

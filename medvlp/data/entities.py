"""The anatomy-observation matrices of many samples, packed: only the cells a report mentions are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.entities.matrix import NOT_MENTIONED, SHAPE, Triple, matrix_cells


@dataclass(frozen=True)
class EntityRows:
    """Mentioned cells of many samples, one sample after the other.

    Attributes:
        cells: int16 [E]; 2 * (75 * anatomy + observation) + value, with value 1 present or 0 absent.
        offsets: int64 [N + 1]; sample i has cells offsets[i] .. offsets[i + 1] - 1.
    """

    cells: NDArray[np.int16]
    offsets: NDArray[np.int64]

    @classmethod
    def pack(cls, samples: Iterable[Sequence[Triple]]) -> EntityRows:
        """Pack the entities of samples as `<key>.json` holds them."""
        rows = [[2 * cell + value for cell, value in matrix_cells(sample).items()] for sample in samples]
        return cls(
            cells=np.array([code for row in rows for code in row], dtype=np.int16),
            offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        )

    def matrices(self, selection: NDArray[np.int64]) -> NDArray[np.int8]:
        """Matrices [B, 51, 75] int8 of the selected samples: 1 present, 0 absent, -1 not mentioned."""
        starts = self.offsets[selection]
        lengths = self.offsets[selection + 1] - starts
        sample = np.repeat(np.arange(len(selection)), lengths)
        first = np.cumsum(lengths) - lengths
        codes = self.cells[np.arange(len(sample)) + np.repeat(starts - first, lengths)].astype(np.int64)
        matrices = np.full((len(selection), SHAPE[0] * SHAPE[1]), NOT_MENTIONED, dtype=np.int8)
        matrices[sample, codes // 2] = codes % 2
        return matrices.reshape(-1, *SHAPE)

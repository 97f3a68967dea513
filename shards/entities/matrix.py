"""Entities as the anatomy-observation matrix a method reads."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.entities.landmarks import ANATOMY_ROW, MIRRORED_ROWS, landmark
from shards.entities.observations import OBSERVATION_COLUMN, observation_class
from shards.entities.vocabulary import ANATOMIES, OBSERVATIONS

#: Raise when vocabularies or rules change: matrices that were computed before are then computed again.
VERSION = 1

SHAPE = (len(ANATOMIES), len(OBSERVATIONS))
PRESENT, ABSENT, NOT_MENTIONED = 1, 0, -1

#: [anatomy, observation, value], as `<key>.json` holds them.
Triple = Sequence[str | int]


def matrix_cells(entities: Iterable[Triple]) -> dict[int, int]:
    """Cell (row * 75 + column) -> 1 present or 0 absent, for the cells a report mentions, in their order.

    Present wins over absent; uncertain entities (-1) are dropped, as published.
    """
    cells: dict[int, int] = {}
    for anatomy, observation, value in entities:
        if value not in (PRESENT, ABSENT):
            continue
        row = ANATOMY_ROW[landmark(str(anatomy))]
        cell = row * SHAPE[1] + OBSERVATION_COLUMN[observation_class(str(observation))]
        cells[cell] = max(cells.get(cell, ABSENT), int(value))
    return dict(sorted(cells.items()))


def entity_matrix(entities: Iterable[Triple]) -> NDArray[np.int8]:
    """[51, 75] int8: 1 present, 0 absent, -1 not mentioned."""
    matrix = np.full(SHAPE, NOT_MENTIONED, dtype=np.int8)
    for cell, value in matrix_cells(entities).items():
        matrix.flat[cell] = value
    return matrix


def mirrored(matrices: NDArray[np.int8]) -> NDArray[np.int8]:
    """Matrices [..., 51, 75] of horizontally flipped images: left and right anatomies change places.

    A row that names one side and has no counterpart (middle lobe, right atrium, right ventricle) becomes "not
    mentioned": what the flipped image shows there has no name in the vocabulary.
    """
    rows = np.array(MIRRORED_ROWS)
    flipped = matrices[..., rows, :]
    flipped[..., rows < 0, :] = NOT_MENTIONED
    return flipped

"""The anatomy-observation matrix: which value wins, what a flip does, and the published per-image targets."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from shards.entities.landmarks import ANATOMY_ROW
from shards.entities.matrix import entity_matrix, mirrored
from shards.entities.observations import OBSERVATION_COLUMN


def cell(anatomy: str, observation: str) -> tuple[int, int]:
    return ANATOMY_ROW[anatomy], OBSERVATION_COLUMN[observation]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 0, -1], 1), ([0, -1], 0), ([-1], -1), ([0], 0), ([1, 1], 1), ([], -1)],
)
def test_present_wins_over_absent_and_uncertain_is_dropped(values: list[int], expected: int) -> None:
    for order in permutations(values):
        matrix = entity_matrix([["left pleural space", "effusion", value] for value in order])
        assert matrix.shape == (51, 75)
        assert matrix.dtype == np.int8
        assert matrix[cell("left_pleural", "effusion")] == expected
        assert (matrix != -1).sum() == (expected != -1)


def test_a_flip_exchanges_the_sides() -> None:
    entities = [
        ["left lower lobe", "opacity", 1],
        ["right lower lobe", "opacity", 0],
        ["right middle lobe", "nodule", 1],
        ["heart", "cardiomegaly", 1],
    ]
    matrix = entity_matrix(entities)
    flipped = mirrored(np.stack([matrix, matrix]))[1]
    assert flipped[cell("lower_left_lobe", "opacity")] == 0
    assert flipped[cell("lower_right_lobe", "opacity")] == 1
    assert flipped[cell("heart_size", "cardiomegaly")] == 1
    assert (flipped[ANATOMY_ROW["middle_right_lobe"]] == -1).all()
    assert matrix[cell("middle_right_lobe", "nodule")] == 1, "the argument is not changed"


def test_values_follow_the_published_targets(golden_dir: Path) -> None:
    """Reducing a matrix by its maximum over an axis gives the published existence targets."""
    files = sorted(golden_dir.glob("medslip_triplets_*.npz"))
    assert files
    for file in files:
        with np.load(file, allow_pickle=False) as golden:
            matrix = golden["matrix"]
            np.testing.assert_array_equal(matrix.max(axis=1), golden["exist_pathology"])
            np.testing.assert_array_equal(matrix.max(axis=2), golden["exist_anatomy"])

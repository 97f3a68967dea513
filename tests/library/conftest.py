"""A small dataset, a run on it as training leaves it, its export, and two films."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from launcher.main import app
from tests.export.conftest import data as data
from tests.export.saved import save_run


@pytest.fixture(scope="session")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    save_run(data, folder)
    return folder


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    assert CliRunner().invoke(app, ["export", str(run), "--out", str(out)]).exit_code == 0
    return out


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two films of noise, neither square nor of the stored size."""
    folder = tmp_path_factory.mktemp("films")
    for number, shape in enumerate([(60, 40), (40, 90)]):
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        cv2.imwrite(str(folder / f"film{number}.png"), pixels)
    return sorted(folder.iterdir())

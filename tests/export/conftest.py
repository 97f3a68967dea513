"""A small phantom dataset, and `medvlp export` in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.main import app
from tests.drawn_once import phantoms


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32-pixel phantoms of 24 studies, as shards."""
    return phantoms(tmp_path_factory.mktemp("phantoms") / "data", studies=24, image_size=32)


@pytest.fixture
def export() -> Callable[..., Result]:
    """`export(run, out, *more)`; an error meant for the user is left in `result.exception`."""
    return lambda run, out, *more: CliRunner().invoke(app, ["export", str(run), "--out", str(out), *more])

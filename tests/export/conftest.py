"""A small phantom dataset, and `medvlp export` in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.main import app


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32-pixel phantoms of 24 studies, as shards."""
    root = tmp_path_factory.mktemp("phantoms") / "data"
    arguments = ["--out", str(root), "--studies", "24", "--image-size", "32", "--workers", "1"]
    result = CliRunner().invoke(app, ["shards", "build", "phantom", *arguments])
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def export() -> Callable[..., Result]:
    """`export(run, out, *more)`; an error meant for the user is left in `result.exception`."""
    return lambda run, out, *more: CliRunner().invoke(app, ["export", str(run), "--out", str(out), *more])

"""A small phantom dataset and the config of a run on it, for tests that train for real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.runs import TINY


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64-pixel phantoms of 80 studies, as shards."""
    from typer.testing import CliRunner

    from launcher.main import app

    root = tmp_path_factory.mktemp("phantoms") / "data"
    arguments = ["--out", str(root), "--studies", "80", "--image-size", "64", "--seed", "0", "--workers", "1"]
    result = CliRunner().invoke(app, ["shards", "build", "phantom", *arguments])
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def overrides(phantom_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`overrides("zero.stage=1", run="name")` -> the `key=value` list of a tiny run below tmp_path."""

    def build(*more: str, run: str = "run") -> list[str]:
        return [*TINY, f"data.root={phantom_data}", f"run.dir={tmp_path / run}", *more]

    return build

"""Phantoms that the first process of a test session draws and the others copy: a study takes 20 ms."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_FOLDER = "MEDVLP_TESTS_DRAWN"
#: Of the process that begins the session; its workers and ranks inherit the variable.
_own = None if _FOLDER in os.environ else tempfile.TemporaryDirectory(prefix="medvlp-drawn-")
if _own:
    os.environ[_FOLDER] = _own.name


def drawn_once(name: str, draw: Callable[[Path], object], folder: Path) -> Path:
    """`folder`, new, with a copy of what `draw` makes in another new folder.

    `name` stands for all that `draw` depends on.
    """
    master = Path(os.environ[_FOLDER]) / name
    with FileLock(f"{master}.lock"):
        if not master.is_dir():
            unfinished = master.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            draw(unfinished)
            unfinished.rename(master)
    return Path(shutil.copytree(master, folder))


def phantoms(folder: Path, studies: int, image_size: int) -> Path:
    """`folder` with what `medvlp shards build phantom` makes of so many studies with seed 0."""
    from typer.testing import CliRunner

    from launcher.main import app

    def build(out: Path) -> None:
        words = ["--out", out, "--studies", studies, "--image-size", image_size, "--seed", 0, "--workers", 1]
        result = CliRunner().invoke(app, ["shards", "build", "phantom", *map(str, words)])
        assert result.exit_code == 0, result.output

    return drawn_once(f"phantoms-{studies}-{image_size}", build, folder)

"""Splits what stands behind a command into config files and overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """`a.yaml b.yaml x.y=1` -> ([a.yaml, b.yaml], ["x.y=1"]); an existing file may hold "=" in its name."""
    files, overrides = [], []
    for argument in arguments:
        if "=" in argument and not Path(argument).exists():
            overrides.append(argument)
        else:
            files.append(Path(argument))
    return files, overrides

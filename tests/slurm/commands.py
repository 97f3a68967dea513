"""Commands of the program that tests give on the login node."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from launcher.main import app


def medvlp(*words: object) -> str:
    """What a command prints; errors are raised as they are."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def listed(*words: object) -> list[dict[str, Any]]:
    """What a command with --json prints."""
    values: list[dict[str, Any]] = json.loads(medvlp(*words, "--json"))
    return values

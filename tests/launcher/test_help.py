"""What `--help` shows fits a terminal of 80 columns, for every command there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from launcher.main import app


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from commands(command.get_command(None, name), (*words, name))


def shown(*words: str) -> list[str]:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.mark.parametrize("words", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_help_is_readable_at_80_columns(words: tuple[str, ...]) -> None:
    lines = shown(*words)
    assert max(map(len, lines)) <= 80
    cut = [line for line in lines if line.endswith("...") and not line.endswith(("]...", "}..."))]
    assert not cut, "a sentence is cut"
    # A table whose text begins in the right half leaves it three words a line.
    starts = [len(line) - len(line.lstrip()) for line in lines]
    assert max(starts) <= 40


def test_the_shell_can_complete_commands() -> None:
    environment = {"_MEDVLP_COMPLETE": "complete_bash", "COMP_WORDS": "medvlp pret", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="medvlp", env=environment)
    assert result.output.split() == ["pretrain"]

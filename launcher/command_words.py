"""Command lines as data: which command words mean, with which values, and back into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main


@dataclass(frozen=True)
class Parsed:
    """A command line that was understood.

    Attributes:
        command: the command at its end (click's).
        values: value of every parameter by name.
        given: names of those that stand on the command line.
    """

    command: Any
    values: dict[str, Any]
    given: frozenset[str]


def parse(app: typer.Typer, words: Sequence[str]) -> Parsed:
    """Understand `words` as the program would, without running anything.

    Raises:
        Exception: click's, which the program shows with a usage line and exit code 2.
    """
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        context = command.make_context(command.name, rest, resilient_parsing=True)
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    context = command.make_context(command.name, rest)
    return Parsed(command, dict(context.params), frozenset(_given(context)))


def given_options(context: Any) -> list[str]:
    """The options that stand on the command line of a running command; files by absolute paths."""
    given = _given(context)
    values = {name: value for name, value in context.params.items() if name in given}
    absolute = {name: value.absolute() for name, value in values.items() if isinstance(value, Path)}
    return option_words(context.command, values | absolute)


def _given(context: Any) -> set[str]:
    return {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}


def option_words(command: Any, values: Mapping[str, Any]) -> list[str]:
    """Options that give a command these values; positional arguments and None are left out."""
    words: list[str] = []
    for parameter in command.params:
        value = values.get(parameter.name)
        if parameter.param_type_name != "option" or value is None:
            continue
        if parameter.is_flag:
            words += [parameter.opts[0]] if value else parameter.secondary_opts[:1]
        elif parameter.multiple:
            words += [f"{parameter.opts[0]}={item}" for item in value]
        else:
            words.append(f"{parameter.opts[0]}={value}")
    return words

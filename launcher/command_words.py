"""Command lines as data: which command words mean, options from dataclasses, and values back into words."""

import dataclasses
import functools
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperGroup

#: A path in the home directory as a word: `~/x`, `--data=~/x`, `run.dir=~/x`, `--split-list=test=~/x`.
_IN_HOME = re.compile(r"((?:--)?(?:[\w.-]+=){0,2})(~/.*)", re.DOTALL)


class CommandGroup(TyperGroup):
    """A group whose help shows what each command does in full sentences, not cut after half a line.

    In every word of its commands a `~/` at the beginning of a path is the home directory: a shell leaves the
    one behind `=`, and a program that starts another leaves all.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click; also of the words that commands below this group get."""
        return super().parse_args(ctx, [_in_home(word) for word in args])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line or more for each command that is not hidden."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, of.get_short_help_str(1000)) for name, of in commands if of and not of.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _in_home(word: str) -> str:
    found = _IN_HOME.fullmatch(word)
    return word if found is None else found[1] + os.path.expanduser(found[2])  # noqa: PTH111 (never raises)


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """`a.yaml b.yaml x.y=1` -> ([a.yaml, b.yaml], ["x.y=1"]); an existing file may hold "=" in its name."""
    files, overrides = [], []
    for argument in arguments:
        if "=" in argument and not Path(argument).exists():
            overrides.append(argument)
        else:
            files.append(Path(argument))
    return files, overrides


def options_of_dataclasses(function: Callable[..., None]) -> Callable[..., None]:
    """A typer command from a function in which a parameter that is a dataclass stands for its fields.

    Each field is an option of the command: its annotation says which (`Annotated[T, typer.Option(...)]`), its
    default what it is when it is not given. The function gets the dataclass, filled.
    """
    parameters, groups = [], {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if not (isinstance(parameter.annotation, type) and dataclasses.is_dataclass(parameter.annotation)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = parameter.annotation
        annotations = typing.get_type_hints(parameter.annotation, include_extras=True)
        for field in dataclasses.fields(parameter.annotation):
            kind, hint = inspect.Parameter.KEYWORD_ONLY, annotations[field.name]
            parameters.append(inspect.Parameter(field.name, kind, default=_default(field), annotation=hint))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        filled = {
            name: kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        function(**values, **filled)

    # typer reads both.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


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

"""Whether a config's values can be used: numbers in range, lists long enough, text printable."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

_MOST_TEXT = 4096
#: Lines of shell in a cluster's settings may hold these.
_BLANKS = str.maketrans("\n\t", "  ")


def value_problem(section: Any, prefix: str = "") -> str | None:
    """The first value of a config dataclass that its `key` does not allow, in one line; or None."""
    return next(_problems(section, prefix), None)


def _problems(section: Any, prefix: str) -> Iterator[str]:
    for item in dataclasses.fields(section):
        value, path = getattr(section, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from _problems(value, f"{path}.")
        elif isinstance(value, list):
            yield from _list_problems(value, item.metadata, path)
        elif isinstance(value, str) and value != "???" and not value.strip():
            yield f"{path} is empty; leave it out for its default"
        elif isinstance(value, str) and "\n" in value:
            yield f"{path} has more than one line"
        else:
            yield from _plain_problems(value, item.metadata, path)


def _list_problems(values: list[Any], allowed: Mapping[str, Any], path: str) -> Iterator[str]:
    least, most = allowed.get("items") or (0, 1000)
    if not least <= len(values) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        yield f"{path} has {len(values)} values; it takes {wanted}"
    for number, value in enumerate(values):
        if dataclasses.is_dataclass(value):
            yield from _problems(value, f"{path}[{number}].")
        elif isinstance(value, list | dict):
            yield f"{path}[{number}] is a list or mapping; it takes one value"
        else:
            yield from _plain_problems(value, allowed, f"{path}[{number}]")


def _plain_problems(value: Any, allowed: Mapping[str, Any], path: str) -> Iterator[str]:
    """Of a text, a number, the free values of `options` and `deepspeed`, or a section among such."""
    if isinstance(value, bool) or value is None:
        return
    if dataclasses.is_dataclass(value):
        yield from _problems(value, f"{path}.")
    elif isinstance(value, str):
        if len(value) > _MOST_TEXT or not value.translate(_BLANKS).isprintable():
            yield f"{path} is longer than {_MOST_TEXT} characters or holds some that cannot be printed"
    elif isinstance(value, int | float):
        low, high = allowed.get("low"), allowed.get("high")
        shown = str(value)[:40]
        if not math.isfinite(value):
            yield f"{path}={shown} is out of range: it is not finite"
        elif (low is not None and value < low) or (high is not None and value > high):
            yield f"{path}={shown} is out of range: it goes from {low}" + (
                f" to {high}" if high is not None else " up"
            )
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _plain_problems(inner, {}, f"{path}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _plain_problems(inner, {}, f"{path}[{number}]")

"""Sources by name: those of the files beside this one, and those of other installed packages.

A source registers itself with `@register(...)` when its module is imported. Here that is every file and
package of this folder; elsewhere it is what a package declares as an entry point of the group
`medvlp.sources`, or what was imported before.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import shards.sources
from shards.errors import UsageError
from shards.sources.base import Source

#: Entry points of this group name a module that registers a source when it is imported.
GROUP = "medvlp.sources"

#: Takes the options (an instance of the registered dataclass) and the side of the stored images in pixels.
Open = Callable[[Any, int], Source]
OpenType = TypeVar("OpenType", bound=Open)


@dataclass(frozen=True)
class Entry:
    """A registered source: the dataclass of its options, the function that opens it, its one line of help."""

    options: type[Any]
    open: Open
    help: str


_REGISTRY: dict[str, Entry] = {}


def register(name: str, options: type[Any]) -> Callable[[OpenType], OpenType]:
    """Decorator of the function `(options, image_size) -> Source` that opens a source.

    Its docstring becomes the help of `medvlp shards build NAME`; the fields of the dataclass `options`
    (`shards.sources.base.option`) become the command's options.
    """
    if not is_dataclass(options):
        raise TypeError(f"source {name!r}: {options.__name__} is no dataclass")

    def decorate(function: OpenType) -> OpenType:
        if name in _REGISTRY and _REGISTRY[name].open is not function:
            raise ValueError(f"source {name!r} is registered twice")
        _REGISTRY[name] = Entry(options, function, inspect.getdoc(function) or "")
        return function

    return decorate


def sources() -> dict[str, Entry]:
    """All sources by name, in alphabetical order."""
    _import_sources()
    return dict(sorted(_REGISTRY.items()))


@cache
def _import_sources() -> None:
    for module in pkgutil.iter_modules(shards.sources.__path__):
        importlib.import_module(f"{shards.sources.__name__}.{module.name}")
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise UsageError(
                f"the installed package that declares the source {point.name!r} ({point.value}) cannot be "
                f"imported: {type(error).__name__}: {error}"
            ) from error

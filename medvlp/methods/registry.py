"""Methods by name. Adding one: its file with `@register(...)`, its YAML, and one line in `MODULES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from medvlp.config import Config, MethodConfig
from medvlp.methods.base import Method
from shards.errors import MedvlpError

#: Modules that register a method when they are imported.
MODULES = ("medvlp.methods.mgca",)

Build = Callable[[Config, int], Method]
BuildType = TypeVar("BuildType", bound=Build)


class UnknownMethodError(MedvlpError, KeyError):
    """`method.name` is not registered; the message lists the names that are."""

    exit_code = 2

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Entry:
    """A registered method: the schema of its keys and the function that builds it.

    `build(config, vocab_size)` receives the whole config and the number of tokens of the tokenizer.
    """

    config: type[MethodConfig]
    build: Build


REGISTRY: dict[str, Entry] = {}


def register(name: str, config: type[MethodConfig]) -> Callable[[BuildType], BuildType]:
    """Decorator of a method's build function `(config, vocab_size) -> Method`."""

    def decorate(build: BuildType) -> BuildType:
        if name in REGISTRY and REGISTRY[name].build is not build:
            raise ValueError(f"method {name!r} is registered twice")
        REGISTRY[name] = Entry(config, build)
        return build

    return decorate


def _entries() -> dict[str, Entry]:
    for module in MODULES:
        importlib.import_module(module)
    return REGISTRY


def schemas() -> dict[str, type[MethodConfig]]:
    """Config class of every method by name (what `medvlp.config_files.load` validates `method:` with)."""
    return {name: entry.config for name, entry in _entries().items()}


def build_method(config: Config, vocab_size: int) -> Method:
    """Build the method `config.method.name` with random or the configured weights, on the CPU in float32.

    Args:
        config: the whole, validated config.
        vocab_size: number of tokens of the tokenizer.

    Raises:
        UnknownMethodError: no such method.
        EncoderError: an encoder that cannot be built or does not fit the method.
    """
    entries = _entries()
    if config.method.name not in entries:
        known = ", ".join(sorted(entries))
        raise UnknownMethodError(f"method.name={config.method.name!r} is not a method; known: {known}")
    return entries[config.method.name].build(config, vocab_size)

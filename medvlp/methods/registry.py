"""Methods by name: those of the folders beside this file, and those of other installed packages.

A method registers itself with `@register(...)` when its module is imported. Here that is `method.py` of every
folder; elsewhere it is what a package declares as an entry point of the group `medvlp.methods`, or what was
imported before. Keys are known without it: `config.py` of a folder is imported alone, because the networks
behind `method.py` (timm, transformers) take seconds that a command which only reads a config need not wait.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

import medvlp.methods
from medvlp.config import Config, MethodConfig
from medvlp.methods.base import Method
from shards.errors import MedvlpError

#: Entry points of this group name a module that registers a method when it is imported.
GROUP = "medvlp.methods"

Build = Callable[[Config, int], Method]
BuildType = TypeVar("BuildType", bound=Build)


class UnknownMethodError(MedvlpError, KeyError):
    """`method.name` is not registered; the message lists the names that are."""

    exit_code = 2

    def __str__(self) -> str:
        return str(self.args[0])


class BrokenMethodError(MedvlpError):
    """A package declares a method that cannot be imported; the message names it."""

    exit_code = 2


@dataclass(frozen=True)
class Entry:
    """A registered method: the schema of its keys and the function that builds it.

    `build(config, vocab_size)` receives the whole config and the number of tokens of the tokenizer;
    `fields` are the names of the batch fields it reads (`medvlp.data.fields`).
    """

    config: type[MethodConfig]
    build: Build
    fields: frozenset[str] = frozenset()


REGISTRY: dict[str, Entry] = {}


def register(
    name: str, config: type[MethodConfig], fields: Iterable[str] = ()
) -> Callable[[BuildType], BuildType]:
    """Decorator of a method's build function `(config, vocab_size) -> Method`.

    `fields` are names of `medvlp.data.fields`: training fills them in and refuses a dataset that lacks one.
    """

    def decorate(build: BuildType) -> BuildType:
        if name in REGISTRY and REGISTRY[name].build is not build:
            raise ValueError(f"method {name!r} is registered twice")
        REGISTRY[name] = Entry(config, build, frozenset(fields))
        return build

    return decorate


def _entries() -> dict[str, Entry]:
    for folder in _folders():
        importlib.import_module(f"{folder}.method")
    _import_outside()
    return REGISTRY


def _folders() -> list[str]:
    found = pkgutil.iter_modules(medvlp.methods.__path__, f"{medvlp.methods.__name__}.")
    return [module.name for module in found if module.ispkg]


@cache
def _import_outside() -> None:
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # of somebody else's package: anything can come
            raise BrokenMethodError(
                f"the method {point.name!r} of an installed package cannot be imported from {point.value} "
                f"({type(error).__name__}: {error}): mend or uninstall the package"
            ) from error


def schemas() -> dict[str, type[MethodConfig]]:
    """Config class of every method by name (what `medvlp.config_files.load` validates `method:` with)."""
    _import_outside()
    here = {config.name: config for folder in _folders() for config in _configs_in(f"{folder}.config")}
    return here | {name: entry.config for name, entry in REGISTRY.items()}


def _configs_in(name: str) -> list[type[MethodConfig]]:
    """Those that the module defines; what it imports is another method's."""
    defined = vars(importlib.import_module(name)).values()
    classes = [found for found in defined if isinstance(found, type) and found.__module__ == name]
    return [found for found in classes if issubclass(found, MethodConfig)]


def build_method(config: Config, vocab_size: int) -> Method:
    """Build the method `config.method.name` with random or the configured weights, on the CPU in float32.

    Args:
        config: the whole, validated config.
        vocab_size: number of tokens of the tokenizer.

    Raises:
        UnknownMethodError: no such method.
        EncoderError: an encoder that cannot be built or does not fit the method.
        ConfigError: see `MethodConfig.check`.
    """
    config.method.check(config)
    method = _entry(config.method.name).build(config, vocab_size)
    if config.prototypes.false_negatives == "mask":
        if method.service_user is None:
            raise TypeError(f"{type(method).__name__} has embeddings by its config, but no service_user")
        clusters = config.prototypes.clusters if config.prototypes.masks_by_clusters else None
        method.service_user.mask_false_negatives(clusters)
    return method


def fields_of(name: str) -> frozenset[str]:
    """Names of the batch fields that method `name` reads.

    Raises:
        UnknownMethodError: no such method.
    """
    return _entry(name).fields


def _entry(name: str) -> Entry:
    entries = _entries()
    if name not in entries:
        known = ", ".join(sorted(entries))
        raise UnknownMethodError(f"method.name={name!r} is not a method; known: {known}")
    return entries[name]

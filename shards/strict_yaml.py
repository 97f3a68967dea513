"""Reading YAML that strangers may have written: no tags, no aliases that grow, no depth, no name twice."""

from pathlib import Path
from typing import Any

import yaml

from shards.errors import DataError
from shards.strict_json import MAX_DEPTH, JsonError, read_limited

#: Largest file, in bytes, and most values once aliases are written out.
YAML_LIMIT = 1 << 20
MAX_VALUES = 100_000

_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value")
)
# libyaml's parser reads a config in milliseconds, the one in Python takes a tenth of a second.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXT_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


class YamlError(ValueError):
    """What is wrong with a YAML text, in one line."""


def check_yaml(text: str) -> None:
    """Refuse what no config needs; builds no value.

    Raises:
        YamlError: no YAML, longer than `YAML_LIMIT`, deeper than `MAX_DEPTH`, a tag of Python's or another
            type than text, number, list and mapping, a name twice in one mapping, or aliases that refer to
            themselves or stand for more than `MAX_VALUES` values.
    """
    if len(text) > YAML_LIMIT:
        raise YamlError(f"longer than the limit of {YAML_LIMIT} characters")
    # libyaml composes recursively in C, so the depth is read from its events first.
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise YamlError(f"more than {MAX_DEPTH} lists and mappings inside each other")
        _size(yaml.compose(text, Loader=_LOADER), {}, 0)
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())[:300]) from None


def parse_yaml(text: str) -> Any:
    """The values of a YAML text, which `check_yaml` has no objection to.

    Raises:
        YamlError: see there, or a number that is none.
    """
    check_yaml(text)
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(" ".join(str(error).split())[:300]) from None


def yaml_as_written(text: str) -> Any:
    """Nested dicts, lists and texts: what `parse_yaml` gives, before any text becomes a number or a boolean.

    Raises:
        YamlError: see `check_yaml`.
    """
    check_yaml(text)
    return yaml.load(text, Loader=_TEXT_LOADER)


def _size(node: yaml.Node | None, sizes: dict[int, int], depth: int) -> int:
    """Number of values of a node with its aliases written out."""
    if node is None:
        return 0
    if node.tag not in _TAGS:
        raise YamlError(
            f"line {node.start_mark.line + 1}: a value has a tag; write plain text, numbers or lists"
        )
    if isinstance(node, yaml.ScalarNode):
        return 1
    if sizes.get(id(node)) == 0 or depth > MAX_DEPTH:
        raise YamlError(f"line {node.start_mark.line + 1}: aliases that refer to themselves, or too deep")
    if id(node) not in sizes:
        sizes[id(node)] = 0
        children = node.value
        if isinstance(node, yaml.MappingNode):
            names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
            if len(set(names)) < len(node.value):
                raise YamlError(f"line {node.start_mark.line + 1}: a key is given twice")
            children = [part for pair in node.value for part in pair]
        total = 1 + sum(_size(child, sizes, depth + 1) for child in children)
        if total > MAX_VALUES:
            raise YamlError(f"aliases stand for more than {MAX_VALUES} values")
        sizes[id(node)] = total
    return sizes[id(node)]


def load_yaml_text(path: Path) -> Any:
    """Nested dicts, lists and texts of a YAML file; what is left empty is "", an empty file None.

    Raises:
        DataError: the file cannot be read, is no YAML, or gives a key twice.
    """
    try:
        return yaml_as_written(read_limited(path, YAML_LIMIT).decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except JsonError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not YAML: not UTF-8") from error
    except YamlError as error:
        raise DataError(f"{path} is not YAML: {error}") from error

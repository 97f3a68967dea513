"""Keys of a config: which there are, and those that are moved, of files, of networks, and texts."""

import dataclasses
import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from medvlp.config import ConfigError, ImageConfig, TextConfig

#: Old path -> new path. The config in a run folder is read under the new names; a user's own file or
#: override is refused, naming the new one.
MOVED = {
    ("evaluation", "fractions"): ("evaluation", "tasks", "linear-probe", "fractions"),
    ("evaluation", "prompts"): ("evaluation", "tasks", "zero-shot", "prompts"),
}

#: Keys that name a folder or file, beside those that `key(..., file=True)` marks.
_PATHS = (
    ("run", "dir"), ("data", "root"), ("data", "tokenizer"), ("data", "cache_dir"), ("text", "name"),
    ("finetune", "run"),
)  # fmt: skip
#: Most keys that an error says may have been meant.
_MOST_MEANT = 4
#: Section -> the keys that name the network whose `options` it holds, with their defaults.
_NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "image": {"name": ImageConfig().name},
    "text": {"name": TextConfig().name, "model_type": TextConfig().model_type},
}


def section_at(values: Any, path: Sequence[str]) -> dict[str, Any] | None:
    """The mapping at a path of nested mappings; None where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def moved_keys(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(old, new) dotted names of the keys in `values` that have moved."""
    return [
        (".".join(old), ".".join(new))
        for old, new in MOVED.items()
        if old[-1] in (section_at(values, old[:-1]) or {})
    ]


def move_keys(values: dict[str, Any]) -> None:
    """Give keys that have moved their new places, in place; a value that stands there already stays."""
    for old, new in MOVED.items():
        section = section_at(values, old[:-1])
        if section is None or old[-1] not in section:
            continue
        target, value = values, section.pop(old[-1])
        for name in new[:-1]:
            inner = target.setdefault(name, {})
            if not isinstance(inner, dict):  # no section: the check of keys will say so
                break
            target = inner
        else:
            target.setdefault(new[-1], value)


def forget_options(files: Sequence[dict[str, Any]], overrides: Sequence[dict[str, Any]]) -> None:
    """Take away the `options` of networks in whose place others are named: merging never removes a key.

    A file that names a network says all of its options. Overrides leave those of the files, unless they name
    another network than the files do.

    Args:
        files: values of the user's config files, changed in place.
        overrides: values of the overrides.
    """
    for section, defaults in _NETWORKS.items():
        named, earlier = dict(defaults), list[dict[str, Any]]()
        for values in files:
            found = section_at(values, (section,)) or {}
            said = {name: found[name] for name in defaults if name in found}
            if said:
                _without_options(earlier)
            named |= said
            earlier.append(found)
        typed = [section_at(values, (section,)) or {} for values in overrides]
        if any(found.get(name, value) != value for found in typed for name, value in named.items()):
            _without_options(earlier)


def _without_options(sections: Sequence[dict[str, Any]]) -> None:
    for section in sections:
        section.pop("options", None)


def anchor_files(values: dict[str, Any], folder: Path, keys: Collection[tuple[str, ...]]) -> None:
    """Make relative paths of files and folders beside a config file absolute: a run may start anywhere.

    Args:
        values: of the config file, changed in place.
        folder: where it lies.
        keys: `file_keys` of the schema.
    """
    for *path, name in keys:
        section = section_at(values, path)
        named = section.get(name) if section is not None else None
        # `Path.exists` raises where a name is too long.
        if section is not None and named and isinstance(named, str) and os.path.exists(folder / named):  # noqa: PTH110
            section[name] = str((folder / named).resolve())


def expand_home(values: dict[str, Any], keys: Collection[tuple[str, ...]]) -> None:
    """Replace a `~` at the beginning of paths by the home directory: shells do not behind `run.dir=`.

    Args:
        values: of a source, changed in place.
        keys: `file_keys` of the schema.
    """
    for *path, name in (*_PATHS, *keys):
        section = section_at(values, path)
        named = section.get(name) if section is not None else None
        if section is not None and isinstance(named, str):
            section[name] = os.path.expanduser(named)  # noqa: PTH111 (it leaves `~nobody` as it is)


def file_keys(section: Any) -> Iterator[tuple[str, ...]]:
    """Paths of the keys of a config dataclass that `key(..., file=True)` marks: these name files."""
    for item in dataclasses.fields(section):
        if item.metadata.get("file"):
            yield (item.name,)
        for path, inner in inner_sections(item.name, getattr(section, item.name)):
            yield from ((*path, *rest) for rest in file_keys(inner))


def inner_sections(name: str, value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, dataclass) of a value that is a section, or of each section in a mapping of them."""
    if dataclasses.is_dataclass(value):
        yield (name,), value
    elif isinstance(value, dict):
        yield from (((name, at), inner) for at, inner in value.items() if dataclasses.is_dataclass(inner))


def meant(key: str, prefix: str, tree: DictConfig) -> str:
    """What an error adds about a key that a section lacks: " (did you mean ...?)", or the section's keys.

    Args:
        key: that was given. prefix: of the section's keys ("train."); "" of the whole config.
        tree: the section, in the whole config.
    """
    names = [str(name) for name in tree]
    found = [f"{prefix}{name}" for name in difflib.get_close_matches(key, names, n=1, cutoff=0.75)]
    if not found:  # its name in another section, or a word of it in this one
        words = set(key.split("_"))
        same = [path for path in _paths_of(tree._get_root()) if path.rpartition(".")[2] == key]
        alike = [f"{prefix}{name}" for name in names if words & set(name.split("_"))]
        found = same + alike if len(same + alike) <= _MOST_MEANT else same[:_MOST_MEANT]
    if not found:
        return f"; there are {', '.join(names)}"
    *most, last = map(repr, found)
    return f" (did you mean {' or '.join(filter(None, [', '.join(most), last]))}?)"


def _paths_of(section: Any, prefix: str = "") -> Iterator[str]:
    for name in map(str, section):
        yield f"{prefix}{name}"
        node = section._get_node(name)
        if isinstance(node, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(node)):
            yield from _paths_of(node, f"{prefix}{name}.")


def keep_texts(values: dict[str, Any], written: Any, tree: DictConfig) -> None:
    """Where the schema wants text, take what was written: YAML reads 0123 as 83 and `on` as true.

    Args:
        values: of a config file or an override, changed in place.
        written: the same, every value as the text that was written. What is not in it (it came by a merge
            key, `<<`) is left to OmegaConf.
        tree: the schema.
    """
    for key, value in values.items():
        node, text = tree._get_node(key), written.get(key) if isinstance(written, dict) else None
        kind = node._metadata.element_type if isinstance(node, DictConfig | ListConfig) else None
        if isinstance(node, StringNode):
            values[key] = _as_text(value, text)
        elif kind is str and isinstance(value, list) and isinstance(text, list):
            values[key] = [_as_text(*pair) for pair in zip(value, text, strict=True)]
        elif kind is str and isinstance(value, dict) and isinstance(text, dict):
            values[key] = {name: _as_text(item, text.get(name)) for name, item in value.items()}
        elif isinstance(value, dict) and isinstance(node, DictConfig) and not node._is_none():
            keep_texts(value, text, node)


def _as_text(value: Any, written: Any) -> Any:
    return written if isinstance(value, bool | int | float) and isinstance(written, str) else value


def check_keys(values: Mapping[str, Any], tree: DictConfig, source: str, prefix: str) -> None:
    """Refuse keys the schema does not have, naming the nearest valid one.

    Args:
        values: of a source. tree: the schema, or a section of it.
        source: what errors call the place the values come from. prefix: of the section's keys ("train.").

    Raises:
        ConfigError: an unknown key, a value in the place of a section, or a section in that of a value.
    """
    for key, value in values.items():
        path = f"{prefix}{key}"
        # "in tree" is false for keys that still need a value.
        if not isinstance(key, str) or key not in tree.keys():  # noqa: SIM118
            raise ConfigError(f"{source}: unknown key {path!r}{meant(str(key), prefix, tree)}")
        node = tree._get_node(key)
        if isinstance(node, ListConfig) and dataclasses.is_dataclass(node._metadata.element_type):
            _check_items(value, node._metadata.element_type, source, path)
            continue
        section = is_section(node)
        if section and isinstance(value, Mapping):
            check_keys(value, cast(DictConfig, node), source, f"{path}.")
        elif section:
            raise ConfigError(f"{source}: {path} is a section with keys of its own, not a value")
        elif isinstance(node, DictConfig) and not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {path} is a mapping: write {{name: value, ...}}, or {{}} for none")


def is_section(node: Any) -> bool:
    """Whether a node has a fixed set of keys: it is made from a dataclass, or maps names to such."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return False
    if dataclasses.is_dataclass(OmegaConf.get_type(node)):
        return True
    return bool(len(node)) and all(is_section(node._get_node(name)) for name in node)


def _check_items(values: Any, schema: Any, source: str, path: str) -> None:
    """`check_keys` for a list whose items are sections of one schema."""
    if not isinstance(values, list) or not all(isinstance(item, Mapping) for item in values):
        raise ConfigError(f"{source}: {path} is a list of sections: [{{key: value, ...}}, ...]")
    for number, item in enumerate(values):
        where = f"{path}[{number}]"
        tree = OmegaConf.structured(schema)
        check_keys(item, tree, source, f"{where}.")
        try:
            OmegaConf.merge(tree, item)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            key = f"{where}.{getattr(error, 'full_key', None) or 'a key'}"
            raise ConfigError(f"{source}: {key}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The first line of an error of OmegaConf or YAML, at most 200 characters.

    Raise what holds it `from None`: the error itself repeats values as they are, control characters too.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]

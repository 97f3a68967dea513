"""The reference of every config key, made from the schema: `configs/reference.yaml`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml

from medvlp.config import MethodConfig
from medvlp.config_files import Tasks, defaults
from medvlp.config_keys import inner_sections


def reference(schemas: Mapping[str, type[MethodConfig]], tasks: Tasks = None) -> str:
    """Every key with its default and meaning as commented YAML: the content of `configs/reference.yaml`."""
    lines = [
        "# Every key with its default. Made by `medvlp config --reference`; a check keeps it true.",
        "# The keys of each method stand at the end; use those of the method that `method.name` chooses.",
        *_reference_lines(defaults(tasks), depth=0),
        "",
    ]
    for name, schema in sorted(schemas.items()):
        lines.append(f"# method.name={name}")
        lines.append("# method:")
        own = _reference_lines(
            schema(), depth=1, skip={item.name for item in dataclasses.fields(MethodConfig)}
        )
        lines.extend(f"# {line}" for line in own)
    return "\n".join(lines).rstrip() + "\n"


def _reference_lines(section: Any, depth: int, skip: frozenset[str] | set[str] = frozenset()) -> list[str]:
    indent = "  " * depth
    hints = get_type_hints(type(section))
    lines = []
    for item in dataclasses.fields(section):
        if item.name in skip:
            continue
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            lines.append(f"{indent}{item.name}:")
            lines.extend(_reference_lines(value, depth + 1))
            continue
        sections = list(inner_sections(item.name, value))
        if sections:
            lines.append(f"{indent}{item.name}:")
            for path, inner in sections:
                own = _reference_lines(inner, depth + 2)
                lines.extend([f"{indent}  {path[-1]}:{'' if own else ' {}'}", *own])
            continue
        scalar = "???" if value == "???" else yaml.safe_dump(value, default_flow_style=True, width=1000)
        text = scalar.removesuffix("...\n").strip()
        choices = " | ".join(get_args(hints[item.name])) if get_origin(hints[item.name]) is Literal else ""
        meaning = f"[{choices}] {item.metadata['help']}" if choices else item.metadata.get("help", "")
        lines.append(f"{indent}{item.name}: {text}  # {meaning}".rstrip(" #"))
        inner = get_args(hints[item.name])
        if get_origin(hints[item.name]) is list and dataclasses.is_dataclass(inner[0]):
            lines.append(f"{indent}# Each of {item.name}:")
            lines.extend(f"{indent}#   {line}" for line in _reference_lines(cast(type, inner[0])(), depth=0))
    return lines

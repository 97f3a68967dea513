"""YAML whose values are the text that stands in the file: `Yes`, `1.0`, `01` and `null` mean themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from shards.errors import DataError


class _TextLoader(yaml.BaseLoader):
    """PyYAML's loader without types, which also refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return mapping


def load_yaml_text(path: Path) -> Any:
    """Nested dicts, lists and texts of a YAML file; what is left empty is "", an empty file None.

    Raises:
        DataError: the file cannot be read, is no YAML, or gives a key twice.
    """
    try:
        return yaml.load(path.read_bytes(), _TextLoader)  # makes nothing but text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deep") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error

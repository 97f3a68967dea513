"""YAML whose values are the text that stands in the file: `Yes`, `1.0`, `01` and `null` mean themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.strict_json import JsonError, read_limited
from shards.strict_yaml import YAML_LIMIT, YamlError, yaml_as_written


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

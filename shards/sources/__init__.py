"""Where studies come from: one file (or package) for each source, registered here by its name.

The names are imported when asked for, so that a source's own dependencies load only with it.
"""

from __future__ import annotations

import importlib
from typing import cast

from shards.sources.base import Source

#: Source name -> "module:class".
REGISTRY: dict[str, str] = {
    "phantom": "shards.sources.phantom:PhantomSource",
    "table": "shards.sources.table:TableSource",
}


def source_class(name: str) -> type[Source]:
    """The class of a registered source.

    Raises:
        KeyError: no source of that name.
    """
    module, _, attribute = REGISTRY[name].partition(":")
    return cast(type[Source], getattr(importlib.import_module(module), attribute))

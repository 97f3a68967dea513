"""Free-form options of a backbone as plain Python values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A dict without OmegaConf containers, which timm and transformers would not take for lists."""
    if OmegaConf.is_config(options):
        return OmegaConf.to_container(options, resolve=True)  # type: ignore[return-value]
    return dict(options)

"""Suggests the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(name: str, names: Collection[str]) -> str:
    """ ", did you mean 'x'?" for the most similar of `names`, or all of them where none is similar."""
    matches = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {matches[0]!r}?" if matches else f"; there are: {', '.join(names)}"

"""Reads files of one JSON object a line from their end, while somebody may be writing them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.strict_json import JsonError, parse_json

#: Bytes read at once, from the end towards the beginning.
_BLOCK = 1 << 16
#: A longer line is none of ours; it is passed over instead of being held in memory.
_LONGEST_LINE = 1 << 22


def newest_first(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a `.jsonl` file, last line first; only as much of the file is read as is asked for.

    A last line without its line feed is still being written and is passed over, as are lines that are no JSON
    object. A file that does not exist has no lines.

    Raises:
        OSError: the file is there and cannot be read.
    """
    for line in _lines_from_the_end(path):
        try:
            value = parse_json(line, _LONGEST_LINE)
        except JsonError:
            continue
        if isinstance(value, dict):
            yield value


def newest(path: Path) -> dict[str, Any] | None:
    """The last whole object of a `.jsonl` file, or None."""
    return next(newest_first(path), None)


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        # The end of a line whose beginning has not been read yet; None: no line feed has been found yet.
        rest: bytes | None = None
        while position > 0:
            size = min(_BLOCK, position)
            position -= size
            file.seek(position)
            block = file.read(size)
            if rest is None:
                end = block.rfind(b"\n")
                if end < 0:
                    continue
                block, rest = block[:end], b""
            rest, *lines = (block + rest).split(b"\n")
            yield from reversed(lines)
            if len(rest) > _LONGEST_LINE:
                return
        if rest:
            yield rest

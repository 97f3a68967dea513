"""Tells when a file in some folders is opened: Linux's inotify, which Python has no module for."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000
_HEADER = struct.Struct("iIII")


class Opens:
    """Context manager: counts how often files directly in `folders` have been opened since it was entered.

    Attributes:
        names: of the files, in the order in which they were opened.
    """

    def __init__(self, folders: Iterable[Path]):
        self._folders = list(folders)
        self.names: list[str] = []

    def __enter__(self) -> Self:
        library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for folder in self._folders:
            if library.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), f"inotify on {folder}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def wait(self, seconds: float) -> int:
        """Wait for more, but not longer than `seconds`; how many there have been."""
        if select.select([self._descriptor], [], [], seconds)[0]:
            data, position = os.read(self._descriptor, 1 << 16), 0
            while position < len(data):
                _, mask, _, length = _HEADER.unpack_from(data, position)
                position += _HEADER.size + length
                if not mask & _IN_ISDIR:
                    self.names.append(data[position - length : position].rstrip(b"\0").decode())
        return len(self.names)

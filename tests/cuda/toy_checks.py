"""Checks for the test of the runner: one that passes, one that fails, one that dies, one that hangs."""

from __future__ import annotations

import os
import time

from tests.cuda.place import Place
from tests.cuda.runner import Note


def passes(place: Place, note: Note) -> None:
    note("place", place.data)


def fails(place: Place, note: Note) -> None:
    raise AssertionError("a number is wrong")


def dies(place: Place, note: Note) -> None:
    note("before", 1)
    os.abort()


def hangs(place: Place, note: Note) -> None:
    note("before", 2)
    time.sleep(600)

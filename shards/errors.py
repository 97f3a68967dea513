"""Errors a user can do something about, and the name that was meant; shown as one line and an exit code."""

import difflib
import unicodedata
from collections.abc import Collection


class MedvlpError(Exception):
    """Base of every error that says what was wrong, where, and what to do about it.

    Its text holds no control characters, whatever name or value of a stranger it repeats.
    """

    exit_code: int = 1

    def __str__(self) -> str:
        return without_controls(super().__str__())


class UsageError(MedvlpError):
    """A value on the command line that cannot be."""

    exit_code = 2


class DataError(MedvlpError):
    """A dataset, shard, sample or source file cannot be used as it is."""

    exit_code = 3


class UnavailableError(DataError):
    """A file cannot be read now, which says nothing about what it holds: no corrupt sample."""


class NotFiniteError(MedvlpError, ValueError):
    """Numbers of a network that are NaN or infinite, of which nothing can be measured.

    Args:
        what: which numbers.
    """

    exit_code = 3

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} are NaN or infinite: if training has diverged, evaluate an earlier checkpoint"
        )


def without_controls(text: str) -> str:
    """A text without control characters but line ends and tabs; bytes of a name that are no UTF-8 are `�`."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs":
        return character
    return "�" if unicodedata.category(character) == "Cs" else ""


def nearest(name: str, names: Collection[str]) -> str:
    """ ", did you mean 'x'?" for the most similar of `names`, or all of them where none is similar."""
    matches = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {matches[0]!r}?" if matches else f"; there are: {', '.join(names)}"

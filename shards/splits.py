"""Which split a patient belongs to: a keyed hash of the patient, so rows, order and workers do not matter."""

import hashlib
import re
from collections.abc import Mapping

from shards.errors import UsageError

#: Splits that every part of the program knows; a source may have others.
SPLITS = ("train", "valid", "test")
DEFAULT_FRACTIONS = "train=0.8,valid=0.1,test=0.1"

_ALIASES = {
    "dev": "valid",
    "testing": "test",
    "training": "train",
    "val": "valid",
    "validate": "valid",
    "validation": "valid",
}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")


def parse_fractions(text: str) -> dict[str, float]:
    """`train=0.8,valid=0.1,test=0.1` -> shares by split name.

    Raises:
        UsageError: not of that form, or the shares do not add up to 1.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            fractions[normalise_split(name)] = float(share)
        except ValueError as error:
            raise UsageError(f"--split {text!r}: write it as {DEFAULT_FRACTIONS}") from error
    if any(not 0 <= share <= 1 for share in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-9:
        raise UsageError(f"--split {text!r}: the shares must lie in [0, 1] and add up to 1")
    return fractions


def normalise_split(name: str) -> str:
    """Lower-case name of a split; "val", "validate" and the like become "valid".

    Raises:
        ValueError: the name cannot be part of a file name.
    """
    name = name.strip().lower()
    if not _NAME.fullmatch(name):
        raise ValueError("a split's name is a word of letters, digits and underscores")
    return _ALIASES.get(name, name)


def split_of(patient: str, fractions: Mapping[str, float], seed: str) -> str:
    """Split of a patient: BLAKE2b keyed by `seed`, read as a number in [0, 1), against the summed shares."""
    digest = hashlib.blake2b(
        patient.encode(errors="surrogateescape"), key=seed.encode(), digest_size=8
    ).digest()
    position = int.from_bytes(digest, "big") / 2**64
    end = 0.0
    for name, share in fractions.items():
        end += share
        if position < end:
            return name
    return next(name for name in reversed(list(fractions)) if fractions[name] > 0)

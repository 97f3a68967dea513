"""Questions of a sample and their answers, as tasks learn and compare them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import xxhash

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
#: Published code passes a flag where the count of replacements belongs, so that later periods stay.
_PERIODS = 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split(" "))} | {"none": "0"}
_NOT = "are ca could did does do had has have is might must need ought should was were wo would"
_IS = "that there what where who how here"
#: Words that have lost their apostrophe; those that are words of their own without it ("its", "well") stay.
_CONTRACTIONS = {f"{stem}nt": f"{stem}n't" for stem in _NOT.split(" ")} | {
    f"{stem}s": f"{stem}'s" for stem in _IS.split(" ")
}


def asked(metadata: Mapping[str, Any]) -> list[dict[str, str]]:
    """The questions of a sample that are read: the English ones, in stored order.

    Tokenizers and the rules of `normalised` are of English; SLAKE asks everything in Chinese as well.
    """
    return [question for question in metadata["questions"] if question["language"] == "en"]


def normalised(answer: str) -> str:
    """An answer as answers are compared (the rules of VQA, as M3AE uses them).

    Lower case; a punctuation mark is taken away where it stands beside a space anywhere in the answer (all of
    them if a number has a comma), and becomes a space otherwise; periods that no digit follows are dropped
    (the first 32); number words become digits and "none" 0; articles are dropped; lost apostrophes put back.
    """
    text = answer.lower().replace("\n", " ").replace("\t", " ").strip()
    joined = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or joined else " ")
    words = [_DIGITS.get(word, word) for word in _LONE_PERIOD.sub("", result, count=_PERIODS).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def text_code(text: str) -> int:
    """A text as a number that a tensor can hold: 63 bits of its hash, never 0."""
    return (xxhash.xxh3_64_intdigest(text.encode()) >> 1) or 1

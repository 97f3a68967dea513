"""MGCA's cleaning of report text. Source: the method's published preprocessing; checked on golden values."""

from __future__ import annotations

import re

_LIST_NUMBER = re.compile(r"[0-9]+\.")
_WORD = re.compile(r"\w+")
_MIN_SENTENCE_WORDS = 2
_MIN_REPORT_WORDS = 3


def mgca_sentences(impression: str, findings: str) -> list[str] | None:
    """Cleaned sentences of a report, impression first; None where fewer than three words remain.

    Lower case, only word characters, no non-ASCII characters, one-word sentences dropped. As published,
    numbers before a period are taken for list numbers, so "2.5 cm" becomes "5 cm".
    """
    # A missing section counts as one space, which changes nothing after the split.
    report = f"{impression} {findings}".replace("\n", " ")
    pieces = [piece for item in _LIST_NUMBER.split(report) for piece in item.split(".")]
    sentences = [words for piece in pieces if (words := _clean_words(piece))]
    if sum(len(words) for words in sentences) < _MIN_REPORT_WORDS:
        return None
    return [" ".join(words) for words in sentences]


def _clean_words(piece: str) -> list[str]:
    words = _WORD.findall(piece.replace("\ufffd\ufffd", " ").lower())
    # Counted before the ASCII filter, as published: a word that the filter empties still counts here.
    if len(words) < _MIN_SENTENCE_WORDS:
        return []
    ascii_words = [word.encode("ascii", "ignore").decode() for word in words]
    return [word for word in ascii_words if word]

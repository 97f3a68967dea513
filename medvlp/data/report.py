"""Which sentences of a report training sees: its sections as they are, or after MGCA's published cleaning."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from medvlp.config_files import ConfigError
from shards.text.sentences import split_sentences

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


def report_sentences(
    sections: Mapping[str, str], names: Sequence[str], cleaning: Literal["none", "mgca"]
) -> list[str]:
    """The sentences of the chosen sections; an empty list says that the report has no text to train on.

    Args:
        sections: section name -> text, from a sample's metadata.
        names: sections to use, in this order (`data.sections`); missing ones are passed over.
        cleaning: "none" splits the sections into sentences as they are; "mgca" is MGCA's preprocessing, which
            reads the impression before the findings whatever the order of `names` and drops reports of fewer
            than three tokens.

    Raises:
        ConfigError: a section MGCA's cleaning does not know.
    """
    if cleaning == "none":
        return [sentence for name in names for sentence in split_sentences(sections.get(name, ""))]
    if unknown := set(names) - {"findings", "impression"}:
        raise ConfigError(
            f"data.cleaning=mgca reads findings and impression only, not {', '.join(sorted(unknown))}"
        )
    chosen = {name: sections.get(name, "") for name in names}
    return mgca_sentences(chosen.get("impression", ""), chosen.get("findings", "")) or []

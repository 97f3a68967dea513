"""Which sentences of a report training sees, and its words as generated reports are scored by."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from medvlp.config import DataConfig
from medvlp.config_files import ConfigError
from shards.text.sentences import split_sentences

_LIST_NUMBER = re.compile(r"[0-9]+\.")
_WORD = re.compile(r"\w+")
_MIN_SENTENCE_WORDS = 2
_MIN_REPORT_WORDS = 3
_SCORED_WORD = re.compile(r"[^\W_]+|\.")
_BLANKS, _PERIODS = re.compile(r"[_\s]+"), re.compile(r"\.{2,}")
_NEXT_NUMBER = re.compile(r"\.? [2-5]\. ")
# As published: the range from ":" to "[" takes "<", "=", ">" and "@" with it.
_R2GEN_DROPPED = re.compile(r"""["'/\\.,?;*!%^&_+():-\[\]{}]""")


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


def report_text(metadata: Mapping[str, Any], config: DataConfig) -> str:
    """The text of a sample's report that `config` chooses; "" where there is none."""
    return " ".join(report_sentences(metadata["sections"], config.sections, config.cleaning))


def scored_words(text: str) -> list[str]:
    """The words of a report as generated ones are scored by: runs of letters and digits, and periods.

    Lower case; periods in a row count once, a report never begins with one. It does not matter whether marks
    stand apart ("plate - like", "2 . 5 cm"), as they do in what a WordPiece vocabulary gives back.
    """
    words: list[str] = []
    for word in _SCORED_WORD.findall(text.lower()):
        if word != "." or (words and words[-1] != "."):
            words.append(word)
    return words


def r2gen_words(text: str) -> list[str]:
    """The words of a report by R2Gen's published cleaning: "2.5 cm" becomes "25 cm", "left/right"
    "leftright".

    Sentences are what ". " parts, without the numbers 1 to 5 of a list (also at the end of "level 1. The");
    each ends with " .", so that an empty report is one period.
    """
    text = _PERIODS.sub(".", _BLANKS.sub(" ", text)).replace("1. ", "")
    text = _NEXT_NUMBER.sub(". ", text).strip().lower()
    sentences = [_R2GEN_DROPPED.sub("", sentence).strip() for sentence in text.split(". ")]
    return f"{' . '.join(sentences)} .".split()

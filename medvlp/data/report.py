"""Which sentences of a report training sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from medvlp.config_files import ConfigError
from shards.text.cleaning import mgca_sentences
from shards.text.sentences import split_sentences


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

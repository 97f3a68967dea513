"""Entities from the output of a RadGraph model, by the published parse rules of MeDSLIP (first AGXNet's).

The file is JSON as RadGraph's inference publishes it: report id -> {"text", "entities": {id: {"tokens",
"label", "start_ix", "end_ix", "relations": [[type, target id], ...]}}}.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shards.entities.vocabulary import UNSPECIFIED
from shards.errors import DataError
from shards.strict_json import JsonError, stream_object
from shards.study import Entity
from shards.tables.files import TableFile, open_text

#: Largest report with its graph, in characters.
_LIMIT = 1 << 24
_ANATOMY = "ANAT-DP"
_VALUES = {"OBS-DP": 1, "OBS-DA": 0, "OBS-U": -1}
#: Labels as later releases of RadGraph spell them.
_SPELLINGS = {
    "anatomy::definitely present": _ANATOMY,
    "observation::definitely present": "OBS-DP",
    "observation::definitely absent": "OBS-DA",
    "observation::uncertain": "OBS-U",
}
_LOCATED_AT = "located_at"
_SENTENCE_ENDS = frozenset((".", "!", "?"))


@dataclass(frozen=True)
class _Node:
    """An entity of RadGraph: its words in lower case, its label, its sentence, and (relation, target id)."""

    words: str
    label: str
    sentence: int
    relations: tuple[tuple[str, str], ...]


def read_radgraph(path: Path) -> dict[str, list[Entity]]:
    """Entities of all reports of a file, by study id.

    An id that is a path ("p10/p10000032/s50414267.txt") is also found by its last part, with and without the
    "s" before the number, unless that would mean reports of different content. A name that ends in ".gz" is
    decompressed.

    Raises:
        DataError: the file cannot be read, names a report twice, or does not have the form described above.
    """
    found: dict[str, list[Entity]] = {}
    short: dict[str, list[Entity] | None] = {}
    for identifier, entities in stream_radgraph(path):
        if identifier in found:
            raise DataError(f"{path}: a report is there twice")
        found[identifier] = entities
        for name in _short_names(identifier):
            short[name] = entities if short.get(name, entities) == entities else None
    return {name: entities for name, entities in short.items() if entities is not None} | found


def stream_radgraph(path: TableFile) -> Iterator[tuple[str, list[Entity]]]:
    """Id and entities of each report of a file, in its order, one report in memory at a time.

    Raises:
        DataError: the file cannot be read or does not have the form described above.
    """
    number = 0
    try:
        with open_text(path, "utf-8") as file:
            for identifier, report in stream_object(file, _LIMIT):
                number += 1
                yield identifier, report_entities(report)
    except JsonError as error:
        raise DataError(f"{path} is not a JSON object of reports by id ({error})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else "a field has another type"
        raise DataError(f"{path}, report {number}: not the output of RadGraph ({reason})") from None


def report_entities(report: Mapping[str, Any]) -> list[Entity]:
    """Entities of one report: anatomies as RadGraph strings ("lobe|left|lower"), without repetitions.

    By sentence: an anatomy that points to nothing is one anatomy with all that point to it. An observation
    located at any of these belongs to it; one without a relation belongs to "unspecified"; one that only
    modifies or suggests another entity belongs nowhere.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the report does not have RadGraph's form.
    """
    nodes = {str(identifier): node for identifier, node in _nodes(report)}
    sentences: dict[int, list[str]] = defaultdict(list)
    for identifier, node in nodes.items():
        sentences[node.sentence].append(identifier)
    entities = [entity for members in sentences.values() for entity in _sentence_entities(nodes, members)]
    return list(dict.fromkeys(entities))


def _sentence_entities(nodes: Mapping[str, _Node], members: list[str]) -> Iterator[Entity]:
    anatomies = [identifier for identifier in members if nodes[identifier].label == _ANATOMY]
    observations = [nodes[identifier] for identifier in members if nodes[identifier].label in _VALUES]
    for head in anatomies:
        if nodes[head].relations:
            continue
        parts = [head, *(part for part in anatomies if any(t == head for _, t in nodes[part].relations))]
        anatomy = "|".join(nodes[part].words for part in parts)
        for observation in observations:
            if any(kind == _LOCATED_AT and target in parts for kind, target in observation.relations):
                yield Entity(anatomy, observation.words, _VALUES[observation.label])
    for observation in observations:
        if not observation.relations:
            yield Entity(UNSPECIFIED, observation.words, _VALUES[observation.label])


def _nodes(report: Mapping[str, Any]) -> Iterator[tuple[str, _Node]]:
    """Entities of a report in the order of its text, each with the sentence its first token is in."""
    # The indices count the tokens of RadGraph's text, which one space separates.
    numbers, number = [], 0
    for token in report["text"].split():
        numbers.append(number)
        number += token in _SENTENCE_ENDS
    rows = sorted(report["entities"].items(), key=lambda item: int(item[1]["start_ix"]))
    for identifier, row in rows:
        start = int(row["start_ix"])
        if not 0 <= start < len(numbers):
            raise ValueError("an index lies outside the text")
        label = str(row["label"])
        yield (
            identifier,
            _Node(
                words=" ".join(row["tokens"].lower().split()),
                label=_SPELLINGS.get(label.lower(), label),
                sentence=numbers[start],
                relations=tuple((str(kind), str(target)) for kind, target in row["relations"]),
            ),
        )


def _short_names(identifier: str) -> set[str]:
    last = PurePosixPath(identifier).stem if "/" in identifier or identifier.endswith(".txt") else identifier
    bare = last[1:] if last.startswith("s") and last[1:].isdecimal() else last
    return {last, bare}

"""Entities of a report by rules, for reports that no information-extraction model has read.

Sentence by sentence: find the observations and anatomies of the lexicon, decide what is present, absent or
uncertain (`negation`), and give every observation its anatomies: those next to it, those after a preposition,
the subject of the sentence, or the site the observation implies.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from shards.entities.answers import statements
from shards.entities.landmarks import landmark
from shards.entities.lexicon import GENERAL_DEVICE_SITE, SIZED_SIDES, TERM_PATTERN, TERMS, Term
from shards.entities.negation import ABSENT, PRESENT, assertions
from shards.entities.places import Place, find_places, with_sides
from shards.entities.sides import apart
from shards.entities.vocabulary import OTHER, UNSPECIFIED
from shards.errors import DataError
from shards.study import Entity

#: Raise when rules or lexicon change: annotated datasets record it.
VERSION = 5

#: Sections that say what this study shows.
SECTIONS = ("findings", "impression", "addendum", "preliminary")

# Words that end a noun phrase: what stands beyond them does not modify the noun.
_STOP = (
    r"(?:is|are|was|were|be|been|has|have|had|with|without|in|of|at|on|to|for|from|and|or|nor|but|the|no|not|"
    r"there|which|that|may|might|could|over|overlying|seen|noted|show|shows|demonstrates?|within|versus)"
)
# Possessive: without it, one long phrase takes exponential time.
_MODIFIERS = re.compile(rf"(?:[\s/-]++|(?!{_STOP}\b)[a-z0-9]++)*+")
_CONJUNCTION = re.compile(r"[\s,/]*(?:and|or|nor|as well as)?(?: the| of| of the)?\s*")
_WITHIN_PHRASE = r"(?:(?!\b(?:and|or|with|without|no|which)\b)[^,;:.])*"
_LOCATIVE = re.compile(
    rf"{_WITHIN_PHRASE}\b(?:in|of|at|within|over|overlying|along|near|throughout|involving|about|across|"
    r"beneath|under|adjacent to|on|to|above|below|projecting|superimposed)\b"
    rf"{_WITHIN_PHRASE}"
)
_BOUNDARY = re.compile(r"[;:]|\b(?:but|however|although|while|whereas)\b")
_SIDE_AFTER = re.compile(
    r"[^,;:.]{0,40}?(?:\b(?:on|in|to) the "
    r"((?:left|right)(?: (?:and|or) (?:the )?(?:left|right)(?=[,;:.]|$))?)\b"
    r"(?! \w*(?:lung|lobe|side of))|\b(bilaterally))"
)


_BOTH_SIDES = re.compile(rf"\b{SIZED_SIDES}")


@dataclass(frozen=True)
class StatedWords:
    """Characters `start` to `end` of a text, which state observations: 1 present, 0 absent, -1 uncertain."""

    start: int
    end: int
    observations: tuple[str, ...]
    value: int


@dataclass(frozen=True)
class _Mention:
    """One term in a sentence with what the sentence asserts about it."""

    start: int
    end: int
    term: Term
    value: int | None


def check_language(source: Mapping[str, Any]) -> None:
    """Refuse reports that the rules cannot read.

    Args:
        source: arguments of a dataset's source, as the index records them.

    Raises:
        DataError: the source, or its map, names another language than English.
    """
    language = source.get("language") or (source.get("map") or {}).get("language", "en")
    if language != "en":
        raise DataError(
            f"the rules read English reports, and these are in another (language: {language}); "
            "use RadGraph's output (shards annotate --radgraph) or leave the entities out"
        )


def extract(sections: Mapping[str, str]) -> list[Entity]:
    """Entities of a report, in the order of its sentences, without repetitions.

    Args:
        sections: section name -> text. Only `SECTIONS` are read: indication, history and comparison speak of
            other times and of what is only suspected.
    """
    sentences = [sentence for name in SECTIONS if name in sections for sentence in statements(sections[name])]
    return list(dict.fromkeys(entity for sentence in sentences for entity in extract_sentence(sentence)))


def stated_words(text: str) -> tuple[str, list[StatedWords]]:
    """A text in lower case with one space between words, and where in it observations are stated.

    Sentences that `statements` puts together anew (rows of tables, answers apart from their question) have
    entities and no place, and so have those of which one word states a value for each side (`apart`).
    """
    shown, found, begin = _plain(text), list[StatedWords](), 0
    for statement in statements(text):
        sentence = _plain(statement)
        place = shown.find(sentence, begin)
        if place < 0:
            continue
        begin = place + len(sentence)
        if apart(sentence) != sentence:
            continue
        found += [
            StatedWords(place + mention.start, place + mention.end, tuple(mention.term.observations), value)
            for mention, value, _ in _stating(sentence, _mentions(sentence))
        ]
    return shown, found


# Reports share many sentences.
@lru_cache(maxsize=65536)
def extract_sentence(sentence: str) -> tuple[Entity, ...]:
    """Entities of one sentence; values are 1 (present), 0 (absent) and -1 (uncertain)."""
    sentence = apart(_plain(sentence))
    mentions = _mentions(sentence)
    # An anatomy inside a term is part of it; but a term without observations may be an anatomy.
    places = [
        place
        for place in find_places(sentence)
        if not any(m.start < place.end and place.start < m.end for m in mentions if m.term.observations)
    ]
    linker = _Linker(sentence, mentions, places)
    entities: list[Entity] = []
    for mention, value, number in _stating(sentence, mentions):
        for anatomy in linker.anatomies(number):
            entities += [Entity(anatomy, name, value) for name in mention.term.observations]
    return (*entities, *_implied(entities))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _mentions(sentence: str) -> list[_Mention]:
    matches = list(TERM_PATTERN.finditer(sentence))
    terms = [TERMS[int((match.lastgroup or "t0")[1:])] for match in matches]
    nouns = [term.kind == "finding" for term in terms]
    values = assertions(sentence, [match.span() for match in matches], nouns)
    return [
        _Mention(match.start(), match.end(), term, value)
        for match, term, value in zip(matches, terms, values, strict=True)
    ]


def _stating(sentence: str, mentions: Sequence[_Mention]) -> Iterator[tuple[_Mention, int, int]]:
    """(mention, value, number) of those that state something."""
    for number, mention in enumerate(mentions):
        if mention.value is None or (mention.term.kind == "vague" and mention.value != ABSENT):
            continue
        if not _is_modifier(mention, number, mentions, sentence):
            yield mention, mention.value, number


def _is_modifier(mention: _Mention, number: int, mentions: Sequence[_Mention], sentence: str) -> bool:
    """Whether "stable" or "normal" only colours a finding ("stable cardiomegaly") and is none itself."""
    if mention.term.kind != "quality" or not {"stable", "normal"} & set(mention.term.observations):
        return False
    following = mentions[number + 1] if number + 1 < len(mentions) else None
    return (
        following is not None
        and following.term.kind == "finding"
        and _MODIFIERS.fullmatch(sentence, mention.end, following.start) is not None
    )


def _implied(entities: Iterable[Entity]) -> Iterable[Entity]:
    """What a statement says of a second observation: a heart of normal size is no cardiomegaly."""
    for entity in entities:
        place = landmark(entity.anatomy)
        if place == "heart_size" and entity.observation == "enlarge":
            yield Entity(entity.anatomy, "cardiomegaly", entity.value)
        elif place == "heart_size" and entity.observation == "normal" and entity.value == PRESENT:
            yield Entity(entity.anatomy, "cardiomegaly", ABSENT)
        elif entity.anatomy in ("bone", "rib") and (entity.observation, entity.value) in (
            ("intact", PRESENT),
            ("abnormality", ABSENT),
        ):
            yield Entity(entity.anatomy, "fracture", ABSENT)


class _Linker:
    """Finds the anatomies of each mention of one sentence."""

    def __init__(self, sentence: str, mentions: Sequence[_Mention], places: Sequence[Place]) -> None:
        self.sentence = sentence
        self.mentions = mentions
        self.places = places

    def anatomies(self, number: int) -> tuple[str, ...]:
        """Names of the anatomies of mention `number`; "unspecified" where nothing says it."""
        mention = self.mentions[number]
        if mention.term.kind == "finding":
            found = self._attached(number)
            if not found and not mention.term.site:
                found = self._subject(mention)
            return found or self._device_site(mention) or self._implied_site(mention)
        following = self._quality_noun(number)
        found = self._following(mention) or self._attached(number)
        if not found and following is not None:
            return self.anatomies(following)
        return found or self._subject(mention) or self._implied_site(mention)

    def _attached(self, number: int) -> tuple[str, ...]:
        """Anatomies right before the mention ("left basilar atelectasis") and after its preposition."""
        mention = self.mentions[number]
        # "Pleural effusion on the left": the side stands behind.
        sides = self._sides_after(mention)
        before = [sided for name in self._before(mention) for sided in with_sides(name, sides)]
        after = self._after(number)
        if before:  # "pleural thickening at the chest wall": the second says no more
            after = tuple(name for name in after if landmark(name) != OTHER)
        return tuple(dict.fromkeys((*before, *after)))

    def _before(self, mention: _Mention) -> tuple[str, ...]:
        names: tuple[str, ...] = ()
        start, gap = mention.start, _MODIFIERS
        for place in reversed([place for place in self.places if place.end <= mention.start]):
            if not gap.fullmatch(self.sentence, place.end, start):
                break
            names = (*place.names, *names)
            start, gap = place.start, _CONJUNCTION
        return names

    def _after(self, number: int) -> tuple[str, ...]:
        """Anatomies behind a preposition; findings joined by "and" share them."""
        end = self.mentions[number].end
        for later in self.mentions[number + 1 :]:
            joined = _CONJUNCTION.fullmatch(self.sentence, end, later.start) or _MODIFIERS.fullmatch(
                self.sentence, end, later.start
            )
            if not joined or later.term.kind != "finding":
                break
            end = later.end
        following = [mention.start for mention in self.mentions if mention.start >= end]
        limit = following[0] if following else len(self.sentence)
        places = [place for place in self.places if end <= place.start < limit]
        if not places or not _LOCATIVE.fullmatch(self.sentence, end, places[0].start):
            return ()
        return self._joined(places)

    def _following(self, mention: _Mention) -> tuple[str, ...]:
        """The anatomies a quality stands directly before: "normal heart size and mediastinal contours"."""
        places = [place for place in self.places if place.start >= mention.end]
        if not places or not _MODIFIERS.fullmatch(self.sentence, mention.end, places[0].start):
            return ()
        return self._joined(places)

    def _joined(self, places: Sequence[Place]) -> tuple[str, ...]:
        names = list(places[0].names)
        for place, later in pairwise(places):
            if not _CONJUNCTION.fullmatch(self.sentence, place.end, later.start):
                break
            names += later.names
        return tuple(names)

    def _subject(self, mention: _Mention) -> tuple[str, ...]:
        """The anatomies before the mention in its clause, with those joined to the last of them."""
        start = max((m.end() for m in _BOUNDARY.finditer(self.sentence, 0, mention.start)), default=0)
        before = [place for place in self.places if start <= place.start and place.end <= mention.start]
        names: tuple[str, ...] = ()
        for place, later in zip(before[::-1], [None, *before[::-1]], strict=False):
            if later is not None and not _CONJUNCTION.fullmatch(self.sentence, place.end, later.start):
                break
            names = (*place.names, *names)
        return names

    def _device_site(self, mention: _Mention) -> tuple[str, ...]:
        """Of a device in general words, the place of the one it is: "left chest tube as medical device"."""
        if mention.term.site != GENERAL_DEVICE_SITE:
            return ()
        named = [other for other in self.mentions if other.term.is_device]
        return self._implied_site(named[0]) if named else ()

    def _quality_noun(self, number: int) -> int | None:
        """The finding that a quality stands directly before ("calcified granuloma")."""
        if number + 1 == len(self.mentions) or self.mentions[number + 1].term.kind != "finding":
            return None
        gap = (self.mentions[number].end, self.mentions[number + 1].start)
        return number + 1 if _MODIFIERS.fullmatch(self.sentence, *gap) else None

    def _implied_site(self, mention: _Mention) -> tuple[str, ...]:
        """The site the term implies, on the sides that its noun phrase names."""
        if not mention.term.site or self._is_of_hardware(mention):
            return (UNSPECIFIED,)
        before = self.sentence[: mention.start]
        phrase = re.split(rf"[^a-z0-9\s/-]|\b{_STOP}\b", before)[-1]
        for pair in _BOTH_SIDES.finditer(before):
            if pair.end() >= len(before) - len(phrase):
                phrase = before[pair.start() :]
        names = with_sides(mention.term.site, f"{phrase} {self._sides_after(mention)}")
        if mention.term.both_sides and mention.value != ABSENT and names == (mention.term.site,):
            return with_sides(mention.term.site, "bilateral")
        return names

    def _is_of_hardware(self, mention: _Mention) -> bool:
        """Whether "intact" may be said of wires or leads, and so implies no bones."""
        return "intact" in mention.term.observations and (
            any(other.term.is_device or other.term.site == GENERAL_DEVICE_SITE for other in self.mentions)
            or "sternotomy" in self.sentence
        )

    def _sides_after(self, mention: _Mention) -> str:
        """The sides that are named behind a mention: "on the left", "bilaterally"; "" where none is."""
        after = _SIDE_AFTER.match(self.sentence, mention.end)
        return after[1] or after[2] if after else ""

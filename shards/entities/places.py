"""Anatomies in a sentence: "right upper and left lower lobes" is two of them, each with its side and zone."""

import re
from dataclasses import dataclass

from shards.entities.landmarks import landmark
from shards.entities.lexicon import ANATOMY_NAMES, ANATOMY_PATTERN, CANONICAL

#: Anatomies that exist once on each side.
_PAIRED = frozenset(
    ("hilum", "costophrenic angle", "hemidiaphragm", "rib", "clavicle", "pleural space", "pleura", "lung")
) | {"lung base", "lung apex", "hemithorax", "shoulder"}
_ZONE_WORD = re.compile(r"upper|mid|middle|lower|apical|basal|basilar|lobes?|bases?|apex|apices")
_SIDE_WORD = re.compile(r"left|right|bilateral(?:ly)?|both|\b[lr]t\b")
_LETTERS = {"l": "left", "r": "right"}
_LOBES = {"u": "upper", "m": "middle", "l": "lower"}
#: Landmarks whose one name stands for both sides.
_BOTH = frozenset(("lung_bases", "lung_apices"))


@dataclass(frozen=True)
class Place:
    """A mention of anatomies: where it stands in the sentence, and their names in plain words."""

    start: int
    end: int
    names: tuple[str, ...]


def find_places(sentence: str) -> list[Place]:
    """All anatomies of a sentence in lower case, in order."""
    places = []
    for match in ANATOMY_PATTERN.finditer(sentence):
        name = ANATOMY_NAMES[int((match.lastgroup or "a0")[1:])]
        places.append(Place(match.start(), match.end(), _names(name, match[0])))
    return places


def with_sides(site: str, text: str) -> tuple[str, ...]:
    """A paired anatomy with the sides that a text names: both for "bilateral", none where it names none."""
    if site not in _PAIRED:
        return (site,)
    sides = _sides(text)
    if not sides:
        return (site,)
    if len(sides) == 2 and landmark(f"bilateral {site}s") in _BOTH:
        return (f"bilateral {site}s",)
    return tuple(f"{side} {site}" for side in sides)


def _sides(text: str) -> list[str]:
    letters = {word[0] for word in _SIDE_WORD.findall(text)}
    return ["right", "left"] if "b" in letters else [_LETTERS[letter] for letter in "rl" if letter in letters]


def _names(name: str, text: str) -> tuple[str, ...]:
    if name == "zonal":
        return _zonal(text)
    if name == "lobe":  # "rll"
        return (f"{_LETTERS[text[0]]} {_LOBES[text[1]]} lobe",)
    name = CANONICAL.get(name, name)
    if name in ("lung base", "lung apex") and not _sides(text):
        return ("lung bases" if name == "lung base" else "lung apices",)
    return with_sides(name, text)


def _zonal(text: str) -> tuple[str, ...]:
    """ "right upper and left lower lobes" -> one name for each zone; a zone without a side takes the last."""
    noun = "lobe" if "lobe" in text else "lung zone"
    names: list[str] = []
    sides = [""]
    fresh = True  # the sides named so far have no zone yet
    for word in re.findall(r"[a-z]+", text):
        if _SIDE_WORD.fullmatch(word):
            found = _sides(word)
            sides = sides + found if fresh and sides != [""] else found
            fresh = True
        elif _ZONE_WORD.fullmatch(word) and not word.startswith("lobe"):
            zone = "lower" if word.startswith("bas") else word
            names += _zone_names(sides, zone, noun)
            fresh = False
    return tuple(dict.fromkeys(names))


def _zone_names(sides: list[str], zone: str, noun: str) -> list[str]:
    if zone in ("apex", "apices", "apical"):
        return [f"{side} lung apex" for side in sides] if len(sides) == 1 and sides[0] else ["lung apices"]
    if len(sides) == 2 and zone == "lower":
        return ["bilateral lower lobe" if noun == "lobe" else "bilateral lung bases"]
    if sides == [""] and zone == "middle" and noun == "lobe":
        return ["right middle lobe"]  # there is no other
    return [f"{side} {zone} {noun}".strip() for side in sides]

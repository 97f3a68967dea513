"""What an observation is called: lemmas, their published merges, and the 75 classes.

Source: MeDSLIP's published lists. There the lemmas come from a spaCy model; here a few rules find the ending
that leads to a known word, which needs no model and cannot change with one. Words no class holds are the same
bucket whatever their lemma. An importer that knows the lemma passes it instead of the word.
"""

from collections.abc import Iterator
from functools import lru_cache

from shards.entities.vocabulary import EXCLUDED, OBSERVATIONS, TAIL

#: Lemma -> the lemma it is merged with, as published.
MERGES: dict[str, str] = {
    merged: lemma
    for lemma, names in {
        "enlarge": "enlargement, increase",
        "engorgement": "engorge",
        "opacity": "opacification, opacity-",
        "calcification": "calcify",
        "effusion": "effusion ;",
        "atelectasis": "atelectatic, atelectasis ;, atelectase",
        "aerate": "aeration",
        "distention": "distend, distension",
        "widen": "wide",
        "prominence": "prominent",
        "haze": "haziness",
        "mass": "masse",
        "kyphosis": "kyphotic",
        "degenerative": "degenerate",
        "obscure": "obscuration",
        "fibrosis": "fibrotic",
        "nodule": "nodular, nodularity",
        "ventilation": "ventilate",
        "tortuous": "tortuosity",
        "elongation": "elongate",
        "elevation": "elevate",
        "drainage": "drain",
        "deviation": "deviate",
        "consolidation": "consolidative, consolidate",
        "dilation": "dilate, dilatation",
        "pneumothorax": "hydropneumothorax, pneumothoraces, pneumothorace",
        "improve": "improvement, improved",
        "pacemaker": "pacer",
        "pneumonia": "infection, infectious, infectious process",
    }.items()
    for merged in names.split(", ")
}
#: Words the published list leaves in the tail although a class names the same thing (ours).
ADDED_MERGES: dict[str, str] = {
    "hyperinflation": "hyperinflate",
    "hyperexpand": "hyperinflate",
    "hyperexpansion": "hyperinflate",
    "opacify": "opacity",
    "infiltration": "infiltrate",
    "emphysematous": "emphysema",
    "expansion": "expand",
    "displacement": "shift",
    "oedema": "edema",
    "pacemaker/icd": "pacemaker",
}
#: Lemmas that are no finding.
EXCLUDED_LEMMAS = frozenset((
    "none", "unchanged", "change", "great", "similar", "large", "small", "moderate", "mild",
    "median", "decrease", "bad", "more", "constant", "worsen", "new", "improve", "status",
    "position", "sternotomy", "cabg", "replacement", "postoperative", "assessment", "patient",
))  # fmt: skip
_IRREGULAR = {"worse": "bad", "worst": "bad"}
_KNOWN = frozenset(OBSERVATIONS) | MERGES.keys() | ADDED_MERGES.keys() | EXCLUDED_LEMMAS
# Ending -> what may stand in its place, the most specific first.
_ENDINGS = (
    ("ies", ("y",)),
    ("ied", ("y",)),
    ("es", ("", "e", "is")),
    ("s", ("",)),
    ("ing", ("", "e")),
    ("ed", ("", "e")),
    ("er", ("", "e")),
    ("ly", ("",)),
)  # fmt: skip


@lru_cache(maxsize=65536)
def observation_class(observation: str) -> str:
    """Class of an observation: a word, a lemma or a phrase ("pleural effusion" is that of its last word).

    Everything that is neither one of the 73 named classes nor an excluded lemma is "tail_abnorm_obs".
    """
    phrase = " ".join(observation.lower().split())
    for name in dict.fromkeys((phrase, phrase.rpartition(" ")[2])):
        lemma = _lemma(name)
        if lemma in EXCLUDED_LEMMAS:
            return EXCLUDED
        if lemma in OBSERVATIONS:
            return lemma
    return TAIL


def _lemma(word: str) -> str:
    """The known lemma a word is a form of, merges applied; the word itself where none is known."""
    known = next((candidate for candidate in _candidates(word) if candidate in _KNOWN), word)
    known = MERGES.get(known, known)
    return ADDED_MERGES.get(known, known)


def _candidates(word: str) -> Iterator[str]:
    yield _IRREGULAR.get(word, word)
    for ending, replacements in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 3:
            continue
        yield from (stem + replacement for replacement in replacements)
        if stem[-1] == stem[-2]:  # "scarring"
            yield stem[:-1]


#: Observation -> column of the matrix.
OBSERVATION_COLUMN: dict[str, int] = {name: column for column, name in enumerate(OBSERVATIONS)}

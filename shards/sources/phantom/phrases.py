"""Words of the report grammar: noun phrases of findings and the sentence forms around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shards.sources.phantom.drawing import bone_name, fractured_bones
from shards.sources.phantom.findings import SPECS, Finding

_SEVERITY = {
    "size": (("small", "tiny"), ("moderate", "medium"), ("large", "sizeable")),
    "degree": (("mild", "minimal"), ("moderate",), ("severe", "marked")),
}
_ZONE_WORDS = {
    "upper": ("upper lung zone", "upper lobe", "upper lung"),
    "mid": ("mid lung zone", "mid lung"),
    "lower": ("lower lung zone", "lower lobe", "lung base"),
}
_DEVICE_SITES = {
    "central venous catheter": "superior vena cava",
    "pacemaker": "right ventricle",
    "endotracheal tube": "trachea",
    "chest tube": "pleural space",
}
_CANONICAL = 0.65  # share of mentions in the findings section that use the canonical name

PRESENT = (
    "there is {a}.",
    "{a} is seen.",
    "{a} is present.",
    "{a} is noted.",
    "the radiograph shows {a}.",
    "{bare}.",
)
PRESENT_MANY = ("there are {a}.", "{a} are seen.", "{a} are present.", "{a} are noted.", "{bare}.")
HEDGED = (
    "possible {bare}.",
    "questionable {bare}.",
    "{a} cannot be excluded.",
    "appearance may represent {a}.",
    "suspected {bare}.",
)
ABSENT = ("no {0}.", "there is no {0}.", "no evidence of {0}.", "no {0} is seen.", "negative for {0}.")
ABSENT_TWO = (
    "no {0} or {1}.",
    "there is no {0} or {1}.",
    "no evidence of {0} or {1}.",
    "neither {0} nor {1} is seen.",
)
CHANGES = {
    "new": ("new since the prior study", "new from prior"),
    "unchanged": ("unchanged from prior", "stable compared with the prior study"),
    "increased": ("increased from prior", "worse than on the prior study"),
    "decreased": ("decreased from prior", "improved since the prior study"),
}
RESOLVED = ("previously seen {0} has resolved.", "the {0} of the prior study is no longer seen.")
NORMAL = (
    "no acute cardiopulmonary abnormality.",
    "normal chest radiograph.",
    "no acute disease of the chest.",
    "unremarkable chest.",
)
ABNORMAL_ELSEWHERE = (
    "the trachea is midline.",
    "the mediastinum is unremarkable.",
    "the upper abdomen is normal.",
)
CLEAR_LUNGS = ("the lungs are clear.", "both lungs are clear.")
NORMAL_HEART = ("heart size is normal.", "the heart is normal in size.")
INTACT_BONES = ("the bones are intact.", "no acute bony abnormality.")


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b" or "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def name_of(name: str, rng: np.random.Generator, canonical: float = _CANONICAL) -> str:
    """The canonical name of a finding or one of its synonyms."""
    return name if rng.random() < canonical else pick(rng, SPECS[name].synonyms)


def many(finding: Finding) -> bool:
    """Whether the noun phrase of the finding is a plural."""
    return finding.side == "bilateral" and SPECS[finding.name].countable


def place(finding: Finding, rng: np.random.Generator) -> str:
    """Where a lung finding is: "left upper lobe"."""
    return f"{finding.side} {pick(rng, _ZONE_WORDS[finding.zone])}"


def noun(finding: Finding, word: str, rng: np.random.Generator, severity: bool = True) -> tuple[str, str]:
    """The noun phrase of a finding without and with its article.

    Args:
        word: what the finding is called here.
        severity: say how severe it is.
    """
    spec = SPECS[finding.name]
    grade = ""
    if severity and spec.scale:
        grade = pick(rng, _SEVERITY[spec.scale][finding.severity - 1]) + " "
    if finding.name == "support device":
        bare = f"{finding.side} {finding.kind}".strip()
        bare = f"{word}, {bare}" if rng.random() < 0.5 else f"{bare} as {word}"
    elif finding.name == "fracture":
        parts = [bone_name(bone) for bone in fractured_bones(finding)]
        bare = f"{word} of the {finding.side} {listed(parts)}"
    elif spec.zones and finding.name != "pleural thickening":
        where = place(finding, rng)
        bare = f"{grade}{word} in the {where}" if rng.random() < 0.6 else f"{grade}{where} {word}"
    elif spec.zones:
        bare = f"{grade}{finding.side} {word} at the {finding.zone} chest wall"
    elif spec.sides in ("both", "midline"):
        bare = f"{grade}{word}"
    else:
        bare = f"{grade}{finding.side} {word}{'s' if many(finding) else ''}"
    return bare, article(bare) if spec.countable and not many(finding) else bare


def sites(finding: Finding) -> list[str]:
    """The anatomy of a finding's entities: one for each side or bone."""
    if finding.name == "support device":
        site = _DEVICE_SITES[finding.kind]
        return [f"{finding.side} {site}" if finding.kind == "chest tube" else site]
    if finding.name == "fracture":
        return [f"{finding.side} {bone_name(bone)}" for bone in fractured_bones(finding)]
    site = SPECS[finding.name].site
    if finding.zone and site == "lung":
        site = f"{finding.zone} lung zone"
    return [f"{side} {site}".strip() for side in finding.sides]

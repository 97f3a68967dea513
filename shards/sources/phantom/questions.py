"""Questions about a phantom, answered from what is drawn; never about a finding that the report hedges.

Whoever knows the question but not the image cannot do better than guess: of every finding as many questions
expect "yes" as "no", and a side, zone or severity is asked for only where it is drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shards.sources.phantom.drawing import fractured_bones
from shards.sources.phantom.findings import FINDINGS, HEDGED, SPECS, Finding
from shards.sources.phantom.phrases import article, listed, pick
from shards.study import Question

_PRESENT = ("is there {0}?", "does the radiograph show {0}?", "is {0} seen?")
_WHICH = ("what abnormality is seen?", "which findings does the radiograph show?", "what is abnormal?")
_SIDE = ("on which side is the {0}?", "which side shows the {0}?")
_VIEW = ("which view is this?", "from which direction was the radiograph taken?")
_ZONE = ("in which lung zone is the {0}?", "which zone of the lung shows the {0}?")
_KIND = ("what kind of {0} is seen?", "which {0} is it?")
_COUNT = ("how many bones are fractured?", "how many bones are broken?")
_SEVERITY = {
    "size": (("how large is the {0}?", "what size has the {0}?"), ("small", "moderate", "large")),
    "degree": (("how severe is the {0}?", "what is the degree of the {0}?"), ("mild", "moderate", "severe")),
}


def ask(findings: Sequence[Finding], view: str, rng: np.random.Generator) -> list[Question]:
    """Questions about the view, which findings there are, whether each is there, and what it is like.

    Every present finding is asked about, and an absent one as often as evens out "yes" and "no".

    Args:
        findings: what is drawn. view: "PA" or "AP". rng: randomness of choice and wording.
    """
    sure = [finding for finding in findings if finding.certain]
    drawn = {finding.name for finding in findings}
    asked = [_question(_VIEW, "", view, rng, "open", "plane")]
    if len(sure) == len(findings):
        names = listed([finding.name for finding in findings]) if findings else "none"
        asked.append(_question(_WHICH, "", names, rng, "open", "abnormality"))
    for spec in FINDINGS:
        # Of studies without the finding, this share is as many as those that show it for certain.
        chosen = rng.random() < (1 - HEDGED) * spec.prevalence / (1 - spec.prevalence)
        present = any(finding.name == spec.name for finding in sure)
        if present or (chosen and spec.name not in drawn):
            noun = article(spec.name) if spec.countable else spec.name
            answer = "yes" if present else "no"
            asked.append(_question(_PRESENT, noun, answer, rng, "closed", "presence"))
    return asked + [question for finding in sure for question in _details(finding, rng)]


def _details(finding: Finding, rng: np.random.Generator) -> Iterator[Question]:
    """What a finding is like, as far as that differs between phantoms."""
    spec = SPECS[finding.name]
    if finding.side and spec.sides in ("lateral", "paired"):
        side = "both" if finding.side == "bilateral" else finding.side
        yield _question(_SIDE, finding.name, side, rng, "open", "position")
    if finding.zone and spec.site == "lung":
        yield _question(_ZONE, finding.name, finding.zone, rng, "open", "zone")
    if spec.scale:
        forms, grades = _SEVERITY[spec.scale]
        yield _question(forms, finding.name, grades[finding.severity - 1], rng, "open", "severity")
    if finding.kind:
        yield _question(_KIND, finding.name, finding.kind, rng, "open", "device")
    if finding.name == "fracture":
        yield _question(_COUNT, "", str(len(fractured_bones(finding))), rng, "open", "count")


def _question(
    forms: Sequence[str], noun: str, answer: str, rng: np.random.Generator, kind: str, topic: str
) -> Question:
    text = pick(rng, forms).format(noun)
    return Question(text[0].upper() + text[1:], answer, kind, topic)

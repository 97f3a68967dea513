"""Questions about a phantom, answered from what is drawn; never about a finding that the report hedges."""

from collections.abc import Sequence

import numpy as np

from shards.sources.phantom.findings import FINDINGS, SPECS, Finding
from shards.sources.phantom.phrases import article, listed, pick
from shards.study import Question

_PRESENT = ("is there {0}?", "does the radiograph show {0}?", "is {0} seen?")
_WHICH = ("what abnormality is seen?", "which findings does the radiograph show?", "what is abnormal?")
_SIDE = ("on which side is the {0}?", "which side shows the {0}?")
_VIEW = ("which view is this?", "from which direction was the radiograph taken?")
#: Findings that are present, and as many that are absent, that are asked about.
_ASKED = 2


def ask(findings: Sequence[Finding], view: str, rng: np.random.Generator) -> list[Question]:
    """Questions about the view, which findings there are, whether some are there, and on which side.

    Args:
        findings: what is drawn. view: "PA" or "AP". rng: randomness of choice and wording.
    """
    sure = [finding for finding in findings if finding.certain]
    drawn = {finding.name for finding in findings}
    present = [sure[i].name for i in rng.permutation(len(sure))[:_ASKED]]
    absent = [spec.name for spec in FINDINGS if spec.name not in drawn]
    absent = [absent[i] for i in rng.permutation(len(absent))[:_ASKED]]
    asked = [_question(_VIEW, "", view, rng, "open", "plane")]
    if len(sure) == len(findings):
        names = listed([finding.name for finding in findings]) if findings else "none"
        asked.append(_question(_WHICH, "", names, rng, "open", "abnormality"))
    for name in [*present, *absent]:
        noun = article(name) if SPECS[name].countable else name
        asked.append(_question(_PRESENT, noun, "yes" if name in drawn else "no", rng, "closed", "presence"))
    for finding in sure:
        if finding.side and finding.name in present:
            side = "both" if finding.side == "bilateral" else finding.side
            asked.append(_question(_SIDE, finding.name, side, rng, "closed", "position"))
    return asked


def _question(
    forms: Sequence[str], noun: str, answer: str, rng: np.random.Generator, kind: str, topic: str
) -> Question:
    text = pick(rng, forms).format(noun)
    return Question(text[0].upper() + text[1:], answer, kind, topic)

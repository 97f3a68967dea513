"""A finding of which a sentence says one thing on one side, and another on the other.

"No right and small left pleural effusion", "small right and possible left effusion".
"""

import re

from shards.entities.lexicon import SIZE, TERM_PATTERN

_SIDE = r"(?:left|right|[lr]t)(?:[- ]sided)?"
_DOUBT = r"(?:possible|probable|likely|questionable|suspected)"
_SIZES = rf"(?:(?:{SIZE}|only|a|{_DOUBT})(?:[- ](?:sized|to))*[- ])"
#: Words that take nothing from a "no".
_ANY = (
    r"(?:(?:evidence|signs?) of (?:an? )?|(?:significant|definite|residual|obvious|convincing|appreciable|"
    r"visible|discernible|discrete|focal|acute|recurrent|further) )"
)
_HALF = rf"(?:no {_ANY}*{_SIZES}*|(?:a )?{_SIZES}+){_SIDE}"
_IN_DOUBT = re.compile(rf"no |.*{_DOUBT} ")
#: Two sides before their finding, each with "no" or a size; "no left or right" is one statement.
_BEFORE = re.compile(rf"\b(?P<one>{_HALF})(?:,? (?:and|but)|,) (?P<two>{_HALF}) (?=[a-z])")
#: Words between the sides and their finding: "left pleural effusion".
_BETWEEN = re.compile(r"(?:(?!and\b|or\b|with\b)[a-z]+[ -]){0,3}")
#: Two answers behind a finding and a colon.
_BEHIND = re.compile(
    r"(?:(?<=\. )|^)(?P<finding>[^:;,.]{3,60}): (?P<one>[^:;,.]{3,60})(?:[;,]|,? (?:and|but)) "
    r"(?P<two>[^:;,.]{3,60})(?=[.;]|$)"
)
#: What a finding on one side looks like, in words that say nothing else: "loculated on the left".
_LOOK = (
    r"(?:(?:multi)?loculated|layering|subpulmonic|complex|dense|hazy|patchy|streaky|linear|nodular|focal|"
    r"diffuse|extensive|subtle|slight|chronic|acute|recurrent|evolving|bigger|larger|smaller|and)"
)
_SIDES = {"left": "left", "right": "right", "lt": "left", "rt": "right"}
_FILLERS = {"on", "in", "at", "the", "side", "sided", "is", "a", "seen", "sized", "to"}
_DENIALS = {"none", "no", "nil", "absent", "negative"}
_CONFIRMS = {"yes", "present", "positive"}


def apart(sentence: str) -> str:
    """The same sentence, in lower case, with a statement for each side of which it says something."""
    if match := _BEFORE.search(sentence):
        finding = TERM_PATTERN.search(sentence, match.end())
        halves = [match["one"], match["two"]]
        if (
            finding is not None
            and _BETWEEN.fullmatch(sentence, match.end(), finding.start())
            and any(_IN_DOUBT.match(half) for half in halves)
        ):
            phrase, rest = sentence[match.end() : finding.end()], sentence[finding.end() :]
            if re.match(r",? or ", rest):  # goes on with what is denied
                halves = sorted(halves, key=lambda half: half.startswith("no "))
            said = "; ".join(f"{half} {phrase}" for half in halves)
            return f"{sentence[: match.start()]}{said}{rest}"
    if (match := _BEHIND.search(sentence)) and TERM_PATTERN.search(match["finding"]):
        one, two = (_answer(match[part]) for part in ("one", "two"))
        if one and two:
            said = "; ".join(" ".join((given, side, match["finding"])).strip() for side, given in (one, two))
            return f"{sentence[: match.start()]}{said}{sentence[match.end() :]}"
    return sentence


def _answer(text: str) -> tuple[str, str] | None:
    """Side and size or look, or "no", of an answer such as "none on the right"; None where it is none."""
    words = [word for word in re.findall(r"[^\s-]+", text) if word not in _FILLERS]
    sides = [_SIDES[word] for word in words if word in _SIDES]
    given = [word for word in words if word not in _SIDES]
    if len(sides) != 1 or not given:
        return None
    if set(given) <= _DENIALS:
        return sides[0], "no"
    if set(given) <= _CONFIRMS:
        return sides[0], ""
    known = all(re.fullmatch(f"{SIZE}|{_DOUBT}|{_LOOK}", word) for word in given)
    return (sides[0], " ".join(given)) if known else None

"""Findings that are asked for and answered: "Pneumothorax: none.", "Effusion ..... absent", "[x] no".

Templates and tables of findings say what is absent behind the finding, often with a mark between the two that
ends the reach of every cue in a sentence. Here such statements are cut apart and their answers found.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shards.text.sentences import split_sentences

_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|visible|noted|demonstrated|evident|present|appreciated|apparent|"
    r"detected|found|shown)"
)
_ANSWERS = {
    # An answer wherever it follows the mark.
    "absent": rf"none(?: (?:is|are|was|were))?(?: \w+)? {_SEEN}|none|nil|nothing(?: {_SEEN})?|absent|"
    rf"(?:(?:is|are|was|were) )?not (?:\w+ ){{0,2}}?{_SEEN}|no evidence(?! (?:of|for))|no longer {_SEEN}|"
    r"(?:has |have )?resolved|(?:has |have )?cleared|excluded|ruled out",
    "uncertain": r"possibl[ey]|probabl[ey]|likely|unlikely|suspected|equivocal|uncertain|questionable|"
    r"questioned|indeterminate|borderline|maybe|perhaps|(?:cannot|can not|could not|not) (?:\w+ )?be "
    r"(?:\w+ )?(?:excluded|ruled out)|not (?:excluded|ruled out)",
    "unstated": r"n/?a|unknown|unclear|not (?:applicable|assess(?:ed|able)|evaluat(?:ed|able)|stated|known|"
    r"determined|mentioned)|unable to (?:assess|evaluate)",
    # Only where nothing else follows: "no" opens many sentences.
    "absent_alone": r"no(?:pe)?|n|neg(?:ative)?|false|zero|0|[-−](?:ve)?|no evidence",
    "uncertain_alone": r"\?|\+/-|±",
    "present_alone": r"yes|y|present|positive|true|seen|\+(?:ve)?",
}
_END = r"(?=\s*(?:[.;,)\]|/]|$))"
# "effusion: no pneumothorax: no": line breaks were lost, and the next finding follows.
_NEXT = r"(?=\s+(?:[a-z/-]+\s){0,3}?[a-z/-]+\s*[:=])"
_MARK = r"(?:[:：=|?(\[]|-+>|→|\.{2,}|…|[–—]|(?<=\s)-+(?=\s))"
_MARKS = rf"\s*{_MARK}(?:\s*{_MARK})*\s*"
_OPEN_KINDS = "|".join(rf"(?P<{kind}>{_ANSWERS[kind]})(?!\w)" for kind in ("absent", "uncertain", "unstated"))
_ALONE_KINDS = "|".join(
    rf"(?P<{kind}>{_ANSWERS[kind]})(?:{_END}|{_NEXT})"
    for kind in ("absent_alone", "uncertain_alone", "present_alone")
)
# Behind a mention: further words of its phrase ("effusion on the left"), a mark, an answer.
_MARKED = re.compile(
    r"(?:\s+(?!(?:is|are|was|were|has|have)\b)[a-z'-]+){0,6}?(?:\s*\([^()]{0,20}\))?"
    rf"{_MARKS}(?:{_OPEN_KINDS}|{_ALONE_KINDS})"
)
# Without a mark only at the end of a statement: "Pneumothorax none.", "Effusion, no."
_BARE = re.compile(
    rf",?\s+(?:(?P<absent>{_ANSWERS['absent']}|no|neg(?:ative)?)|(?P<uncertain>{_ANSWERS['uncertain']}))"
    rf"(?:\s+at this time|\s+today|\s+currently)?{_END}"
)
# "none on the left, small on the right": the answer for one side is not that for the finding.
_SIZE = r"\b(?:yes|present|trace|tiny|small|mild|moderate|large|severe)\b"
_ON_SIDE = r"\bon the (?:left|right)\b"
_OTHER_SIDE = re.compile(
    rf"[^.;:]*{_SIZE}|(?=[^.;:]*\b(?:left|right)\b)[^.;:]*;(?=[^.;:]*{_ON_SIDE})[^.;:]*{_SIZE}"
)
_LIST = re.compile(r"\s*(?:,|/|&|\bor\b|\band\b|,\s*(?:and|or)\b)\s*(?:[a-z-]+\s+){0,2}")
# "A, b, and c has resolved" is said of c, whatever "a, b, and c is not seen" denies.
_SINGULAR = re.compile(r"has\b")
_LAST_ALONE = re.compile(r"\s*,\s*and\b")

_CHECKED = re.compile(r"\[[xX✓✔]\]|\([xX✓✔]\)|[☒☑✅✔]")
_BOX = r"(?:\[\s*\]|\(\s*\)|☐)"
_EMPTY_LAST = re.compile(rf"\s*{_BOX}\s*$")
_EMPTY_OPTION = re.compile(rf"{_BOX}[^\[\](){{}}☐☒☑✅✔|,;]*")
_CELL = re.compile(r"\s*[|\t]+\s*")
_LEADER = re.compile(r"\s*(?:\.{2,}|…+|_{4,}|\s{3,})\s*")
_LABEL = re.compile(r"[-*•]?\s*[^\W\d_][^.:：=|?]{1,59}")
_FIELD = re.compile(rf"({_LABEL.pattern}?){_MARKS}(?P<answer>\S.*)")
_STARTS = re.compile(rf"(?:{'|'.join(_ANSWERS.values())})(?!\w)", re.IGNORECASE)
_WHOLE = re.compile(rf"(?:{'|'.join(_ANSWERS.values())})\s*[.!]?", re.IGNORECASE)
_DENIES = re.compile(rf"(?:{_ANSWERS['absent']}|{_ANSWERS['absent_alone']})(?!\w)", re.IGNORECASE)
_STATEMENT = re.compile(r"\b(?:no|not|without|is|are|was|were|has|have|there)\b", re.IGNORECASE)
_LABEL_WORDS = 5


@dataclass(frozen=True)
class Answer:
    """An answer and the mentions it is given to; `value` is 1, 0, -1, or None where it states nothing."""

    start: int
    end: int
    value: int | None
    mentions: tuple[int, ...]


def find_answers(sentence: str, mentions: Sequence[tuple[int, int]], listed: Sequence[bool]) -> list[Answer]:
    """Answers that stand directly behind a mention of a sentence in lower case.

    Args:
        sentence: one sentence.
        mentions: (start, end) of each mention, in order.
        listed: whether a mention can be one of several that share an answer ("effusion or edema: none").
    """
    found = []
    for number, (_, end) in enumerate(mentions):
        following = mentions[number + 1][0] if number + 1 < len(mentions) else len(sentence)
        match = _BARE.match(sentence, end) or _MARKED.match(sentence, end)
        if match is None or match.start(match.lastgroup or 0) >= following:
            continue
        kind = (match.lastgroup or "").partition("_")[0]
        value = {"absent": 0, "uncertain": -1, "present": 1}.get(kind)
        if value == 0 and _OTHER_SIDE.match(sentence[:following], match.end()):
            value = 1
        ends = _LAST_ALONE if _SINGULAR.match(match[match.lastgroup or 0]) else None
        found.append(Answer(end, match.end(), value, _sharing(number, sentence, mentions, listed, ends)))
    return found


def _sharing(
    number: int,
    sentence: str,
    mentions: Sequence[tuple[int, int]],
    listed: Sequence[bool],
    ends: re.Pattern[str] | None,
) -> tuple[int, ...]:
    first = number
    while first > 0 and listed[first] and listed[first - 1]:
        gap = (mentions[first - 1][1], mentions[first][0])
        if not _LIST.fullmatch(sentence, *gap) or (ends is not None and ends.match(sentence, *gap)):
            break
        first -= 1
    return tuple(range(first, number + 1))


def statements(text: str) -> list[str]:
    """The sentences of a section; a line that asks and answers is one, and so is an answer with its question.

    Rows of tables and dotted lines become "finding: answer". Of several answers in a row (one a side) the
    first that does not deny stands for all. Unticked boxes and what they offer are left out.
    """
    blocks: list[str] = [""]
    for line in text.splitlines():
        field = _field(line.strip())
        if field is None:
            blocks[-1] += f"{line}\n"
        else:
            blocks += [field, ""]
    return list(_with_answers([sentence for block in blocks for sentence in split_sentences(block)]))


def _field(line: str) -> str | None:
    """A line that is a finding and its answer, with a colon between the two; None for any other line."""
    boxed = _CHECKED.sub(" ", _EMPTY_OPTION.sub(" ", _EMPTY_LAST.sub(": n/a", line)))
    cells = [cell for cell in _CELL.split(boxed) if cell]
    if len(cells) == 1:
        cells = _LEADER.split(boxed.strip(), maxsplit=1)
    if len(cells) > 1 and _LABEL.fullmatch(cells[0].rstrip(" :=-")):
        answers = [cell.strip() for cell in cells[1:]]
        if any(_STARTS.match(answer) for answer in answers):
            chosen = next((answer for answer in answers if not _DENIES.match(answer)), answers[0])
            return f"{cells[0].rstrip(' :=-')}: {chosen}"
    field = _FIELD.fullmatch(boxed.strip())
    if boxed != line or (field is not None and _STARTS.match(field["answer"])):
        return " ".join(boxed.split())
    return None


def _with_answers(sentences: Sequence[str]) -> Iterator[str]:
    """Sentences, with one that is an answer alone ("None.") joined to the question or label before it."""
    held: str | None = None
    for sentence in sentences:
        if held is not None and _WHOLE.fullmatch(sentence) and _asks(held):
            held = f"{held.rstrip('.?: ')}: {sentence}"
            continue
        if held is not None:
            yield held
        held = sentence
    if held is not None:
        yield held


def _asks(sentence: str) -> bool:
    short = len(sentence.split()) <= _LABEL_WORDS and not _STATEMENT.search(sentence)
    return sentence.endswith(("?", ":")) or short

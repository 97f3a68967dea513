"""Whether a sentence says that something is present, absent or uncertain: cues and how far they reach.

A scan from left to right, in the manner of NegEx and ConText (Chapman 2001, Harkema 2009): a cue sets the
state for what follows it, until another cue or a boundary; cues that stand behind act on what is before them.
The cue list and the comma rules are ours, made on radiology reports.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shards.entities.answers import Answer, find_answers
from shards.entities.lexicon import SIZE

Span = tuple[int, int]

PRESENT, ABSENT, UNCERTAIN = 1, 0, -1

_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|noted|demonstrated|evident|present|appreciated|apparent|detected|"
    r"found)"
)
#: What one view alone does not show is there.
_ON_BOTH_VIEWS = r"(?! on (?:the |this )?(?:lateral|frontal|ap|pa)\b)"
_BE = r"(?:is|are|was|were|be|been|being)"
_SIDED = r"(?:left|right|bilateral|[lr]t)\b"
_PARTLY = (
    r"(?:partial(?:ly)?|incomplete(?:ly)?|mostly|largely|near(?:ly)?|almost|partly|somewhat|slightly|"
    r"substantially|significantly|markedly)"
)
# Kind of cue -> its forms. Kinds are tried in this order at every place of the sentence, so a form that
# begins like another one stands before it.
_CUES: dict[str, tuple[str, ...]] = {
    # Looks like a negation, says that something is (still) there: the scan passes over it.
    "pseudo": (
        r"no (?:\w+ ){0,2}?(?:change|increase|decrease|improvement|progression|resolution)s?\b"
        r"(?: (?:in|of|from))?",
        r"no (?:\w+ ){0,2}?(?:worsening|expansion|growth|extension) (?:of|in)",
        rf"(?:(?:has|have|had|{_BE}) (?:been |since |now )?)?{_PARTLY}(?: |-)(?:interval |complete(?:ly)? |"
        r"total(?:ly)? )?(?:resol(?:ved|ution)|clear(?:ed|ing)|disappeared)(?: of)?",
        r"without (?:\w+ )?(?:change|resolution|improvement)(?: (?:in|of))?",
        r"(?:has|have|had) not (?:\w+ )?(?:resolved|cleared|changed|improved)",
        r"not (?:\w+ ){0,2}?(?:changed|different|removed|resolved|without|free of|clear of)",
        r"not (?:only|necessarily)",
        r"no(?:t)? (?:longer )?(?:\w+ )?(?:excluded|ruled out) ?$",
        r"(?:consistent|compatible|associated|in keeping) with",
    ),
    # Behind what it speaks about.
    "uncertain_before": (
        rf"(?:cannot|can not|could not|can't|not) (?:entirely |completely |definitively )?{_BE} "
        r"(?:\w+ )?(?:excluded|ruled out)",
        rf"(?:{_BE} )?not (?:entirely |completely |definitively )?(?:excluded|ruled out)",
        rf"{_BE} (?:also )?(?:possible|suspected|questioned|suggested|considered|likely|probable|favou?red|"
        r"doubtful)",
        r"(?!^)(?:(?:is|are|appears?) )?(?:un|less )likely",
        r"(?:may|might|could) be present", rf"(?:may|might) not be {_SEEN}",
        r"\?",
    ),
    "absent_before": (
        rf"(?:{_BE} |has |have )?not (?!as )(?:\w+[ -]){{0,2}}?{_SEEN}{_ON_BOTH_VIEWS}",
        rf"(?:cannot|can't|couldn't) be (?:\w+[ -])?{_SEEN}{_ON_BOTH_VIEWS}",
        r"(?:has|have|had) (?:\w+ )?(?:resolved|cleared|disappeared)",
        r", (?:now |since |completely |fully )+(?:resolved|cleared)(?=\s*(?:[.;,]|$))",
        rf"(?:{_BE} )?no longer (?:\w+ )?{_SEEN}",
        rf"{_BE} (?:\w+ )?(?:absent|resolved|excluded|ruled out)",
        r"(?:has|have|had|is|are|was|were) (?:(?!to |not )\w+ ){0,2}?removed",
        r"(?<!\bbe )removed(?=\s*(?:[.;,]|$))",
    ),
    # Not about this patient now: what follows is left out.
    "elsewhere": (
        r"history of", r"h/o", r"status post", r"s/p",
        r"(?:to |please )?(?:evaluate|assess|evaluation|assessment|check|look)(?:ed)? for",
        r"(?:to )?(?:rule|ruling) out", r"r/o", r"to (?:exclude|evaluate|assess|confirm|document|ensure)",
        r"(?:if|should) (?:there|the|clinical\w*|symptom\w*|concern\w*)", r"recommend\w*", r"advised?",
        r"symptoms? of", r"clinical (?:concern|suspicion) (?:for|of)", r"(?:pre|post)-?operative",
    ),
    "uncertain": (
        r"(?:cannot|can not|could not|can't|not) (?:entirely |completely )?(?:exclude|rule out)",
        r"possib(?:le|ly|ility)(?: of)?", r"probabl[ey]", r"(?:most |very |more )?likely", r"perhaps",
        r"(?:may|might|could|can) (?:also )?(?:represent|reflect|be|indicate|suggest|relate)",
        r"suspected", r"presum(?:ed|ably)", r"question(?:able)?(?: of)?", r"questioned",
        r"unlikely", r"doubt(?:ful)?", r"not inconsistent with",
        r"differential", r"borderline", r"equivocal", r"uncertain",
    ),
    # Acts on both sides.
    "versus": (r"versus", r"vs\.?"),
    # Uncertain too, but under a negation the negation holds: "no opacity to suggest pneumonia".
    "weak": (
        r"(?:to )?suggest(?:s|ed|ing|ive|ion)?(?: of)?", r"(?:suspicious|worrisome|concerning|concern|"
        r"suspicion) (?:for|of)", r"(?:to )?indicate(?:s)?", r"(?:which )?raises?",
    ),
    # Of the word that follows: a fracture that is non-displaced is there.
    "absent_next": (r"non(?![- ]?visuali[sz]ation)",),
    "absent": (
        r"no evidence (?:of|for)", r"no (?:signs?|indication|radiographic (?:evidence|findings?)) of",
        r"(?:neg(?:ative)?|clear|free) (?:for|of)", r"absence of", r"absent(?= \w)", r"nil(?= \w)",
        r"without(?: evidence of)?", r"resolved",
        r"resolution of", r"clearing of",
        r"(?<!recommend )(?<!consider )(?<!before )(?<!prior to )removal of",
        r"non[- ]?visuali[sz]ation(?: of)?", r"inconsistent with",
        r"neither", r"nor", r"not", r"no", r"never", r"lacks?",
        r"rather than",
    ),
    "boundary": (
        r"[;:]", r"\b(?:but|however|although|though|except|otherwise|while|whereas|yet|nevertheless)\b",
        r"\b(?:aside|apart|other than)(?: from)?\b", r"\bthere (?:is|are|has|have)\b", r"\bwith\b",
        r"\band (?=(?:the|there|a|an|only|is|are|stable|unchanged|normal|clear|unremarkable|persistent|mild|"
        r"low)\b)",
        # "The heart is not enlarged and mediastinal contours are normal."
        r"\band (?=(?:(?!and\b|or\b)[\w-]+ ){1,4}(?:is|are|appears?|remains?) (?:\w+ ){0,2}?(?:normal|clear|"
        r"unremarkable|stable|unchanged|intact)\b)",
        r"\bdue to\b", r"\bin (?:the setting|this patient)\b", r"\bsecondary to\b", r"\.(?=\s|$)",
        # "No pneumothorax following placement of a chest tube": the tube is there.
        r"\b(?:following|after|and) (?:the )?(?:\w+ ){0,2}?(?:placement|insertion|advancement|exchange)\b",
        # "Pneumothorax after the chest tube was removed": the pneumothorax is there.
        r"\b(?:after|since|once|when) (?=(?:\w+ ){0,5}?(?:has|have|had|was|were) (?:been )?removed\b)",
        r"\((?=[^()]*\bpresent\b)", r"(?<=enlargement) of (?=(?:the |this |that )?(?:\w+ ){0,2}?(?:"
        r"(?:hydro)?pneumothora|effusion|nodul|mass|lesion|opaci|consolidation|collection))",
    ),
    # Ends a denial, not a doubt: nobody denies "and moderate cardiomegaly". One of a new finding goes on,
    # unless a side is named: "no effusion and new left pneumothorax", "... on the left".
    "denied_until": (
        r"and(?= (?:trace|tiny|small|minimal|moderate|large|severe|decreased|residual) )",
        rf"and(?= {SIZE}(?:[- ](?:to|sized|{SIZE}))* (?:{_SIDED}|(?:\w+ ){{1,2}}(?:on|in) the {_SIDED}))",
    ),
}  # fmt: skip


def _cue_pattern() -> re.Pattern[str]:
    groups = []
    for kind, forms in _CUES.items():
        either = "|".join(forms)
        groups.append(f"(?P<{kind}>{either})" if kind == "boundary" else rf"(?P<{kind}>\b(?:{either})(?!\w))")
    groups.append(r"(?P<comma>,)")
    return re.compile("|".join(groups))


_CUE = _cue_pattern()
_LIST_ITEM = re.compile(r"\s*(?:or|nor)\b|[^;:]*?,?\s(?:or|nor)\s")
_LAST_OF_LIST = re.compile(r"\s*and\b(?:(?!\b(?:is|was|has)\b)[^;:,.])*\b(?:have|are|were)\b")
# "No a, b, and c are seen" denies c too, unlike "no a, b, and the lungs are clear" and "no a, no b, and c is
# seen".
_DENIED_LIST = re.compile(r"\s*(?:no|without)\b(?!.*\bno\b)")
_LAST_SEEN = re.compile(
    rf"\s*and (?!(?:the|there|no)\b)(?:(?!(?:is|are|was|were|has|have)\b)[\w/-]+ ){{1,4}}"
    rf"(?:is|are|was|were|(?:has|have) been) (?:\w+ )?{_SEEN}(?=\s*(?:[.;]|$))"
)
_VERB = re.compile(r"\b(?:is|are|was|were|appears?|remains?|shows?|demonstrates?|has|have|removed)\b")
# How a new statement opens after a comma, instead of the next item of a list.
_OPENS = re.compile(
    r"\s*(?:and )?(?:the|there|a|an|this|these|with|new|stable|unchanged|small|mild|moderate|minimal|trace|"
    r"tiny|only|persistent|increas\w+|decreas\w+|worsening|improv\w+|possibl[ey]|probabl[ey]|likely|"
    r"questionable|normal|clear|unremarkable|low|bibasilar|left|right|bilateral|which|suggest\w*|consistent|compatible)\b"
)


@dataclass(frozen=True)
class _Cue:
    start: int
    end: int
    kind: str


def assertions(sentence: str, mentions: Sequence[Span], listed: Sequence[bool]) -> list[int | None]:
    """What a sentence asserts about its mentions: 1 present, 0 absent, -1 uncertain, None not of this study.

    Args:
        sentence: one sentence in lower case.
        mentions: (start, end) of each mention in characters, in order and without overlap.
        listed: whether a mention can stand in a list that shares one answer (`answers.find_answers`).
    """
    answers = find_answers(sentence, mentions, listed)
    # A cue inside a mention ("borderline" is a finding too) still acts on what follows.
    cues = _without_answers(list(_cues(sentence)), answers)
    values: list[int | None] = []
    for start, _ in mentions:
        values.append(_state_at(sentence, start, cues))
    for cue in cues:
        if not cue.kind.endswith(("_before", "versus")):
            continue
        first = max(
            (other.end for other in cues if other.kind == "boundary" and other.end <= cue.start), default=0
        )
        before = [number for number, (_, end) in enumerate(mentions) if end <= cue.start]
        if cue.kind == "versus":
            before = before[-1:]
        for number in before:
            start, end = mentions[number]
            if first <= start and end <= cue.start and values[number] is not None:
                values[number] = _after(values[number], cue.kind)
    for answer in answers:
        for number in answer.mentions:
            # "No pneumothorax: yes." still denies.
            if answer.value != PRESENT or values[number] not in (ABSENT, PRESENT):
                values[number] = answer.value
    return values


def _without_answers(cues: Sequence[_Cue], answers: Sequence[Answer]) -> list[_Cue]:
    """Cues with each answer, and the cues in it, as one boundary."""
    free = [
        cue
        for cue in cues
        if not any(cue.start < answer.end and answer.start < cue.end for answer in answers)
    ]
    ends = [_Cue(answer.start, answer.end, "boundary") for answer in answers]
    return sorted([*free, *ends], key=lambda cue: cue.start)


def _after(value: int | None, kind: str) -> int | None:
    """Value of a mention before a cue that acts backwards; a second negation does not undo the first."""
    if kind != "absent_before":
        return UNCERTAIN
    return ABSENT if value != UNCERTAIN else UNCERTAIN


def _state_at(sentence: str, position: int, cues: Sequence[_Cue]) -> int | None:
    state: int | None = PRESENT
    for cue in cues:
        if cue.start >= position:
            break
        if cue.kind in ("boundary", "last of list") or (cue.kind == "denied_until" and state == ABSENT):
            state = PRESENT
        elif cue.kind == "absent" or (
            cue.kind == "absent_next" and sentence[cue.end : position] in ("-", " ")
        ):
            state = ABSENT
        elif cue.kind == "elsewhere":
            state = state if state == ABSENT else None
        elif cue.kind in ("uncertain", "versus") or (cue.kind == "weak" and state != ABSENT):
            state = UNCERTAIN
    return state


def _cues(sentence: str) -> Iterator[_Cue]:
    """Cues in order; a comma that ends the reach of what is before it comes as a boundary.

    The one before the last of several findings ends no reach of what stands behind them: "a, b, and c have
    cleared".
    """
    for match in _CUE.finditer(sentence):
        kind = match.lastgroup or ""
        if kind == "comma":
            before, rest = sentence[: match.start()], sentence[match.end() :]
            if _LAST_SEEN.match(rest) and _DENIED_LIST.match(_list_at_end(before)):
                continue
            if _ends_statement(rest):
                last = _LAST_OF_LIST.match(rest) and _list_at_end(before)
                yield _Cue(match.start(), match.end(), "last of list" if last else "boundary")
        elif kind != "pseudo":
            yield _Cue(match.start(), match.end(), kind)


def _list_at_end(text: str) -> str:
    """The last statement of a text where it names several findings and has no verb yet, else nothing."""
    last = re.split(r"[;:]|\.\s", text)[-1]
    return last if "," in last and not _VERB.search(last) else ""


def _ends_statement(rest: str) -> bool:
    """Whether a comma before `rest` separates statements, not items of one list ("no a, b, or c")."""
    rest = re.split(r"[;:]|\.\s|\b(?:but|however|although)\b", rest, maxsplit=1)[0]
    listed = _LIST_ITEM.match(rest)
    if listed and not _VERB.search(listed[0]):
        return False
    return bool(_OPENS.match(rest) or _VERB.search(rest.split(",", 1)[0]))

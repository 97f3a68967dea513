"""Sections of MIMIC-CXR's reports by the rules of the set's own section parser, irregular reports included.

A heading is a line that begins with one space and capitals up to a colon. Most spell one of a few names, some
in a dozen ways; reports without one, or with the findings under a title, are dealt with as the public parser
does (`create_section_files` of MIMIC-CXR's code repository), so texts agree with those that others train on.
"""

from __future__ import annotations

import re

#: Sections that hold the reading; without any of them the last paragraph is looked for.
READING = ("impression", "findings")
PREAMBLE, WHOLE, LAST_PARAGRAPH = "preamble", "full report", "last_paragraph"

_HEADING = re.compile(r"\n ([A-Z ()/,-]+):\s")
_BLANK_LINE = "\n \n"
#: Titles, and the line between an addendum and the report behind it; "___" stands for what is de-identified.
_TITLES = re.compile(r"^[ \t]*(?:FINAL (?:REPORT|ADDENDUM)|_{10,})[ \t]*$", re.MULTILINE)

_SPELLINGS = {
    "impression": "impression, conclusion, findings and impression, findings/impression, "
    "findings/ impression, impresson, imprression, imoression, impressoin, imprssion, impresion, imperssion, "
    # The last is the public parser's choice, too.
    "mpression, impession, ndication",
    "findings": "findings, finding, reference findings, findins, findindgs, findgings, findngs, findnings, "
    "finidngs",
    "indication": "indication, reason for exam, reason for examination, clinical indication, idication",
    "history": "history, clinical history, clinical information, patient history, pfi",
    "comparison": "comparison, comparisons, comparison exam, comparison film, reference exam, comparision, "
    "comparisions, comparsion, comparrison",
    "examination": "examination, exam, type of examination",
    "recommendations": "recommendations, recommendation, recommendation(s)",
    "wet read": "wet read, wetread",
}
_NAMES = {heading: name for name, listed in _SPELLINGS.items() for heading in listed.split(", ")}
_NAMES["chest, two views"] = "findings"
#: A heading that is none of these but holds one of the words.
_HELD = ("impression", "findings", "history", "comparison", "addendum")
#: Titles of an examination under which the findings stand.
_VIEWS = (
    "chest", "portable", "pa and lateral", "lateral and pa", "ap and lateral", "lateral and ap",
    "frontal and", "two views", "frontal view", "pa view", "ap view", "lateral view", "one view",
    "bone window", "frontal upright", "frontal semi-upright", "ribs", "pa and lat",
)  # fmt: skip


def mimic_sections(report: str, study: str) -> dict[str, str]:
    """Section name -> text, in report order; what is empty is left out.

    Of several sections of one name the last is taken. A report without findings and impression has its last
    section cut at the first blank line, and what follows is "last_paragraph"; a report without headings is
    "full report" (and a last paragraph). In the set's irregular reports, known by their study, "findings" is
    what the set's authors found to be the reading.

    Args:
        report: the file as it is, not stripped.
        study: its number, with or without "s".
    """
    # Positions in irregular reports count characters of text in which every line end is one.
    text = report.replace("\r\n", "\n").replace("\r", "\n")
    number = study.removeprefix("s")
    if number in _RANGES:
        start, end = _RANGES[number]
        return _filled([("findings", text[start:end])])
    parts = _parts(text)
    if number in _WHOLE_SECTIONS:
        wanted = _WHOLE_SECTIONS[number]
        last = max((i for i, (name, _) in enumerate(parts) if name == wanted), default=None)
        kept = [i for i, (name, _) in enumerate(parts) if i == last or name not in READING]
        return _filled([("findings" if i == last else parts[i][0], parts[i][1]) for i in kept])
    if number in _NO_READING:
        return _filled([(name, part) for name, part in parts if name not in READING])
    parts = [(name, part) for name, part in parts if name not in READING or part.strip()]
    if parts and not any(name in READING for name, _ in parts):
        name, part = parts[-1]
        head, cut, rest = part.partition(_BLANK_LINE)
        parts[-1:] = [(name, head), (LAST_PARAGRAPH, rest)] if cut else [(name, part)]
    return _filled(parts)


def section_name(heading: str) -> str:
    """Name of the section that a heading opens, whatever its spelling."""
    heading = heading.strip().lower()
    if heading in _NAMES:
        return _NAMES[heading]
    for word in _HELD:
        if word in heading:
            return word
    return "findings" if any(view in heading for view in _VIEWS) else heading


def _parts(text: str) -> list[tuple[str, str]]:
    """Name and text of each section in order, empty and repeated ones included."""
    heading = _HEADING.search(text)
    if heading is None:
        return [(WHOLE, text)]
    parts = [(PREAMBLE, text[: heading.start(1)])]
    while heading is not None:
        # From the next line on, so that "CHEST: PA:" is one heading.
        line_end = text.find("\n", heading.end())
        following = _HEADING.search(text, line_end if line_end >= 0 else heading.end())
        end = len(text) if following is None else following.start()
        parts.append((section_name(heading[1]), text[heading.end() : end]))
        heading = following
    return parts


def _filled(parts: list[tuple[str, str]]) -> dict[str, str]:
    """The last section of each name that holds anything but titles."""
    sections: dict[str, str] = {}
    for name, text in parts:
        text = text if name in READING else _TITLES.sub("", text)
        if text.strip():
            sections.pop(name, None)
            sections[name] = text.strip()
    return sections


def _by_study(listed: str) -> dict[str, str]:
    return {number: name for name, _, numbers in map(_split, listed.split(";")) for number in numbers.split()}


def _split(text: str) -> tuple[str, str, str]:
    return text.strip().partition(" ")


#: Studies whose reading stands under another heading: that section as a whole.
_WHOLE_SECTIONS = _by_study(
    "recommendations 50913680 59768032 59067458 59087630 58157373 56482935 58375018;"
    "examination 59363654 53356173 50743547 59215320 55157853;"
    "technique 59279892 53202765 50808053;"
    "indication 57936451 50058765 51966317 55124749 54365831 54654948;"
    "note 56451190;"
    "history 51491012"
)

#: Studies whose reading is a range of characters of the file: start, end (exclusive).
_RANGES = {
    "50525523": (201, 349),
    "57564132": (233, 554),
    "59982525": (313, 717),
    "53488209": (149, 475),
    "54875119": (234, 988),
    "50196495": (59, 399),
    "56579911": (59, 218),
    "52648681": (292, 631),
    "59889364": (172, 453),
    "53514462": (73, 377),
    "59505494": (59, 450),
    "53182247": (59, 412),
    "51410602": (47, 320),
    "56412866": (522, 822),
    "54986978": (59, 306),
    "59003148": (262, 505),
    "57150433": (61, 394),
    "56760320": (219, 457),
    "59562049": (158, 348),
    "52674888": (145, 296),
    "55258338": (192, 568),
    "59330497": (140, 655),
    "52119491": (179, 454),
}

#: Studies whose report holds no reading at all.
_NO_READING = frozenset(
    "58235663 50798377 54168089 53071062 56724958 54231141 53607029 52035334".split()  # noqa: SIM905
)

"""Splits a radiology report into its sections."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Heading as reports write it (lower case, single spaces) -> name of the section.
_HEADINGS = {
    "addendum": "addendum",
    "clinical data": "indication",
    "clinical history": "history",
    "clinical indication": "indication",
    "clinical information": "indication",
    "comparison": "comparison",
    "comparison films": "comparison",
    "comparison study": "comparison",
    "comparisons": "comparison",
    "conclusion": "impression",
    "conclusions": "impression",
    "exam": "examination",
    "examination": "examination",
    "finding": "findings",
    "findings": "findings",
    "findings and impression": "findings",
    "findings/impression": "findings",
    "history": "history",
    "impression": "impression",
    "impressions": "impression",
    "impression and plan": "impression",
    "indication": "indication",
    "indications": "indication",
    "procedure": "technique",
    "reason for exam": "indication",
    "reason for examination": "indication",
    "reason for study": "indication",
    "recommendation": "recommendation",
    "recommendations": "recommendation",
    "recommendation(s)": "recommendation",
    "report": "findings",
    "study": "examination",
    "technique": "technique",
    "view": "technique",
    "views": "technique",
    "wet read": "preliminary",
}
#: Section of a report that has no heading at all.
DEFAULT_SECTION = "findings"
#: Section of what stands before the first heading.
PREAMBLE = "preamble"
#: Every name `split_sections` can give.
SECTION_NAMES = tuple(sorted({*_HEADINGS.values(), PREAMBLE}))


def _alternatives(headings: Iterable[str]) -> str:
    """Regular expression for any of `headings`, the longest first so that none hides behind its prefix."""
    longest_first = sorted(headings, key=len, reverse=True)
    return "|".join(r"[ \t]+".join(map(re.escape, heading.split())) for heading in longest_first)


_ANY_CASE = _alternatives(_HEADINGS)
_CAPITALS = _alternatives(heading.upper() for heading in _HEADINGS)
_CAPITALISED = _alternatives(heading.capitalize() for heading in _HEADINGS)
# A heading opens a line in any case with a colon, or fills a line in capitals without one. Where line breaks
# were lost it stands inside a line: in capitals with a colon, or capitalised with a colon after a sentence.
# Any other "Word:" ("LUNGS:", "Heart:") stays in its section.
_HEADING = re.compile(
    rf"^[ \t]*(?P<opens>(?i:{_ANY_CASE}))[ \t]*:"
    rf"|^[ \t]*(?P<fills>{_CAPITALS})[ \t]*$"
    rf"|(?<=\s)(?P<inside>{_CAPITALS})[ \t]*:"
    rf"|(?<=[.!?])\s+(?P<follows>{_CAPITALISED})[ \t]*:",
    re.MULTILINE,
)


def split_sections(report: str) -> dict[str, str]:
    """Section name -> its text, in report order; empty sections are left out.

    Headings are recognised from a fixed list and named by `SECTION_NAMES`. Text before the first heading is
    "preamble"; a report without headings is all "findings". A section that occurs
    twice is joined by a newline.
    """
    headings = list(_HEADING.finditer(report))
    if not headings:
        return {DEFAULT_SECTION: report.strip()} if report.strip() else {}
    parts = [(PREAMBLE, report[: headings[0].start()])]
    ends = [heading.start() for heading in headings[1:]] + [len(report)]
    for heading, end in zip(headings, ends, strict=True):
        written = heading[heading.lastgroup or 0]
        parts.append((_HEADINGS[" ".join(written.lower().split())], report[heading.end() : end]))
    sections: dict[str, str] = {}
    for name, text in parts:
        if text.strip():
            sections[name] = f"{sections[name]}\n{text.strip()}" if name in sections else text.strip()
    return sections

"""Splits a radiology report into its sections."""

import html
import re

from shards.text.headings import PREAMBLE, heading_pattern, headings, plain

#: Section of a report that has no heading at all.
DEFAULT_SECTION = "findings"

# Tags by name, so that "nodule < 5 mm, > 3 mm" stays what it is.
_INLINE_TAG = re.compile(
    r"<!--.*?-->|</?(?:a|b|body|center|em|font|html|i|pre|small|span|strong|sub|sup|u)(?:\s[^<>]*)?/?>",
    re.IGNORECASE | re.DOTALL,
)
_CELL_TAG = re.compile(r"</?(?:td|th)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_BREAK_TAG = re.compile(r"</?(?:br|hr|li|ol|table|tbody|tr|ul)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_BLOCK_TAG = re.compile(r"</?(?:div|h[1-6]|p)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_CHARACTER = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8});")
# Pairs only: "___" is what de-identification leaves, and "* item" opens an item of a list.
_EMPHASIS = re.compile(
    r"(?<![*\w])(\*{1,3})(?=[^\s*])([^*\n]+?)(?<=[^\s*])\1(?![*\w])"
    r"|(?<![_\w])(__)(?=[^\s_])([^_\n]+?)(?<=[^\s_])__(?![_\w])"
)

#: Sections that stand before the findings.
_FRONT = ("comparison", "examination", "history", "indication", "technique")
_PARAGRAPH = re.compile(r"\n\s*\n")
_NO_COMPARISON = re.compile(
    r"(?:none|nil|n/a|not available|unavailable|no(?:ne)?(?: [\w-]+){1,4}|_+|[\d/.-]+\d|ningun[oa]|keine?|"
    r"aucune?|nenhuma?|无|無|なし)\s*[.。]\s*",
    re.IGNORECASE,
)


def plain_text(text: str) -> str:
    """Text without what Markdown and HTML left in it, lines ended by a newline.

    Tags go (those that break a line become line breaks), character references become characters, paired
    asterisks and double underscores around words go.
    """
    text = "\n".join(text.splitlines())
    if "<" in text:
        text = _BLOCK_TAG.sub("\n\n", _BREAK_TAG.sub("\n", _CELL_TAG.sub(" ", _INLINE_TAG.sub("", text))))
    if "&" in text:
        text = _CHARACTER.sub(lambda reference: html.unescape(reference[0]), text)
    text = text.replace("\u00a0", " ").replace("\ufeff", "")
    return _EMPHASIS.sub(lambda pair: pair[2] or pair[4], text)


def split_sections(
    report: str, language: str = "en", findings_without_heading: bool = False
) -> dict[str, str]:
    """Section name -> its text, in report order; empty sections are left out.

    Headings are recognised from a fixed list and named by `headings.SECTION_NAMES`. Text before the first
    heading is "preamble"; a report without headings is all "findings". A section that occurs twice is joined
    by a newline.

    Args:
        report: the whole report; what Markdown and HTML left in it goes (`plain_text`).
        language: whose headings are looked for, one of `headings.LANGUAGES`.
        findings_without_heading: a report without findings, in which text goes on behind the paragraph of
            the last section before them ("COMPARISON: None.", an empty line, the findings), has them there.
    """
    report = plain_text(report)
    found = list(heading_pattern(language).finditer(report))
    if not found:
        return {DEFAULT_SECTION: report.strip()} if report.strip() else {}
    parts = [(PREAMBLE, report[: found[0].start()])]
    ends = [heading.start() for heading in found[1:]] + [len(report)]
    for heading, end in zip(found, ends, strict=True):
        written = heading[heading.lastgroup or 0]
        parts.append((headings(language)[plain(written)], report[heading.end() : end]))
    parts = [(name, text.strip()) for name, text in parts if text.strip()]
    if findings_without_heading:
        parts = _with_findings(parts)
    sections: dict[str, str] = {}
    for name, text in parts:
        sections[name] = f"{sections[name]}\n{text}" if name in sections else text
    return sections


def _with_findings(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The parts with the findings cut off the last section that stands before them."""
    names = [name for name, _ in parts]
    if DEFAULT_SECTION in names:
        return parts
    end = names.index("impression") if "impression" in names else len(names)
    last = max((number for number, name in enumerate(names[:end]) if name in _FRONT), default=None)
    if last is None:
        return parts
    name, text = parts[last]
    cut = _PARAGRAPH.search(text)
    if cut is None and name == "comparison":
        cut = _NO_COMPARISON.match(text)
        head = text[: cut.end()].strip() if cut else text
    else:
        head = text[: cut.start()].strip() if cut else text
    if cut is None or not text[cut.end() :].strip():
        return parts
    return [*parts[:last], (name, head), (DEFAULT_SECTION, text[cut.end() :].strip()), *parts[last + 1 :]]

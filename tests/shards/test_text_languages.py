"""Headings and sentences as other editors, markup and languages write them."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.text.headings import LANGUAGES, SECTION_NAMES, headings
from shards.text.sections import plain_text, split_sections
from shards.text.sentences import split_sentences

CLEAR = {"findings": "Clear.", "impression": "Normal."}


@pytest.mark.parametrize(
    "report",
    [
        "FINDINGS\r\nClear.\r\nIMPRESSION\r\nNormal.\r\n",
        "FINDINGS\rClear.\rIMPRESSION\rNormal.",
        "Findings\r\n\r\nClear.\r\n\r\nImpression\r\n\r\nNormal.",
        "FINDINGS：Clear.\nImpression： Normal.",
        "FINDINGS :- Clear.\nIMPRESSION:-Normal.",
        "**FINDINGS:** Clear.\n**IMPRESSION:** Normal.",
        "**Findings**: Clear.\n\n__Impression__: Normal.",
        "**Findings**\n\nClear.\n\n***Impression***\n\nNormal.",
        "*Findings:* Clear.\n*Impression:* Normal.",
        "# Findings\n\nClear.\n\n## impression\n\nNormal.",
        "### FINDINGS:\nClear.\n### Impression: Normal.",
        "[FINDINGS] Clear.\n[Impression]: Normal.",
        "<b>FINDINGS:</b>&nbsp;Clear.<br><b>IMPRESSION:</b> Normal.",
        "<p><strong>Findings</strong></p><p>Clear.</p><h2>Impression</h2><div>Normal.</div>",
        "<div class='x'>FINDINGS:<br/>Clear.<BR />IMPRESSION:&#160;Normal.</div>",
        "\ufeffFINDINGS: Clear.\u2028IMPRESSION: Normal.",
        "\u00a0FINDINGS:\u00a0Clear.\n\u00a0IMPRESSION\u00a0:\u00a0Normal.",
    ],
)
def test_headings_of_other_editors(report: str) -> None:
    assert split_sections(report) == CLEAR


@pytest.mark.parametrize("language", LANGUAGES)
def test_letters_that_ignoring_case_takes_for_those_of_a_heading(language: str) -> None:
    others = "\u0131\u0130\u017f\u212a\u212b"  # dotless i, dotted I, long s, the signs kelvin and angstrom
    pairs = [
        (letter, other) for other in others for letter in "iska" if re.match(letter, other, re.IGNORECASE)
    ]
    assert len(pairs) >= 4
    for heading, section in headings(language).items():
        for letter, other in pairs:
            assert split_sections(f"{heading.replace(letter, other)}: Clear.", language) == {
                section: "Clear."
            }


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Nodule <5 mm, effusion >2 cm", "Nodule <5 mm, effusion >2 cm"),
        ("Seen by ___ and __ on ___.", "Seen by ___ and __ on ___."),
        ("* no effusion\n* no edema", "* no effusion\n* no edema"),
        ("3*4 cm and 2*2 cm; a_b_c", "3*4 cm and 2*2 cm; a_b_c"),
        ("nodule &lt;5 mm &amp; scar", "nodule <5 mm & scar"),
        ("S&P; AT&T", "S&P; AT&T"),
        ("**No** effusion", "No effusion"),
        ("lungs<br>clear", "lungs\nclear"),
        ("<!-- draft -->Clear", "Clear"),
    ],
)
def test_only_markup_goes(text: str, plain: str) -> None:
    assert plain_text(text) == plain


@given(st.text(alphabet="ab _*<>&;#\n", max_size=40))
def test_plain_text_never_loses_a_word(text: str) -> None:
    # "<a>" and "<b ...>" are tags; everything else that is a letter stays.
    letters = [character for character in text if character in "ab"]
    kept = [character for character in plain_text(text) if character in "ab"]
    assert kept == letters or "<" in text


MIMIC = (
    "FINAL REPORT\n INDICATION:  ___ with cough\n\n COMPARISON:  None.\n\n Lungs are clear.\n\n No effusion."
)


@pytest.mark.parametrize(
    ("report", "findings", "comparison"),
    [
        (MIMIC, "Lungs are clear.\n\n No effusion.", "None."),
        (MIMIC + "\n\n IMPRESSION:  Normal.", "Lungs are clear.\n\n No effusion.", "None."),
        ("COMPARISON: None. Lungs are clear.\nIMPRESSION: Normal.", "Lungs are clear.", "None."),
        ("COMPARISON: ___.\n\nLungs are clear.", "Lungs are clear.", "___."),
        ("COMPARISON: No prior films. Clear.", "Clear.", "No prior films."),
        ("COMPARISON: none\n\nTECHNIQUE: PA\n\nClear.", "Clear.", "none"),
        ("COMPARISON: Chest film of ___.\nIMPRESSION: Normal.\n\nNo effusion.", None, "Chest film of ___."),
        ("COMPARISON: None.\n\nFINDINGS: Clear.", "Clear.", "None."),
    ],
)
def test_findings_behind_the_comparison(report: str, findings: str | None, comparison: str) -> None:
    sections = split_sections(report, findings_without_heading=True)
    assert (sections.get("findings"), sections.get("comparison")) == (findings, comparison)
    words = "".join(" ".join(split_sections(report).values()).split())
    assert "".join(" ".join(sections.values()).split()) == words


def test_findings_behind_the_comparison_stay_there_unasked() -> None:
    assert split_sections(MIMIC)["comparison"].endswith("No effusion.")


@pytest.mark.parametrize(
    ("language", "report"),
    [
        ("es", "HALLAZGOS: Clear.\nIMPRESIÓN DIAGNÓSTICA: Normal."),
        ("es", "Hallazgos\nClear.\nConclusion: Normal."),
        ("de", "Befund: Clear.\nBEURTEILUNG: Normal."),
        ("de", "BEFUND\r\nClear.\r\nZusammenfassung\r\nNormal."),
        ("fr", "RÉSULTATS : Clear.\nCONCLUSION : Normal."),
        ("fr", "Resultat\u00a0: Clear. Synthese\u00a0: Normal."),
        ("pt", "ANÁLISE: Clear.\nIMPRESSÃO: Normal."),
        ("pt", "Achados: Clear. CONCLUSAO: Normal."),
        ("zh", "影像所见：Clear.\n诊断意见：Normal."),
        ("zh", "【检查所见】Clear.【诊断】"),
        ("ja", "【所見】\nClear.\n【診断】\nNormal."),
        ("ja", "所見\nClear.\n結論\nNormal."),
    ],
)
def test_headings_of_each_language(language: str, report: str) -> None:
    for form in (report, unicodedata.normalize("NFD", report)):
        sections = split_sections(form, language)
        assert sections["findings"].startswith("Clear.")
        assert "【诊断】" in report or sections["impression"] == "Normal."


def test_a_heading_behind_a_sentence_without_space() -> None:
    assert split_sections("所见：双肺清晰。诊断：正常。", "zh") == {
        "findings": "双肺清晰。",
        "impression": "正常。",
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_heading_opens_its_section(language: str) -> None:
    for heading, name in headings(language).items():
        assert name in SECTION_NAMES
        written = f"{heading.upper()}:\nx y"
        assert split_sections(written, language) == {name: "x y"}, heading


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("双肺清晰。心影不大！有无积液？", ["双肺清晰。", "心影不大！", "有无积液？"]),
        ("結節は２．５ｃｍ。胸水なし｡異常なし．", ["結節は２．５ｃｍ。", "胸水なし｡", "異常なし．"]),
        ("「異常なし。」心拡大。", ["「異常なし。」", "心拡大。"]),
        ("1、双肺清晰\n2、心影不大", ["1、双肺清晰", "2、心影不大"]),
        ("①双肺清晰②", ["①双肺清晰②"]),
        ("Fraktur der 5. Rippe li. Unterlappen frei.", ["Fraktur der 5. Rippe li. Unterlappen frei."]),
        ("V.a. Erguss, z.B. links. Herz normal.", ["V.a. Erguss, z.B. links.", "Herz normal."]),
        ("Voraufnahme vom 3. Mai. Kein Erguss.", ["Voraufnahme vom 3. Mai.", "Kein Erguss."]),
        ("Herd ca. 3 cm. Sonst frei.", ["Herd ca. 3 cm.", "Sonst frei."]),
        ("Known lung CA. No change.", ["Known lung CA.", "No change."]),
        ("Revisado por la Dra. Paz. Sin derrame.", ["Revisado por la Dra. Paz.", "Sin derrame."]),
        ("Sin derrame.Índice normal.", ["Sin derrame.", "Índice normal."]),
    ],
)  # fmt: skip
def test_sentences_of_other_languages(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences

"""Sections, sentences and MGCA's cleaning of reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medvlp.data.report import mgca_sentences
from shards.text.sections import plain_text, split_sections
from shards.text.sentences import split_sentences

#: Pieces out of which hypothesis writes reports.
PIECES = st.sampled_from(
    ["The heart", "normal.", "2.5 cm", "Dr.", "a.m.", "1.", "2)", "XXXX", "XXXX.", "\n", "\n\n", "NO PTX.",
     ".", "...", "?", "clear.Heart", "- ", "(stable).", "é", "___", "FINDINGS:", "Impression:", "T. spine"]
)  # fmt: skip
REPORTS = st.lists(PIECES, max_size=30).map(" ".join) | st.text(max_size=80)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A nodule of 2.5 cm. No effusion.", ["A nodule of 2.5 cm.", "No effusion."]),
        ("Discussed with Dr. Smith at 10 a.m. by phone.", ["Discussed with Dr. Smith at 10 a.m. by phone."]),
        ("Seen at 10 a.m. No change.", ["Seen at 10 a.m.", "No change."]),
        ("1. Mild edema.  2. Small effusion.", ["1. Mild edema.", "2. Small effusion."]),
        ("1) Edema\n2) Effusion\n- Nodule", ["1) Edema", "2) Effusion", "- Nodule"]),
        ("1.No PTX.2.Lines ok", ["1.No PTX.", "2.Lines ok"]),
        ("XXXX XXXX. There is XXXX. Stable.", ["XXXX XXXX.", "There is XXXX.", "Stable."]),
        ("Seen by ___. Stable.", ["Seen by ___.", "Stable."]),
        ("HEART IS NORMAL. LUNGS ARE CLEAR.", ["HEART IS NORMAL.", "LUNGS ARE CLEAR."]),
        ("The lungs\nare clear. no effusion.", ["The lungs are clear.", "no effusion."]),
        ("Lungs clear\n\nHeart normal", ["Lungs clear", "Heart normal"]),
        ("Heart is normal.Lungs are clear.", ["Heart is normal.", "Lungs are clear."]),
        ("Stable since 2010. New nodule?  Yes!", ["Stable since 2010.", "New nodule?", "Yes!"]),
        ("A 3 mm. nodule in the T. spine. .", ["A 3 mm. nodule in the T. spine. ."]),
        ("(No change.) Clear.", ["(No change.)", "Clear."]),
        ("  ", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@settings(max_examples=50)
@given(REPORTS)
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in sentences)


def test_sections_by_heading_at_line_start_in_capitals_and_in_running_text() -> None:
    report = "CHEST FILM\nINDICATION: cough\nFindings: Clear.\nLUNGS: no nodule.\n\nIMPRESSION\nNormal."
    assert split_sections(report) == {
        "preamble": "CHEST FILM",
        "indication": "cough",
        "findings": "Clear.\nLUNGS: no nodule.",
        "impression": "Normal.",
    }
    flat = "FINDINGS: Clear. Comparison: None. IMPRESSION: Normal. The history: long."
    assert split_sections(flat) == {
        "findings": "Clear.",
        "comparison": "None.",
        "impression": "Normal. The history: long.",
    }


@pytest.mark.parametrize(
    ("report", "sections"),
    [
        (
            "FINDINGS:\nFRONTAL VIEW: Normal heart.\nLATERAL VIEW: Blunted angle.\nIMPRESSION: Effusion.",
            {
                "findings": "FRONTAL VIEW: Normal heart.\nLATERAL VIEW: Blunted angle.",
                "impression": "Effusion.",
            },
        ),
        ("CHEST PA AND LATERAL VIEWS: Clear.", {"findings": "CHEST PA AND LATERAL VIEWS: Clear."}),
        ("FINDINGS: 2 VIEWS: Clear.", {"findings": "2 VIEWS: Clear."}),
        ("FINDINGS: As on the PRIOR STUDY: large.", {"findings": "As on the PRIOR STUDY: large."}),
        (
            "FINDINGS: Smaller than at the LAST EXAM: 3 cm.",
            {"findings": "Smaller than at the LAST EXAM: 3 cm."},
        ),
        # Headings nevertheless: behind a word that is not in capitals, a sentence, a wide gap.
        ("HISTORY: cough EXAM: PA VIEWS: 2", {"history": "cough", "examination": "PA VIEWS: 2"}),
        ("FINDINGS: CLEAR. VIEWS: TWO", {"findings": "CLEAR.", "technique": "TWO"}),
        ("HISTORY: COUGH  EXAM: PA", {"history": "COUGH", "examination": "PA"}),
        ("COMPARISON: NONE FINDINGS: CLEAR", {"comparison": "NONE", "findings": "CLEAR"}),
    ],
)
def test_the_end_of_a_longer_label_is_no_heading(report: str, sections: dict[str, str]) -> None:
    assert split_sections(report) == sections


def test_sections_of_free_text_repeated_headings_and_aliases() -> None:
    assert split_sections(" Lungs are clear. ") == {"findings": "Lungs are clear."}
    assert split_sections("\n ") == {}
    assert split_sections("FINDINGS: a\nREASON FOR EXAM: b\nFINDINGS: c\nCONCLUSION:") == {
        "findings": "a\nc",
        "indication": "b",
    }


@settings(max_examples=50)
@given(REPORTS)
@example("__0__")
def test_sections_keep_all_text_but_headings(report: str) -> None:
    sections = split_sections(report)
    assert all(text.strip() == text != "" for text in sections.values())
    kept = "".join("".join(sections.values()).split())
    # Emphasis of Markdown ("__so__") goes by design.
    without_headings = plain_text(report).replace("FINDINGS:", " ").replace("Impression:", " ")
    assert len(kept) >= len("".join(without_headings.split()))


def test_mgca_cleaning_equals_golden(golden_dir: Path) -> None:
    files = sorted(golden_dir.glob("mgca_text_cleaning*.json"))
    assert files
    for file in files:
        golden = json.loads(file.read_text())
        for number, report in enumerate(golden["reports"]):
            sentences = mgca_sentences(report["impression"], report["findings"])
            assert sentences == golden["kept"].get(str(number)), f"report {number} of {file}"
            if sentences is not None:
                assert " ".join(sentences) == golden["caption"][str(number)]

"""Sections of MIMIC-CXR's reports, on synthetic ones that have the traps of the real ones."""

import pytest

from shards.text.mimic_sections import _NO_READING, _RANGES, _WHOLE_SECTIONS, mimic_sections, section_name

REPORT = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough  // acute process?

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  ___

 FINDINGS: 
 
 The lungs are clear.  Heart size is
 normal.
 
 IMPRESSION: 
 
 No acute process in ___.
"""


def report(text: str, study: str = "s50000001") -> dict[str, str]:
    return mimic_sections(text, study)


def test_a_regular_report() -> None:
    assert report(REPORT) == {
        "examination": "CHEST (PA AND LAT)",
        "indication": "___F with cough  // acute process?",
        "technique": "Chest PA and lateral",
        "comparison": "___",
        "findings": "The lungs are clear.  Heart size is\n normal.",
        "impression": "No acute process in ___.",
    }
    assert report(REPORT.replace("\n", "\r\n")) == report(REPORT)


def test_a_preamble_is_kept_without_its_title() -> None:
    text = "         FINAL REPORT\n PORTABLE CHEST OF ___\n \n COMPARISON:  ___.\n \n IMPRESSION:  Stable.\n"
    assert report(text) == {
        "preamble": "PORTABLE CHEST OF ___",
        "comparison": "___.",
        "impression": "Stable.",
    }


def test_an_addendum_stands_before_the_report() -> None:
    text = (
        "                     FINAL ADDENDUM\n ADDENDUM:  Seen by ___.\n \n"
        " ______________________________________________________________________________\n"
        "                     FINAL REPORT\n INDICATION:  Pain.\n \n FINDINGS:  Clear lungs.\n"
    )
    assert report(text) == {"addendum": "Seen by ___.", "indication": "Pain.", "findings": "Clear lungs."}


def test_of_two_findings_the_first_is_empty_and_the_last_is_taken() -> None:
    text = (
        " FINAL REPORT\n FINDINGS:  \n \n COMPARISON:  None.\n \n FINDINGS:  Clear.\n IMPRESSON:  Normal.\n"
    )
    assert report(text) == {"comparison": "None.", "findings": "Clear.", "impression": "Normal."}
    twice = " FINAL REPORT\n IMPRESSION:  First.\n \n IMPRESSION:  Second.\n"
    assert report(twice) == {"impression": "Second."}


def test_a_title_of_the_examination_opens_the_findings_unless_it_is_empty() -> None:
    text = " FINAL REPORT\n CHEST, PA LATERAL:  \n \n INDICATION:  Fall.\n \n FINDINGS:  No fracture.\n"
    assert report(text) == {"indication": "Fall.", "findings": "No fracture."}
    text = " FINAL REPORT\n INDICATION:  Fall.\n \n PORTABLE AP CHEST RADIOGRAPH:  No fracture.\n"
    assert report(text) == {"indication": "Fall.", "findings": "No fracture."}


def test_the_next_heading_is_looked_for_from_the_next_line_on() -> None:
    text = " FINAL REPORT\n EXAMINATION: CHEST: PA and lateral\n FINDINGS:  Clear.\n"
    assert report(text) == {"examination": "CHEST: PA and lateral", "findings": "Clear."}


def test_headings_have_a_space_before_them_and_capitals() -> None:
    text = " FINAL REPORT\n FINDINGS:  Clear.\nTECHNIQUE: none\n Lungs: clear\n HEART2: normal\n"
    assert set(report(text)) == {"findings"}


def test_without_a_reading_the_last_paragraph_is_cut_off() -> None:
    text = " FINAL REPORT\n HISTORY:  Chest pain.\n \n The lungs are clear.\n \n No edema.\n"
    assert report(text) == {"history": "Chest pain.", "last_paragraph": "The lungs are clear.\n \n No edema."}
    assert report(" FINAL REPORT\n HISTORY:  Chest pain.\n") == {"history": "Chest pain."}


def test_a_report_without_headings_is_whole() -> None:
    assert report("The lungs are clear.\n") == {"full report": "The lungs are clear."}
    text = "                 FINAL REPORT\n Portable chest.\n \n The lungs are clear.\n"
    assert report(text) == {"full report": "Portable chest.", "last_paragraph": "The lungs are clear."}
    assert report("") == {}
    assert report(" \n \n ") == {}


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("IMPRESSION", "impression"), ("CONCLUSION", "impression"), ("FINDINGS AND IMPRESSION", "impression"),
        ("IMPERSSION", "impression"), ("NDICATION", "impression"), ("FINDINGS/ IMPRESSION", "impression"),
        ("FINDING", "findings"), ("CHEST, TWO VIEWS", "findings"), ("FINDNGS", "findings"),
        ("REASON FOR EXAM", "indication"), ("PFI", "history"), ("CLINICAL INFORMATION", "history"),
        ("COMPARISIONS", "comparison"), ("REFERENCE EXAM", "comparison"),
        ("TYPE OF EXAMINATION", "examination"),
        ("RECOMMENDATION(S)", "recommendations"), ("WETREAD", "wet read"), ("TECHNIQUE", "technique"),
        ("PRELIMINARY IMPRESSION", "impression"), ("COMPARISON STUDY", "comparison"),
        ("BRIEF HISTORY", "history"), ("SUPINE PORTABLE", "findings"),
        ("LATERAL AND AP RADIOGRAPHS", "findings"),
        ("RIGHT RIBS", "findings"), ("NOTIFICATION", "notification"), ("DOSE", "dose"),
    ],
)  # fmt: skip
def test_headings_have_one_name_in_all_spellings(heading: str, name: str) -> None:
    assert section_name(heading) == name


def test_irregular_studies_have_their_reading_under_another_heading() -> None:
    text = " FINAL REPORT\n INDICATION:  Cough.\n RECOMMENDATIONS:  Clear lungs.\n IMPRESSION:  See above.\n"
    assert report(text, "s50913680") == {"indication": "Cough.", "findings": "Clear lungs."}
    assert report(text, "50913680") == report(text, "s50913680")
    assert report(text, "s57936451")["findings"] == "Cough."
    assert report(text)["impression"] == "See above."


def test_irregular_studies_have_a_range_of_characters_of_the_file_as_it_is() -> None:
    text = "".join(f"{n:04d}" for n in range(300))
    assert report(text, "s56579911") == {"findings": text[59:218]}
    # Line ends of two characters count as one.
    lines = "\r\n".join("abcdefghi" for _ in range(40))
    assert report(lines, "s56579911")["findings"] == lines.replace("\r\n", "\n")[59:218].strip()


def test_studies_without_a_reading_have_none() -> None:
    assert "findings" not in report(" FINAL REPORT\n FINDINGS:  Dictated elsewhere.\n", "s58235663")


def test_all_irregular_studies_are_known() -> None:
    assert (len(_WHOLE_SECTIONS), len(_RANGES), len(_NO_READING)) == (23, 23, 8)
    assert len({*_WHOLE_SECTIONS, *_RANGES, *_NO_READING}) == 54
    assert all(len(number) == 8 and number.startswith("5") for number in {*_WHOLE_SECTIONS, *_RANGES})

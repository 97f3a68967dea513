"""Reports of a folder of DICOM files: text files by name, tables, and what lacks one."""

import json
from pathlib import Path

import pytest

from shards.entities.extractor import check_language
from shards.errors import DataError
from shards.sources.dicom import DicomOptions, DicomSource
from tests.fixtures import dicom_folder as fixture
from tests.fixtures.archive import write_table
from tests.fixtures.dicom_folder import outcome, reports


def test_a_table_of_reports_stands_in_for_text_files(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "root")
    rows = [("1.2.1", "Hallazgos: Normal.\nImpresión: Sin cambios."), ("1.2.99", "De nadie.")]
    table = write_table(tmp_path / "reports.csv", "StudyInstanceUID,report", rows)
    source = DicomSource(DicomOptions(root=root, reports=table, language="es"))
    studies, _ = outcome(source)
    expected = {"findings": "Normal.", "impression": "Sin cambios."}
    assert studies["1"].sections == studies["2"].sections == expected
    assert studies["3"].sections == {}
    assert "reports.csv: 1 rows are about no record of the archive" in source.remarks()
    with pytest.raises(DataError, match="language: es"):
        check_language(source.arguments)
    write_table(table, "StudyInstanceUID,report", [rows[0], rows[0]])
    with pytest.raises(DataError, match=r"reports\.csv: what line 2 is about stands in another line too"):
        DicomSource(DicomOptions(root=root, reports=table))
    with pytest.raises(DataError, match=r"has no none\.csv"):
        DicomSource(DicomOptions(root=root, reports=tmp_path / "none.csv"))


def test_one_report_above_two_studies_is_nobodys(tmp_path: Path) -> None:
    root = fixture.write(tmp_path)
    (root / "b" / "report.txt").write_text("Whose?")
    (root / "b" / "1.2.2.TXT").unlink()
    studies, reasons = outcome(DicomSource(DicomOptions(root=root)))
    assert "3" not in studies
    assert any("lies above files of several studies" in reason for reason in reasons.values())
    assert studies["4"].sections == {"findings": "No effusion."}  # named like its image


def test_images_without_a_report_in_the_table_are_told(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "root")
    rows = [("1.2.1", "Normal."), ("1.2.2", ""), ("1.2.3", "nan")]
    table = write_table(tmp_path / "reports.csv", "StudyInstanceUID,report", rows)
    excluded = tmp_path / "excluded.txt"
    excluded.write_text("1.2.3\n")
    for lists, empty in (([], 2), ([excluded], 1)):
        source = DicomSource(DicomOptions(root=root, reports=table, exclude=lists))
        outcome(source)
        assert source.take_notes() == {  # of images in the dataset: 1.2.4 is a CT slice, 1.2.6 has no patient
            "images have no row in the table of --reports": 2,
            "images have an empty report in the table of --reports": empty,
        }
        assert not any("--reports" in line for line in source.remarks())


def test_an_empty_text_file_in_place_of_a_report_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(fixture.image(1, "1.2.1", "P1"))
    (tmp_path / "a.txt").write_text("\n")
    source = DicomSource(DicomOptions(root=tmp_path))
    assert outcome(source)[0]["1"].sections == {}
    assert source.take_notes() == {"images have an empty text file in place of a report": 1}


def test_the_table_that_is_named_is_read_whatever_lies_in_folders_beside_it(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "root")
    (tmp_path / "old").mkdir()
    for folder, report in ((tmp_path, "Findings: New."), (tmp_path / "old", "Findings: Old.")):
        write_table(folder / "reports.csv", "StudyInstanceUID,report", [("1.2.1", report)])
    source = DicomSource(DicomOptions(root=root, reports=tmp_path / "reports.csv"))
    assert outcome(source)[0]["1"].sections == {"findings": "New."}
    (tmp_path / "reports.csv").unlink()
    with pytest.raises(DataError, match=r"has no reports\.csv"):
        DicomSource(DicomOptions(root=root, reports=tmp_path / "reports.csv"))


@pytest.mark.parametrize("name", ["reports.csv", "reports.jsonl"])
def test_a_signature_in_a_report_is_no_row_of_the_table(name: str, tmp_path: Path) -> None:
    root, table = tmp_path / "root", tmp_path / name
    root.mkdir()
    for number in (1, 2):
        (root / f"{number}.dcm").write_bytes(fixture.image(number, f"1.2.{number}", f"P{number}"))
    report = "Clear.\nDOE,JOHN,MD"
    if name.endswith(".csv"):
        table.write_text(
            f'StudyInstanceUID,acc,report\n1.2.1,A,"{report}"\n1.2.2,B,"{report}"\n', encoding="utf-8"
        )
    else:
        lines = [{"StudyInstanceUID": f"1.2.{number}", "report": report} for number in (1, 2)]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = DicomSource(DicomOptions(root=root, reports=table))
    sections = [study.sections for study in outcome(source)[0].values()]
    assert sections == [{"findings": report}] * 2


def test_a_name_of_a_uid_has_no_ending_that_could_be_cut(tmp_path: Path) -> None:
    images = {"1.2.8": fixture.image(1, "1.3.1", "P1"), "1.2.8.1": fixture.image(2, "1.3.2", "P2")}
    texts = {"1.2.8.txt": "Findings: First.", "1.2.8.1.txt": "Findings: Second."}
    assert reports(tmp_path, images, texts) == {"P1": {"findings": "First."}, "P2": {"findings": "Second."}}
    (tmp_path / "1.2.8.1.txt").unlink()
    assert reports(tmp_path, {}, {}) == {"P1": {"findings": "First."}, "P2": {}}


@pytest.mark.parametrize("name", ["1.2.5.2", "1.2.5", "1.2.5.dcm"])
def test_the_report_of_a_study_is_no_other_images_by_its_name(name: str, tmp_path: Path) -> None:
    images = {"first": fixture.image(1, "1.2.5", "P1"), name: fixture.image(2, "1.2.6", "P2")}
    texts = {"1.2.5.txt": "Findings: First."}
    assert reports(tmp_path, images, texts) == {"P1": {"findings": "First."}, "P2": {}}


def test_a_text_named_like_images_of_two_studies_is_nobodys(tmp_path: Path) -> None:
    images = {"IM1.dcm": fixture.image(1, "1.2.5", "P1"), "IM1.ima": fixture.image(2, "1.2.6", "P2")}
    assert reports(tmp_path, images, {"im1.txt": "Whose?"}) == {}
    _, reasons = outcome(DicomSource(DicomOptions(root=tmp_path)))
    assert len(reasons) == 2
    assert all("named like images of several studies" in reason for reason in reasons.values())
    (tmp_path / "IM1.ima").write_bytes(fixture.image(2, "1.2.5", "P1"))
    studies, _ = outcome(DicomSource(DicomOptions(root=tmp_path)))
    assert [bool(study.sections) for study in studies.values()] == [True, True]

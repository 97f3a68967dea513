"""A folder of DICOM files: headers, reports by study, what is passed over and what is rejected."""

import errno
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launcher.main import app
from shards.archives.files import ArchiveFiles
from shards.dicom import read_dicom
from shards.errors import DataError
from shards.reader import ShardReader
from shards.sources.dicom import DicomOptions, DicomSource
from shards.verify import verify
from tests.fixtures import dicom
from tests.fixtures import dicom_folder as fixture
from tests.fixtures.archive import film
from tests.fixtures.dicom_folder import outcome, reports


@pytest.fixture
def source(tmp_path: Path) -> DicomSource:
    return DicomSource(DicomOptions(root=fixture.write(tmp_path / "root")))


def test_patients_studies_views_and_reports(source: DicomSource) -> None:
    studies, _ = outcome(source)
    assert {number: (s.patient_id, s.study_id, s.view) for number, s in studies.items()} == {
        "1": ("P1", "1.2.1", "PA"),
        "2": ("P1", "1.2.1", "LL"),
        "3": ("P2", "1.2.2", "AP"),
        "4": ("P2", "1.2.3", "PA"),
        "8": ("P5", "1.2.7", "PA"),
        "9": ("P6", "1.2.8", "PA"),
    }
    report = {"findings": "Clear lungs.", "impression": "Normal."}
    assert studies["1"].sections == studies["2"].sections == report
    assert studies["1"].sentences == ["Clear lungs.", "Normal."]
    assert studies["3"].sections == {"impression": "Opacité à gauche."}
    assert studies["4"].sections == {"findings": "No effusion."}
    assert studies["8"].sections == studies["9"].sections == {}
    assert [studies[n].extra["age"] for n in "124"] == [61, 1, None]
    assert [studies[n].extra["sex"] for n in "124"] == ["F", "", ""]
    assert studies["1"].license == "not stated"
    assert source.take_notes() == {
        "reports are not UTF-8 and were read as Latin-1": 1,
        "images have no report beside them": 2,  # not the CT slice, the copy, or what cannot be read
    }


def test_what_is_rejected_left_out_and_passed_over(source: DicomSource) -> None:
    _, reasons = outcome(source)
    assert sorted(reasons.values()) == [
        "DICOM file: an earlier row is about the same image",
        "DICOM file: no patient",
        "DICOM file: not a DICOM file",
        "pixels of a DICOM file (Explicit VR Little Endian) cannot be decoded",
    ]
    assert source.remarks() == [
        "1 records left out: a modality that --modality does not name",
        "2 files that are no DICOM images were passed over",
        "1 text files are the report of no DICOM file by their names",
    ]


def test_a_file_that_the_system_refuses_costs_itself_only(
    source: DicomSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, refused = ArchiveFiles.listed, []

    def without_one(files: ArchiveFiles, path: str) -> object:
        if not refused and path.endswith(".dcm"):
            refused.append(path)
            raise DataError("file cannot be looked for: Permission denied")
        return listed(files, path)

    monkeypatch.setattr(ArchiveFiles, "listed", without_one)
    again = DicomSource(DicomOptions(root=tmp_path / "root"))
    monkeypatch.undo()
    assert len(again) == len(source)
    assert "DICOM file: file cannot be looked for: Permission denied" in outcome(again)[1].values()


def test_other_modalities_on_request(tmp_path: Path) -> None:
    root = fixture.write(tmp_path)
    studies, _ = outcome(DicomSource(DicomOptions(root=root, modality=["CT"], license="CC BY 4.0")))
    assert list(studies) == ["5"]
    assert studies["5"].license == "CC BY 4.0"


@pytest.mark.parametrize("byte_order", ["utf-16-le", "utf-16-be"])
def test_a_report_of_a_windows_editor_is_read_by_its_mark(byte_order: str, tmp_path: Path) -> None:
    root = fixture.write(tmp_path)
    (root / "b" / "1.2.2.TXT").write_bytes("\ufeffImpression: Opacité à gauche.".encode(byte_order))
    source = DicomSource(DicomOptions(root=root))
    assert outcome(source)[0]["3"].sections == {"impression": "Opacité à gauche."}
    (root / "b" / "1.2.2.TXT").write_bytes("Impression: Opacité à gauche.".encode(byte_order))  # and no mark
    assert "the text file with its report is no text" in str(outcome(source)[1])
    assert not any("Latin-1" in note for note in source.take_notes())


def test_one_report_above_two_studies_is_nobodys(tmp_path: Path) -> None:
    root = fixture.write(tmp_path)
    (root / "b" / "report.txt").write_text("Whose?")
    (root / "b" / "1.2.2.TXT").unlink()
    studies, reasons = outcome(DicomSource(DicomOptions(root=root)))
    assert "3" not in studies
    assert any("lies above files of several studies" in reason for reason in reasons.values())
    assert studies["4"].sections == {"findings": "No effusion."}  # named like its image


@pytest.mark.parametrize("first", ["A/IM1.dcm", "p1.zip"])
def test_images_of_one_name_in_a_zip_and_elsewhere_are_all_read(first: str, tmp_path: Path) -> None:
    images = [fixture.image(1, "1.2.1", "P1"), fixture.image(2, "1.2.2", "P2")]
    texts = ["Findings: First.", "Findings: Second."]
    (tmp_path / "A").mkdir()
    if first.endswith(".zip"):
        packed(tmp_path / first, {"A/IM1.dcm": images[0], "A/IM1.txt": texts[0].encode()})
    else:
        (tmp_path / first).write_bytes(images[0])
        (tmp_path / "A" / "IM1.txt").write_text(texts[0])
    packed(tmp_path / "p2.zip", {"IM1.dcm": images[1], "IM1.txt": texts[1].encode()})
    assert reports(tmp_path, {}, {}) == {"P1": {"findings": "First."}, "P2": {"findings": "Second."}}


def packed(path: Path, members: dict[str, bytes]) -> None:
    """A zip of these members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("is_zip", [True, False])
def test_names_with_backslashes_are_read(is_zip: bool, tmp_path: Path) -> None:
    image, name = fixture.image(1, "1.2.1", "P1"), "A\\IM1.dcm"
    if is_zip:
        packed(tmp_path / "old.zip", {name: image, "A\\1.2.1.txt": b"Findings: First."})
        assert reports(tmp_path, {}, {}) == {"P1": {"findings": "First."}}
    else:
        assert reports(tmp_path, {name: image}, {}) == {"P1": {}}


def test_films_are_turned_as_they_hang_or_kept_as_stored(tmp_path: Path) -> None:
    data = fixture.image(1, "1.2.1", "P1", PatientOrientation=["R", "F"])
    (tmp_path / "a.dcm").write_bytes(data)
    (tmp_path / "report.txt").write_text("Clear.")
    stored = read_dicom(data, turn=False).pixels
    for as_stored, expected in ((False, stored[:, ::-1]), (True, stored)):
        source = DicomSource(DicomOptions(root=tmp_path, as_stored=as_stored))
        np.testing.assert_array_equal(source.load(0)[0].image, expected)
        assert list(source.take_notes().values()) == [1]


@pytest.mark.parametrize(
    "fields",
    [
        {"PresentationIntentType": "FOR PROCESSING"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1.1", "Modality": "DX"},
    ],
)
def test_raw_values_of_a_detector_are_left_out_and_told(fields: dict[str, str], tmp_path: Path) -> None:
    shown = {"PresentationIntentType": "FOR PRESENTATION"}
    for number, more in ((1, shown), (2, fields)):
        (tmp_path / f"{number}.dcm").write_bytes(fixture.image(number, "1.2.1", "P1", **more))
    source = DicomSource(DicomOptions(root=tmp_path))
    assert list(outcome(source)[0]) == ["1"]
    assert "1 records left out: FOR PROCESSING, which --raw takes" in source.remarks()
    assert list(outcome(DicomSource(DicomOptions(root=tmp_path, raw=True)))[0]) == ["1", "2"]


def test_films_with_padding_or_a_window_that_does_not_fit_are_told(tmp_path: Path) -> None:
    for number, fields in enumerate(
        [{"PixelPaddingValue": 16}, {"WindowCenter": 32768, "WindowWidth": 65536}]
    ):
        pixels = np.maximum(film(number).astype(np.uint16) * 16, 16)
        data = dicom.write(pixels, bits=12, PatientID="P", SOPInstanceUID=f"1.{number}", **fields)
        (tmp_path / f"{number}.dcm").write_bytes(data)
    (tmp_path / "report.txt").write_text("Clear.")
    source = DicomSource(DicomOptions(root=tmp_path))
    for number in range(2):
        source.load(number)
    assert list(source.take_notes().values()) == [1, 1]
    assert source.take_notes() == {}


def test_a_linked_folder_is_read_and_one_that_cannot_be_listed_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = tmp_path / "root", tmp_path / "disk2"
    for folder, number in ((root / "x", 1), (other, 2)):
        folder.mkdir(parents=True)
        (folder / "a.dcm").write_bytes(fixture.image(number, f"1.2.{number}", f"P{number}"))
    (root / "linked").symlink_to(other)
    (other / "back").symlink_to(root)
    assert reports(root, {}, {}) == {"P1": {}, "P2": {}}
    scandir = os.scandir

    def failing(path: Path) -> object:
        if Path(path).name == "x":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(DataError, match=r"a folder below .*root cannot be listed \(Input/output error\)"):
        DicomSource(DicomOptions(root=root))


def test_companions_of_macos_are_passed_over(tmp_path: Path) -> None:
    companion = b"\0\5\x16\7" + bytes(78)
    for name in ("._old.zip", "._a.dcm"):
        (tmp_path / name).write_bytes(companion)
    members = {"a.dcm": fixture.image(1, "1.2.1", "P1"), "__MACOSX/._a.dcm": companion}
    packed(tmp_path / "a.zip", members)
    studies, reasons = outcome(DicomSource(DicomOptions(root=tmp_path)))
    assert list(studies) == ["1"]
    assert reasons == {}


def test_a_study_of_two_patients_is_rejected(tmp_path: Path) -> None:
    root = fixture.write(tmp_path)
    (root / "f" / "other.dcm").write_bytes(fixture.image(6, "1.2.7", "P9"))
    studies, reasons = outcome(DicomSource(DicomOptions(root=root)))
    assert "8" not in studies
    mixed = [reason for reason in reasons.values() if "also that of another patient" in reason]
    assert len(mixed) == 2


def test_a_file_that_changes_meanwhile_is_rejected(source: DicomSource, tmp_path: Path) -> None:
    (tmp_path / "root" / "f" / "bare.dcm").write_bytes(fixture.image(8, "1.2.7", "P7"))
    studies, reasons = outcome(source)
    assert "8" not in studies
    assert any("than when the build began" in reason for reason in reasons.values())


def test_lists_name_patients_studies_or_images(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "root")
    (tmp_path / "out.txt").write_text("P2\n1.2.7\n1.9.1\n")
    studies, _ = outcome(DicomSource(DicomOptions(root=root, exclude=[tmp_path / "out.txt"])))
    assert sorted(studies) == ["2", "9"]
    (tmp_path / "test.txt").write_text("P1\n")
    source = DicomSource(DicomOptions(root=root, split_list=[f"test={tmp_path / 'test.txt'}"]))
    assert {study.split for study in outcome(source)[0].values()} == {"test"}


def test_a_zip_is_read_like_the_folder_and_workers_get_the_same(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "root")
    for odd in (root / "g").iterdir():  # a zip holds no such name
        odd.rename(root / "g" / "odd.dcm")
    expected = outcome(DicomSource(DicomOptions(root=root)))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(root.rglob("*")):
            packed.write(path, path.relative_to(root))
    zipped = DicomSource(DicomOptions(root=tmp_path / "packed.zip"))
    for found in (outcome(zipped), outcome(pickle.loads(pickle.dumps(zipped)))):
        assert found[0].keys() == expected[0].keys()
        assert sorted(found[1].values()) == sorted(expected[1].values())
        assert {n: s.sections for n, s in found[0].items()} == {n: s.sections for n, s in expected[0].items()}
    (tmp_path / "packed.zip").rename(root / "one.zip")
    with pytest.raises(DataError, match="two files below --root have one path"):
        DicomSource(DicomOptions(root=root))


def test_it_builds_with_hashed_ids_and_says_nothing_of_anybody(tmp_path: Path) -> None:
    root, out = fixture.write(tmp_path / "root"), tmp_path / "out"
    words = ["--root", root, "--out", out, "--image-size", 64, "--workers", 1, "--max-rejected", 1,
             "--hash-ids", "--modality", "CR", "--modality", "DX"]  # fmt: skip
    (tmp_path / "key").write_bytes(b"k" * 32)
    words += ["--hash-key", tmp_path / "key"]
    result = CliRunner().invoke(app, ["shards", "build", "dicom", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert verify(out, 1) == []
    assert sum(shard.samples for shard in ShardReader(out).index.shards) == 6
    said = result.output + (out / "rejected.jsonl").read_text() + (out / "index.json").read_text()
    for word in ("P1", "Planted", "1.2.1", "nobody.dcm", "Clear lungs"):
        assert word not in said


def test_options_that_cannot_be(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "root")
    with pytest.raises(DataError, match="--language xx: choose"):
        DicomSource(DicomOptions(root=root, language="xx"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no records of DICOM files"):
        DicomSource(DicomOptions(root=tmp_path / "none"))


@pytest.mark.shared
def test_the_real_files(shared: Path) -> None:
    source = DicomSource(DicomOptions(root=shared / "data" / "dicom"))
    studies = [source.load(i)[0] for i in range(len(source))]
    assert [(study.view, study.image.shape, study.extra["sex"], study.extra["age"]) for study in studies] == [
        ("PA", (1955, 1841), "F", None),
        ("PA", (1024, 1024), "M", 62),
    ]
    assert len({study.patient_id for study in studies}) == 2
    films = [read_dicom(path.read_bytes()) for path in sorted((shared / "data" / "dicom").glob("*.dcm"))]
    for study, film_ in zip(studies, films, strict=True):
        assert (study.image == film_.pixels).all()

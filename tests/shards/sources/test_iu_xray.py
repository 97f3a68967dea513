"""Indiana University chest X-rays: the three forms, sections, headings, views, ids; the real reports."""

import json
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.iu_xray import IuOptions, IuSource
from tests.fixtures import dicom
from tests.fixtures import iu_xray as fixture
from tests.fixtures.archive import film, write_film


def opened(root: Path, form: str = "xml") -> IuSource:
    """The source of one form of the archive."""
    write = {"xml": fixture.write, **fixture.FORMS}[form]
    return IuSource(IuOptions(root=write(root).root))


@pytest.mark.parametrize("form", ["xml", "csv"])
def test_sections_headings_and_films(form: str, tmp_path: Path) -> None:
    source = opened(tmp_path, form)
    studies = [source.load(i)[0] for i in range(6)]
    assert [study.study_id for study in studies] == ["CXR9001"] * 2 + ["CXR9002", "CXR9003"] + ["CXR9005"] * 2
    assert [study.patient_id for study in studies] == [study.study_id for study in studies]
    assert studies[0].sections == studies[1].sections == {
        "comparison": "None.",
        "indication": "XXXX-year-old with cough",
        "findings": "Heart size is > normal. No effusion.",
        "impression": "Mild cardiomegaly.",
    }  # fmt: skip
    assert studies[0].sentences[-2:] == ["No effusion.", "Mild cardiomegaly."]
    assert studies[2].sections == {"indication": "Pain", "impression": "No acute disease."}
    assert studies[3].sections == {}
    assert all((study.image == film(number)).all() for number, study in enumerate(studies))
    positive = [{name for name, value in study.labels.items() if value} for study in studies]
    assert positive == [
        {"Cardiomegaly", "Pulmonary Disease, Chronic Obstructive"},
        {"Cardiomegaly", "Pulmonary Disease, Chronic Obstructive"},
        {"normal"},
        set(),
        {"Pleural Effusion", "Opacity"},
        {"Pleural Effusion", "Opacity"},
    ]
    assert studies[2].labels["Cardiomegaly"] == 0
    assert set(studies[3].labels.values()) == {None}  # not indexed
    assert studies[4].extra["mesh"][1] == "Lung/hypoinflation"


@pytest.mark.parametrize(
    ("terms", "present", "unknown"),
    [
        (["Cardiac Shadow/enlarged/mild"], {"Cardiomegaly"}, set()),
        (["Cardiac Shadow/mild/enlarged", "Lung/hypoinflation"], {"Cardiomegaly"}, set()),
        (["Cardiac Shadow/prominent"], set(), {"Cardiomegaly"}),
        (["Heart Atria/enlarged"], set(), {"Cardiomegaly"}),
        (["Heart Atria/enlarged", "Cardiomegaly/mild"], {"Cardiomegaly"}, set()),
        (["Hydropneumothorax/left"], {"Pneumothorax", "Pleural Effusion"}, set()),
        (["Pulmonary Emphysema"], {"Emphysema", "Pulmonary Emphysema"}, set()),
        (["Emphysema"], {"Emphysema"}, {"Pulmonary Emphysema"}),
        (["Calcified Granuloma/lung"], {"Granuloma", "Calcified Granuloma"}, set()),
        (["Aorta/enlarged"], set(), set()),
    ],
)
def test_a_finding_that_a_term_says_in_other_words_is_not_absent(
    terms: list[str], present: set[str], unknown: set[str], tmp_path: Path
) -> None:
    path = fixture.write(tmp_path).root / "ecgen-radiology" / "9002.xml"
    told = "".join(f"<major>{term}</major>" for term in terms)
    path.write_text(path.read_text().replace("<major>normal</major>", told))
    labels = IuSource(IuOptions(root=tmp_path)).load(2)[0].labels
    assert {name for name, value in labels.items() if value == 1} == present
    assert {name for name, value in labels.items() if value is None} == unknown
    assert len(labels) == 30


def test_views_are_kaggles_and_may_stand_beside_the_xml(tmp_path: Path) -> None:
    views = ["FRONTAL", "LATERAL", "FRONTAL", "FRONTAL", "FRONTAL", "FRONTAL"]
    table = opened(tmp_path / "csv", "csv")
    assert [table.load(i)[0].view for i in range(6)] == views
    bare = opened(tmp_path / "bare")
    assert [bare.load(i)[0].view for i in range(6)] == [""] * 6
    (tmp_path / "csv" / "indiana_projections.csv").rename(tmp_path / "bare" / "indiana_projections.csv")
    beside = IuSource(IuOptions(root=tmp_path / "bare"))
    assert [beside.load(i)[0].view for i in range(6)] == views


def test_views_are_those_of_the_original_dicom_files_where_they_are_there(tmp_path: Path) -> None:
    source = opened(tmp_path)
    folder = tmp_path / "NLMCXR_dcm" / "9001"
    folder.mkdir(parents=True)
    (folder / "9001_IM-9001-3001.dcm").write_bytes(dicom.saved(dicom.header(ViewPosition="AP")))
    (folder / "9001_IM-9001-4001.dcm").write_bytes(b"damaged")
    assert source.load(0)[0].view == "AP"
    assert source.load(2)[0].view == ""
    with pytest.raises(RejectedRecord, match="not a DICOM file"):
        source.load(1)


def test_r2gen_has_findings_and_a_split_of_reports(tmp_path: Path) -> None:
    source = opened(tmp_path, "r2gen")
    studies = [source.load(i)[0] for i in range(7)]
    assert [study.sections for study in studies[:3]] == [
        {"findings": "Heart size is normal . No effusion ."},
        {"findings": "Heart size is normal . No effusion ."},
        {"findings": "Effusion ."},
    ]
    assert [study.split for study in studies] == ["train"] * 2 + ["valid"] * 2 + ["test"] * 3
    assert studies[2].study_id == "CXR9005"
    assert studies[0].labels == {}
    assert (studies[1].image == film(51)).all()
    counts = {count.name: (count.published, count.found) for count in source.published_counts()}
    assert counts == {
        "train images": (4_138, 2),
        "valid images": (592, 2),
        "test images": (1_180, 4),
        "reports": (2_955, 4),
    }


@pytest.mark.parametrize(
    ("form", "ids"),
    [
        ("xml", ["CXR9002", "9003.xml", "CXR9001_9001_IM-9001-4001.png", "9005_IM-9005-1001.dcm.png"]),
        ("csv", ["CXR9002", "9003", "CXR9001_IM-9001-4001", "9005_IM-9005-1001.dcm.png"]),
        ("r2gen", ["9005", "CXR9002_IM-9002/1.png"]),
    ],
)
def test_lists_may_name_reports_and_films_in_any_form(form: str, ids: list[str], tmp_path: Path) -> None:
    whole = opened(tmp_path / "root", form)
    (tmp_path / "out.txt").write_text("\n".join(ids))
    rest = IuSource(IuOptions(root=tmp_path / "root", exclude=[tmp_path / "out.txt"]))
    out = 3 if form == "r2gen" else 4
    assert len(rest) == len(whole) - out
    assert rest.remarks()[0] == f"{out} records left out: --exclude"


def test_a_missing_film_is_rejected(tmp_path: Path) -> None:
    for form, record, line in (("xml", 6, 1), ("csv", 6, 8), ("r2gen", 7, 2)):
        with pytest.raises(RejectedRecord, match="does not exist") as error:
            opened(tmp_path / form, form).load(record)
        assert error.value.line == line


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "not well-formed XML"),
        (lambda text: "\x00" + text, "not well-formed XML"),
        (lambda text: text.replace("eCitation", "other"), "its root is not eCitation"),
        (lambda text: text.replace("uId id", "uId other"), "it has no uId"),
        (lambda text: text.replace('"FINDINGS"', '"IMPRESSION"'), "unknown Label, or one twice"),
        (lambda text: text.replace("parentImage id", "parentImage other"), "a parentImage has no id"),
        (
            lambda text: text.replace("?>", '?><!DOCTYPE x [<!ENTITY a "aaaa">]>', 1).replace("None.", "&a;"),
            "document type",
        ),
    ],
)
def test_a_damaged_report_is_rejected_by_its_file(damage: object, reason: str, tmp_path: Path) -> None:
    assert callable(damage)
    opened(tmp_path)
    path = tmp_path / "ecgen-radiology" / "9001.xml"
    path.write_text(damage(path.read_text()))
    source = IuSource(IuOptions(root=tmp_path))
    with pytest.raises(RejectedRecord, match=reason) as error:
        source.load(0)
    assert error.value.reason.startswith("9001.xml: ")
    assert "effusion" not in error.value.reason
    assert source.load(1)[0].study_id == "CXR9002"


def test_two_forms_in_one_folder_are_not_guessed(tmp_path: Path) -> None:
    fixture.write(tmp_path)
    fixture.write_r2gen(tmp_path)
    with pytest.raises(DataError, match="--form r2gen, or --form xml or csv"):
        IuSource(IuOptions(root=tmp_path))
    assert len(IuSource(IuOptions(root=tmp_path, form="r2gen"))) == 8
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no report ecgen-radiology/\*\.xml .* get it from https://openi"):
        IuSource(IuOptions(root=tmp_path / "none"))


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"split": "test"}, "'split' is not train"),
        ({"image_path": "[CXR1/0.png"}, "'image_path' is no list of paths"),
        ({"image_path": [0]}, "'image_path' is no list of paths"),
        ({"report": ""}, "no 'id' or no 'report'"),
    ],
)
def test_a_wrong_item_of_the_annotation_is_rejected(
    item: dict[str, object], reason: str, tmp_path: Path
) -> None:
    opened(tmp_path, "r2gen")
    path = tmp_path / "annotation.json"
    annotation = json.loads(path.read_text())
    annotation["train"][0] |= item
    path.write_text(json.dumps(annotation))
    source = IuSource(IuOptions(root=tmp_path))
    with pytest.raises(RejectedRecord, match=reason) as error:
        source.load(0)
    assert error.value.reason.startswith("annotation.json (train): ")


@pytest.mark.shared
def test_the_real_reports_in_the_form_of_openi(shared: Path, tmp_path: Path) -> None:
    lines = (shared / "data" / "reports" / "reports.jsonl").read_text().splitlines()
    reports = {report["id"]: report for report in map(json.loads, lines)}
    (tmp_path / "ecgen-radiology").mkdir()
    for uid, report in reports.items():
        number = int(uid.removeprefix("CXR"))
        names = ("comparison", "indication", "findings", "impression")
        texts = {name.upper(): report[name] or "" for name in names}
        text = fixture.xml(number, texts, report["mesh_major"], [])
        images = "".join(f'<parentImage id="{image}"/>' for image in report["images"])
        path = tmp_path / "ecgen-radiology" / f"{number}.xml"
        path.write_text(text.replace("</eCitation>", f"{images}</eCitation>"))
    for name in reports["CXR1"]["images"] + reports["CXR2"]["images"]:
        write_film(tmp_path / "NLMCXR_png" / f"{name}.png", 0)
    source = IuSource(IuOptions(root=tmp_path, strict=True))  # all counts are the published ones
    assert len(source) == 7_470
    loaded = 0
    for i in range(40):
        try:
            study = source.load(i)[0]
        except RejectedRecord:
            continue
        report = reports[study.study_id]
        expected = {name: " ".join(report[name].split()) for name in study.sections}
        assert study.sections == expected
        assert study.extra["mesh"] == report["mesh_major"]
        loaded += 1
    assert loaded >= 2

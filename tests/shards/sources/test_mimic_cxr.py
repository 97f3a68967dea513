"""MIMIC-CXR: reports, labels, splits, and what RadGraph, MS-CXR and Chest ImaGenome add."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError, UsageError
from shards.sample import StoredImage, to_sample
from shards.sources.base import RejectedRecord
from shards.sources.mimic_cxr import MimicOptions, MimicSource
from shards.study import Box, Entity, Phrase, Study
from tests.fixtures import mimic_cxr as fixture
from tests.fixtures.archive import Archive, write_table
from tests.shards.test_table import samples
from tests.shards.toy_data import build


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return fixture.write(tmp_path)


def opened(archive: Archive, **options: Any) -> MimicSource:
    return MimicSource(MimicOptions(root=archive.root, **options))


def studies(source: MimicSource) -> dict[str, Study]:
    """The good images by study and view."""
    found = {}
    for i in range(len(source)):
        try:
            (study,) = source.load(i)
        except RejectedRecord:
            continue
        found[f"{study.study_id} {study.view}"] = study
    return found


def test_sections(archive: Archive) -> None:
    found = studies(opened(archive))
    assert found["50000001 PA"].sections == {
        "examination": "CHEST (PA AND LAT)",
        "indication": "___F with cough.",
        "findings": "The lungs are clear.  Heart size is\n normal.",
        "impression": "No acute process.",
    }
    assert found["50000001 LATERAL"].sections == found["50000001 PA"].sections
    assert found["50000002 AP"].sections == {"full report": "The lungs are clear."}
    assert found["50000003 AP"].sections == {
        "addendum": "Seen by ___.",
        "comparison": "___.",
        "findings": "Small effusion.",
        "impression": "Effusion.",
    }
    assert found["50913680 AP"].sections == {"indication": "Fall.", "findings": "Right apical pneumothorax."}
    assert found["50000003 AP"].sentences[-2:] == ["Small effusion.", "Effusion."]


def test_labels_patients_and_splits(archive: Archive) -> None:
    source = opened(archive)
    found = studies(source)
    labels = {
        name: {finding: value for finding, value in study.labels.items() if value is not None}
        for name, study in found.items()
    }
    assert labels == {
        "50000001 PA": {"No Finding": 1},
        "50000001 LATERAL": {"No Finding": 1},
        "50000002 AP": {"Cardiomegaly": -1},
        "50000003 AP": {},  # a study without labels
        "50913680 AP": {"Pleural Effusion": 0, "Pneumothorax": 1},
        "50000005 PA": {},
        "50000006 PA": {"Edema": 1},
    }
    assert {name: (study.patient_id, study.split) for name, study in found.items()} == {
        "50000001 PA": ("10000001", "train"),
        "50000001 LATERAL": ("10000001", "train"),
        "50000002 AP": ("10000002", "valid"),
        "50000003 AP": ("10000003", "test"),
        "50913680 AP": ("11000004", "train"),
        "50000005 PA": ("11000005", "train"),
        "50000006 PA": ("11000006", "train"),
    }
    counts = {count.name: count.found for count in source.published_counts()}
    assert counts["train images"] == 6
    assert counts["rows of mimic-cxr-2.0.0-chexpert.csv"] == 6


def test_a_missing_report_is_rejected_and_none_at_all_is_said_at_once(
    archive: Archive, tmp_path: Path
) -> None:
    source = opened(archive)
    with pytest.raises(RejectedRecord, match="report does not exist") as error:
        source.load(7)
    assert error.value.line == 9
    assert len(studies(opened(archive, no_reports=True))) == 8
    with pytest.raises(UsageError, match="--no-reports reads none of --reports"):
        opened(archive, no_reports=True, reports=archive.root)
    for report in archive.root.rglob("*.txt"):
        report.unlink()
    with pytest.raises(DataError, match=r"none of the reports .* get it from https.*mimic-cxr-reports\.zip"):
        opened(archive)


def test_reports_may_lie_in_their_own_zip(archive: Archive, tmp_path: Path) -> None:
    expected = studies(opened(archive))["50000001 PA"].sections
    with zipfile.ZipFile(tmp_path / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for report in archive.root.rglob("*.txt"):
            packed.write(report, report.relative_to(archive.root))
            report.unlink()
    source = opened(archive, reports=tmp_path / "mimic-cxr-reports.zip")
    assert studies(source)["50000001 PA"].sections == expected


def test_frontal_views_only(archive: Archive) -> None:
    source = opened(archive, views="frontal")
    assert len(source) == 7
    assert "1 records left out: neither PA nor AP" in source.remarks()
    assert {count.name: count.found for count in source.published_counts()}["all images"] == 8


def test_other_labels(archive: Archive) -> None:
    table = next(table for table in archive.tables if "chexpert" in table.name)
    shutil.copy(table, table.with_name(table.name.replace("chexpert", "negbio")))
    table.unlink()
    assert studies(opened(archive, labels="negbio"))["50000002 AP"].labels["Cardiomegaly"] == -1
    source = opened(archive, labels="none")
    assert source.label_names == []
    assert studies(source)["50000002 AP"].labels == {}
    with pytest.raises(DataError, match=r"no mimic-cxr-2\.0\.0-chexpert\.csv \(or \.gz\); get it from https"):
        opened(archive)


def test_labels_by_hand_take_the_place_of_others(archive: Archive) -> None:
    file = archive.root / "mimic-cxr-2.1.0-test-set-labeled.csv"
    write_table(file, "study_id,Airspace Opacity,Edema", [(50000003, "1.0", "0.0")])
    found = studies(opened(archive, manual_labels=True))
    by_hand = {name: value for name, value in found["50000003 AP"].labels.items() if value is not None}
    assert by_hand == {"Lung Opacity": 1, "Edema": 0}
    assert found["50000002 AP"].labels["Cardiomegaly"] == -1
    write_table(file, "study_id,Airspace", [(50000003, "1.0")])
    with pytest.raises(DataError, match="has a column for none of the 14 findings"):
        opened(archive, manual_labels=True)


def test_labels_by_hand_may_be_the_only_ones(archive: Archive, tmp_path: Path) -> None:
    """The build failed at its end: the labels were not in the index."""
    file = archive.root / "mimic-cxr-2.1.0-test-set-labeled.csv"
    write_table(file, "study_id,Airspace Opacity,Edema", [(50000003, "1.0", "0.0")])
    out = tmp_path / "out"
    build(opened(archive, labels="none", manual_labels=True), out)
    labels = [sample["labels"] for sample in samples(out).values()]
    assert [found["Lung Opacity"] for found in labels if found] == [1]


def test_ms_cxr_gives_phrases_with_boxes_and_its_patients_leave_train(archive: Archive) -> None:
    source = opened(archive, ms_cxr=archive.options["ms_cxr"])
    assert source.published_counts()[1].found == 6  # they are train images of the publication
    found = studies(source)
    assert found["50913680 AP"].phrases == [
        Phrase("right apical pneumothorax", (Box("Pneumothorax", 20.0, 30.0, 40.0, 50.0),)),
        Phrase(
            "bilateral effusions",
            (
                Box("Pleural Effusion", 5.0, 60.0, 20.0, 30.0),
                Box("Pleural Effusion", 50.0, 60.0, 20.0, 30.0),
            ),
        ),
    ]
    assert found["50000001 PA"].phrases == []
    splits = {name: study.split for name, study in found.items()}
    assert splits["50913680 AP"] == "ms_cxr"
    assert splits["50000003 AP"] == "test"


def test_chest_imagenome_gives_anatomy_and_takes_test_images_out_of_train(archive: Archive) -> None:
    source = opened(archive, imagenome=archive.options["imagenome"])
    found = studies(source)
    assert found["50000001 PA"].anatomy == [
        Box("left costophrenic angle", 50.0, 60.0, 20.0, 20.0, "left"),
        Box("right lung", -10.0, 5.0, 40.0, 85.0, "right"),
        Box("right atrium", 30.0, 40.0, 10.0, 15.0),
        Box("carina", 40.0, 20.0, 0.0, 0.0),
    ]
    stored = json.loads(to_sample(found["50000001 PA"], "key", StoredImage(96)).members["json"])
    # Clipped to the image, and what has no area is dropped; 8 pixels of padding on the left.
    assert {box["label"]: box["width"] for box in stored["anatomy"]} == {
        "left costophrenic angle": 20.0,
        "right lung": 30.0,
        "right atrium": 10.0,
    }
    assert found["50000005 PA"].split == "imagenome_gold"
    assert "50000006 PA" not in found  # test there, train here
    assert "1 records left out: test in one of MIMIC-CXR and Chest ImaGenome only" in source.remarks()
    assert found["50000001 LATERAL"].anatomy == []


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_list_does_not_bring_back_what_another_set_tests_on(
    split: str, archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(str(image[1]) for image in fixture.IMAGES))
    source = opened(archive, **archive.options, split_list=[f"{split}={tmp_path / 'ids.txt'}"])
    splits = {source.split_key(i): source.prescribed_split(i) for i in range(len(source))}
    assert splits["10000001"] == splits["10000003"] == split
    moved = ("ms_cxr", "imagenome_gold") if split != "test" else ("test", "test")
    assert (splits["11000004"], splits["11000005"]) == moved
    told = [line for line in source.remarks() if "which is tested on" in line]
    assert told == ([] if split == "test" else [
        f"1 records that --split-list has in train or valid stay in {name!r}, which is tested on"
        for name in ("imagenome_gold", "ms_cxr")
    ])  # fmt: skip


def test_a_share_of_train_is_not_mixed_into_the_official_valid(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--valid-share: 1 records are valid by the archive's own split"):
        opened(archive, valid_share=0.5)
    (tmp_path / "ids.txt").write_text("10000001\n")
    with pytest.raises(UsageError, match="--valid-share: --split-list names the splits"):
        opened(archive, valid_share=0.5, split_list=[f"train={tmp_path / 'ids.txt'}"])


def test_scene_graphs_may_lie_in_their_zip(archive: Archive) -> None:
    expected = studies(opened(archive, imagenome=archive.options["imagenome"]))["50000001 PA"].anatomy
    silver = archive.options["imagenome"] / "silver_dataset"
    with zipfile.ZipFile(silver / "scene_graph.zip", "w") as packed:
        for graph in (silver / "scene_graph").iterdir():
            packed.write(graph, graph.relative_to(silver))
    shutil.rmtree(silver / "scene_graph")
    found = studies(opened(archive, imagenome=archive.options["imagenome"]))
    assert found["50000001 PA"].anatomy == expected


def test_missing_scene_graphs_are_told_and_none_at_all_is_refused(archive: Archive) -> None:
    graphs = archive.options["imagenome"] / "silver_dataset" / "scene_graph"
    (graphs / f"{fixture.dicom(1)}_SceneGraph.json").unlink()
    source = opened(archive, imagenome=archive.options["imagenome"])
    assert studies(source)["50000001 PA"].anatomy == []
    assert source.take_notes() == {"images of Chest ImaGenome have no scene graph": 1}
    assert source.take_notes() == {}
    shutil.rmtree(graphs)
    with pytest.raises(DataError, match="has none of the scene graphs"):
        opened(archive, imagenome=archive.options["imagenome"])


def test_an_image_with_a_scene_graph_and_no_list_is_rejected(archive: Archive) -> None:
    """Whether it is a test image cannot be known."""
    table = archive.options["imagenome"] / "silver_dataset" / "splits" / "valid.csv"
    table.write_text(table.read_text().replace(fixture.dicom(3), fixture.dicom(2)))
    with pytest.raises(
        RejectedRecord, match=r"in none of train\.csv, valid\.csv, test\.csv and images_to_avoid"
    ):
        opened(archive, imagenome=archive.options["imagenome"]).load(2)


@pytest.mark.parametrize("text", ["{", "[]", '{"objects": [{}]}', '{"objects": [{"bbox_name": "svc"}]}'])
def test_a_broken_scene_graph_rejects_its_image(archive: Archive, text: str) -> None:
    silver = archive.options["imagenome"] / "silver_dataset"
    (silver / "scene_graph" / f"{fixture.dicom(1)}_SceneGraph.json").write_text(text)
    with pytest.raises(RejectedRecord, match="scene graph of the image"):
        opened(archive, imagenome=archive.options["imagenome"]).load(0)


def graph(observation: str) -> dict[str, Any]:
    nodes = {
        "1": {"tokens": observation, "label": "OBS-DP", "start_ix": 0, "relations": [["located_at", "2"]]},
        "2": {"tokens": "lung", "label": "ANAT-DP", "start_ix": 1, "relations": []},
    }
    return {"text": f"{observation} lung", "entities": nodes, "data_source": None, "data_split": "inference"}


def test_radgraph_gives_entities_by_study(archive: Archive, tmp_path: Path) -> None:
    file = tmp_path / "MIMIC-CXR_graphs.json"
    reports = {
        "p10/p10000001/s50000001.txt": graph("edema"),
        "p10/p10000002/s50000002.txt": graph("clear"),
        "p19/p19999999/s59999999.txt": graph("mass"),
    }
    file.write_text(json.dumps(reports))
    source = opened(archive, radgraph=file)
    found = studies(source)
    for view in ("PA", "LATERAL"):
        assert found[f"50000001 {view}"].entities == [Entity("lung", "edema", 1)]
    assert found["50000003 AP"].entities == []
    assert "MIMIC-CXR_graphs.json: 1 rows are about no record of the archive" in source.remarks()
    file.write_text(json.dumps(reports)[:-40])
    with pytest.raises(DataError, match=r"MIMIC-CXR_graphs\.json is not a JSON object of reports"):
        opened(archive, radgraph=file)
    doubled = json.dumps(reports)[:-1] + ', "s50000001": ' + json.dumps(graph("mass")) + "}"
    file.write_text(doubled)
    with pytest.raises(DataError, match=r"MIMIC-CXR_graphs\.json: what line 1 is about stands in another"):
        opened(archive, radgraph=file)


def test_a_build_with_another_radgraph_file_is_another_build(archive: Archive, tmp_path: Path) -> None:
    file = tmp_path / "MIMIC-CXR_graphs.json"
    arguments = []
    for observation in ("edema", "clear", "edema"):
        file.write_text(json.dumps({"p10/p10000001/s50000001.txt": graph(observation)}))
        arguments.append(opened(archive, radgraph=file).arguments)
    assert arguments[0] == arguments[2]
    assert arguments[0] != arguments[1]


def test_lists_name_patients_studies_and_images_in_any_form(archive: Archive, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    out.write_text(f"p10000001\ns50000002\n50913680\n{fixture.path(4)}\n")
    source = opened(archive, exclude=[out])
    assert {source.split_key(i) for i in range(len(source))} == {"11000005", "11000006", "11000007"}
    assert "5 records left out: --exclude" in source.remarks()


def test_an_image_without_a_split_is_rejected(archive: Archive) -> None:
    file = archive.root / "mimic-cxr-2.0.0-split.csv.gz"
    rows = [(fixture.dicom(n), 1, 1, "train") for n in range(2, 9)]
    write_table(file, "dicom_id,study_id,subject_id,split", rows)
    with pytest.raises(RejectedRecord, match=r"mimic-cxr-2\.0\.0-split\.csv has no row for the image"):
        opened(archive).load(0)


@pytest.mark.parametrize("word", ["trian", "a b", "", "../x"])
def test_a_split_that_is_none_rejects_its_image(archive: Archive, word: str) -> None:
    rows = [(fixture.dicom(n), 1, 1, word if n == 1 else "train") for n in range(1, 9)]
    write_table(archive.root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", rows)
    with pytest.raises(
        RejectedRecord, match=r"mimic-cxr-2\.0\.0-split\.csv\.gz: column 'split' holds no split"
    ):
        opened(archive).load(0)

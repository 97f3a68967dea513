"""CheXpert: labels in the file's order, paths, splits, and the 5x200 draws by rule and seed."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.chexpert import COMPETITION, CheXpertOptions, CheXpertSource, draw, five_by_200_pools
from tests.fixtures import chexpert as fixture
from tests.fixtures.archive import write_table
from tests.fixtures.chexpert import labels


@pytest.fixture
def source(tmp_path: Path) -> CheXpertSource:
    return CheXpertSource(CheXpertOptions(root=fixture.write(tmp_path).root))


def test_labels_studies_views_and_splits(source: CheXpertSource) -> None:
    first, lateral, second, unknown, opacity = (source.load(i)[0] for i in range(5))
    assert {name: value for name, value in first.labels.items() if value is not None} == {
        "Cardiomegaly": 1,
        "Edema": -1,
        "Pleural Effusion": 0,
        "Support Devices": 1,
    }
    assert lateral.labels == first.labels
    assert (first.study_id, lateral.study_id, second.study_id) == (
        "patient90009/study2",
        "patient90009/study2",
        "patient90009/study3",
    )
    assert {first.patient_id, lateral.patient_id, second.patient_id} == {"patient90009"}
    assert [study.view for study in (first, lateral, second, unknown)] == ["AP", "LATERAL", "PA", "LL"]
    # Lung Opacity comes before Lung Lesion in this file.
    assert {name for name, value in unknown.labels.items() if value} == {"Lung Lesion"}
    assert {name for name, value in opacity.labels.items() if value} == {"Lung Opacity"}
    assert (unknown.extra["sex"], unknown.extra["age"], opacity.extra["age"]) == ("", None, 90)
    assert first.image.shape == (72, 90)
    assert [source.prescribed_split(i) for i in range(8)] == ["train"] * 6 + ["valid"] * 2
    assert source.load(6)[0].labels["Atelectasis"] == 1


def test_a_missing_film_is_rejected_with_its_line(source: CheXpertSource) -> None:
    with pytest.raises(RejectedRecord, match="does not exist") as error:
        source.load(5)
    assert error.value.line == 7


def test_two_releases_below_the_root_are_refused(tmp_path: Path) -> None:
    fixture.write(tmp_path)
    (tmp_path / "CheXpert-v1.0").mkdir()
    (tmp_path / "CheXpert-v1.0" / "train.csv").write_bytes(
        (tmp_path / fixture.RELEASE / "train.csv").read_bytes()
    )
    with pytest.raises(DataError, match="are both there; let --root name one release"):
        CheXpertSource(CheXpertOptions(root=tmp_path))


@pytest.mark.parametrize("gzipped", [False, True])
def test_the_test_set_is_read_where_it_is_there(gzipped: bool, tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    header = ",".join(["Path", *fixture.HEADER.split(",")[5:]])
    path = "test/patient94741/study1/view1_frontal.jpg"
    write_table(root / fixture.RELEASE / "test_labels.csv", header, [(path, *labels(Edema="1.0"))])
    if gzipped:
        table = root / fixture.RELEASE / "test_labels.csv"
        table.with_name("test_labels.csv.gz").write_bytes(gzip.compress(table.read_bytes()))
        table.unlink()
    film = root / fixture.RELEASE / path
    film.parent.mkdir(parents=True)
    film.write_bytes((root / fixture.RELEASE / "train/patient90009/study2/view1_frontal.jpg").read_bytes())
    source = CheXpertSource(CheXpertOptions(root=root))
    assert source.prescribed_split(8) == "test"
    study = source.load(8)[0]
    assert (study.view, study.labels["Edema"], study.patient_id) == ("FRONTAL", 1, "patient94741")


def alone(name: str, number: int, **more: str) -> tuple[str, ...]:
    path = f"x/train/patient{number:05d}/study1/view1_frontal.jpg"
    return (path, "Male", "50", "Frontal", "AP", *labels(**{name.replace(" ", "_"): "1.0"} | more))


def test_the_pools_hold_images_of_one_class_alone(tmp_path: Path) -> None:
    rows = [
        alone("Edema", 1),
        alone("Edema", 2, Atelectasis="-1.0"),  # an uncertain class disqualifies
        alone("Edema", 3, Support_Devices="1.0"),
        alone("Edema", 4, Cardiomegaly="0.0", No_Finding="1.0"),  # No Finding is not asked
        alone("Lung Lesion", 5),
        alone("Cardiomegaly", 6),
        (*alone("Edema", 7)[:3], "Lateral", "", *labels(Edema="1.0")),
        (*alone("Edema", 8)[:5], *labels(Edema="-1.0")),
    ]
    root = fixture.write(tmp_path).root
    write_table(root / fixture.RELEASE / "train.csv", fixture.HEADER, rows)
    pools = five_by_200_pools(CheXpertSource(CheXpertOptions(root=root)).texts.table("train.csv", columns=[
        "Path", "Frontal/Lateral", *fixture.HEADER.split(",")[5:]
    ]))  # fmt: skip
    assert {name: [path.split("/")[1][-1] for path in pool] for name, pool in pools.items()} == {
        "Atelectasis": [],
        "Cardiomegaly": ["6"],
        "Consolidation": [],
        "Edema": ["1", "4"],
        "Pleural Effusion": [],
    }


def test_a_draw_depends_on_seed_and_class_alone() -> None:
    pool = [f"train/patient{n:05d}/study1/view1_frontal.jpg" for n in range(500)]
    chosen = draw(pool, "Edema", 0)
    assert len(set(chosen)) == 200
    assert draw(pool[::-1], "Edema", 0) == chosen
    assert len(set(chosen) & set(draw(pool, "Edema", 1))) < 120
    assert set(chosen) != set(draw(pool, "Consolidation", 0))


def test_drawn_patients_leave_the_training_split(tmp_path: Path) -> None:
    rows = [
        alone(name, 1000 * place + number)
        for place, name in enumerate(COMPETITION)
        for number in range(210)
    ]  # fmt: skip
    rows += [
        (row[0].replace("study1", "study2"), *row[1:5], *labels(Fracture="1.0")) for row in rows[:210]
    ]  # a second image of each patient of the first class
    root = fixture.write(tmp_path).root
    write_table(root / fixture.RELEASE / "train.csv", fixture.HEADER, rows)
    source = CheXpertSource(CheXpertOptions(root=root, five_by_200=2))
    splits: dict[str, set[str]] = {"train": set(), "five_by_200": set(), "valid": set()}
    for i in range(len(source)):
        splits[source.prescribed_split(i) or ""].add(source.split_key(i))
    assert not splits["train"] & splits["five_by_200"]
    assert len(splits["five_by_200"]) > 1000
    lists = [source.lists(i) for i in range(len(source))]
    for seed in range(2):
        members = [i for i, names in enumerate(lists) if f"5x200_{seed}" in names]
        assert len(members) == 1000
        assert {source.prescribed_split(i) for i in members} == {"five_by_200"}
    counts = {count.name: (count.published, count.found) for count in source.published_counts()}
    assert counts["5x200 Consolidation"] == (537, 210)
    assert counts["train images"] == (223_414, len(rows))


def test_a_pool_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.csv: 0 images of Atelectasis alone, 200 are drawn"):
        CheXpertSource(CheXpertOptions(root=fixture.write(tmp_path).root, five_by_200=1))

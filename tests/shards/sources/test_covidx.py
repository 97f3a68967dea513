"""COVIDx: names, classes, splits and sources of lists of several releases."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import DataError, UsageError
from shards.sources.base import RejectedRecord
from shards.sources.covidx import RELEASES, CovidxOptions, CovidxSource
from tests.fixtures import covidx as fixture
from tests.fixtures.archive import film, write_film

NORMAL = {"Normal": 1, "Pneumonia": 0, "COVID-19": 0}
PNEUMONIA = {"Normal": 0, "Pneumonia": 1, "COVID-19": 0}
COVID = {"Normal": 0, "Pneumonia": 0, "COVID-19": 1}


@pytest.fixture
def source(tmp_path: Path) -> CovidxSource:
    return CovidxSource(CovidxOptions(root=fixture.write(tmp_path).root))


def test_names_classes_sources_and_splits(source: CovidxSource) -> None:
    kept = [i for i in range(len(source)) if i not in (7, 8, 9)]
    films = [source.load(i)[0] for i in kept]
    assert [(film.patient_id, film.study_id, film.extra["origin"]) for film in films] == [
        ("11111111-2222-4333-8444-555555555555", "11111111-2222-4333-8444-555555555555.png", "rsna"),
        ("11111111-2222-4333-8444-666666666666", "11111111-2222-4333-8444-666666666666.png", "rsna"),
        ("77", "000001-6.png", "cohen"),
        ("78", "000001-6.jpg", "cohen"),
        ("COVID 12", "COVID(12).png", "sirm"),
        ("COVID13", "film of COVID (13).png", "sirm"),
        ("419639-900000", "MIDRC-RICORD-1C-419639-900000-00000-0.png", "ricord"),
        ("11111111-2222-4333-8444-777777777777", "11111111-2222-4333-8444-777777777777.png", ""),
        ("419639-900002", "MIDRC-RICORD-1C-419639-900002-00000-0.png", "ricord"),
        ("79", "pneumonia of 79.jpeg.jpg", ""),
    ]
    assert [film.labels for film in films] == [
        NORMAL, PNEUMONIA, COVID, PNEUMONIA, COVID, COVID, COVID, NORMAL, COVID, PNEUMONIA
    ]  # fmt: skip
    assert [source.prescribed_split(i) for i in kept] == ["train"] * 7 + ["test"] * 3
    assert (films[2].image == film(2)).all()
    assert (films[8].image == film(11)).all()


def test_unknown_classes_missing_films_and_train_films_of_test_patients_are_rejected(
    source: CovidxSource,
) -> None:
    for record, line, reason in (
        (7, 8, "with a class of normal, pneumonia, COVID-19"),
        (8, 9, "does not exist"),
        (9, 10, r"train_COVIDx9A\.txt: its patient is in the test list too"),
    ):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == line


def test_that_sources_tell_the_class_is_said(source: CovidxSource) -> None:
    # rsna and cohen have two classes each; sirm's two films and ricord's three have one.
    assert any(remark.startswith("5 films come from sources") for remark in source.remarks())


def test_numbers_are_compared_by_class(source: CovidxSource) -> None:
    counts = {count.name: (count.found, count.published) for count in source.published_counts()}
    assert counts["train images"] == (9, 30_130)
    assert counts["train COVID-19"] == (5, 16_490)
    assert counts["test pneumonia"] == (1, 100)


def test_films_that_are_not_there_can_be_left_out(tmp_path: Path) -> None:
    archive = fixture.write(tmp_path)
    source = CovidxSource(CovidxOptions(root=archive.root, only_present=True))
    assert len(source) == archive.samples + 2  # the other rejected lines stay
    assert "1 listed films are not there and were left out" in source.remarks()
    counts = {count.name: (count.found, count.published) for count in source.published_counts()}
    assert counts["train images"] == (8, 29_986)


@pytest.mark.parametrize(
    ("release", "classes", "labels"),
    [
        ("6", ("negative", "positive"), [{"COVID-19": 0}, {"COVID-19": 1}]),
        ("Sev", ("level1", "level2"), [{"Severity level 2": 0}, {"Severity level 2": 1}]),
    ],
)
def test_lists_of_two_classes(
    tmp_path: Path, release: str, classes: tuple[str, str], labels: list[dict[str, int]]
) -> None:
    for split in ("train", "test"):
        lines = [f"{split}{i} {split}{i}.png {name} ricord\n" for i, name in enumerate(classes)]
        (tmp_path / f"{split}_COVIDx{release}.txt").write_text("".join(lines))
        for i in range(2):
            write_film(tmp_path / split / f"{split}{i}.png", i)
    source = CovidxSource(CovidxOptions(root=tmp_path))
    assert [source.load(i)[0].labels for i in range(4)] == labels * 2


def test_kaggles_newest_release_has_a_valid_list(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        (tmp_path / f"{split}.txt").write_text(f"{number} {split}.png positive bimcv\n")
        write_film(tmp_path / split / f"{split}.png", number)
    source = CovidxSource(CovidxOptions(root=tmp_path))
    assert [source.prescribed_split(i) for i in range(3)] == ["train", "valid", "test"]
    assert source.load(1)[0].extra["release"] == "CXR-4"
    assert {count.name: count.published for count in source.published_counts()} == {
        "train images": 67_863, "valid images": 8_473, "test images": 8_482
    }  # fmt: skip


def test_lists_may_lie_elsewhere_and_of_several_one_is_named(tmp_path: Path) -> None:
    films, lists = fixture.write(tmp_path / "films").root, tmp_path / "lists"
    lists.mkdir()
    for split, text in (("train", fixture.TRAIN), ("test", fixture.TEST)):
        (films / f"{split}_COVIDx9A.txt").rename(lists / f"{split}_COVIDx9A.txt")
        (lists / f"{split}_COVIDx8A.txt").write_text(text)
    with pytest.raises(DataError, match="releases 8A, 9A are there; name one with --release"):
        CovidxSource(CovidxOptions(root=films, lists=lists))
    source = CovidxSource(CovidxOptions(root=films, lists=lists, release="9A"))
    assert source.load(4)[0].study_id == "COVID(12).png"
    with pytest.raises(UsageError, match=r"no release '9a'.*9A"):
        CovidxSource(CovidxOptions(root=films, lists=lists, release="9a"))
    with pytest.raises(DataError, match=r"train_COVIDx9A\.txt.*get it from"):
        CovidxSource(CovidxOptions(root=films))


def test_ids_of_lists_keep_the_ending(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "films").root
    (tmp_path / "some.txt").write_text("train/000001-6.jpg\n")
    source = CovidxSource(CovidxOptions(root=root, split_list=[f"part={tmp_path / 'some.txt'}"]))
    assert [source.lists(i) for i in range(5)] == [[], [], [], ["part"], []]


def test_words_that_two_films_fit_are_rejected(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    write_film(root / "train" / "12 COVID(12).png", 1)
    with pytest.raises(RejectedRecord, match="two films fit the words before the class") as error:
        CovidxSource(CovidxOptions(root=root)).load(4)
    assert error.value.line == 5


def test_every_published_list_has_its_sizes() -> None:
    assert {name: sum(release.sizes["train"]) for name, release in RELEASES.items()} == {
        "1": 16_546, "2": 13_569, "3": 13_670, "4": 13_898, "5": 13_958, "6": 14_311, "7A": 15_111,
        "7B": 15_464, "8A": 15_599, "8B": 15_952, "9A": 30_130, "9B": 30_482, "Sev": 759,
        "CXR-2": 29_986, "CXR-4": 67_863,
    }  # fmt: skip

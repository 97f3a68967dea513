"""ROCO: captions, articles, licences, and the leak of the official split."""

from pathlib import Path

import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.roco import RocoOptions, RocoSource
from shards.splits import split_of
from tests.fixtures import roco as fixture

FRACTIONS = {"train": 0.6, "valid": 0.2, "test": 0.2}


@pytest.fixture
def source(tmp_path: Path) -> RocoSource:
    return RocoSource(RocoOptions(root=fixture.write(tmp_path).root))


def test_captions_licences_and_articles(source: RocoSource) -> None:
    good = [i for i in range(len(source)) if i != 4]
    studies = [source.load(i)[0] for i in good]
    assert [study.study_id for study in studies] == [
        "ROCO_90001", "ROCO_90003", "ROCO_90004", "ROCO_90006", "ROCO_90002", "ROCO_90009",
        "ROCO_90005", "ROCO_90007",
    ]  # fmt: skip
    assert [study.sections["findings"] for study in studies] == [
        "Chest radiograph showing a left pleural effusion.",
        'The same chest "two days later", improved.',
        "Axial CT (arrow).",
        "Échographie hépatique – kyste.",
        "After drainage.",
        "Lateral view.",
        "After a year.",
        "Normal chest radiograph, without effusion.",
    ]
    assert [study.license for study in studies] == [
        "CC BY", "CC BY", "CC BY-NC-SA", RocoSource.facts.license, "CC BY", "CC BY-NC-ND",
        "CC BY", "CC BY",
    ]  # fmt: skip
    # Both ways of naming a file are found, each its own image.
    assert [study.image.shape[0] for study in studies] == [61, 62, 63, 64, 66, 67, 68, 69]


def test_images_of_an_article_share_a_split_by_default(source: RocoSource) -> None:
    of_one = [i for i in range(len(source)) if source.split_key(i) == "PMC9000001"]
    assert len(of_one) == 4
    assert {source.prescribed_split(i) for i in range(len(source))} == {None}
    assert len({split_of(source.split_key(i), FRACTIONS, "seed") for i in of_one}) == 1


def test_the_official_split_on_request(tmp_path: Path) -> None:
    source = RocoSource(RocoOptions(root=fixture.write(tmp_path).root, official_split=True))
    assert [source.prescribed_split(i) for i in range(9)] == ["train"] * 5 + ["valid"] * 2 + ["test"] * 2
    article = {source.prescribed_split(i) for i in range(9) if source.split_key(i) == "PMC9000001"}
    assert article == {"train", "valid", "test"}  # the leak


def test_an_image_that_was_never_found_is_rejected_and_all_are_counted(source: RocoSource) -> None:
    with pytest.raises(RejectedRecord, match="does not exist") as error:
        source.load(4)
    assert error.value.line == 6
    counts = {count.name: (count.published, count.found) for count in source.published_counts()}
    assert counts == {
        "all images": (81_807, 9),
        "official train": (65_448, 5),
        "official valid": (8_180, 2),
        "official test": (8_179, 2),
    }


def test_odd_lines_and_captions_of_no_image_are_told(tmp_path: Path) -> None:
    archive = fixture.write(tmp_path)
    captions = tmp_path / "data" / "test" / "radiology" / "captions.txt"
    captions.write_text("ROCO_90005 without a tab\nROCO_90007\t Normal.\nROCO_90099\t Of no image.\n")
    source = RocoSource(RocoOptions(root=archive.root))
    assert "test/captions.txt: 1 lines are not an id, a tab and a caption" in source.remarks()
    assert "test/captions.txt: 1 rows are about no record of the archive" in source.remarks()
    with pytest.raises(RejectedRecord, match=r"no line in captions\.txt"):
        source.load(7)


def test_captions_that_were_cut_off_within_a_line_are_refused(tmp_path: Path) -> None:
    archive = fixture.write(tmp_path)
    captions = tmp_path / "data" / "test" / "radiology" / "captions.txt"
    captions.write_bytes(captions.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"captions\.txt, line 2: the file ends within a line; get it again"):
        RocoSource(RocoOptions(root=archive.root))


def test_an_article_of_another_form_is_rejected_and_files_of_one_name_are_all_remembered(
    tmp_path: Path,
) -> None:
    archive = fixture.write(tmp_path)
    hashes = RocoSource(RocoOptions(root=archive.root)).arguments["files"]
    assert len(set(hashes.values())) == 6
    licences = tmp_path / "data" / "train" / "radiology" / "licences.txt"
    licences.write_text(licences.read_text().replace("PMC9000002_", "9000002_"))
    source = RocoSource(RocoOptions(root=archive.root))
    with pytest.raises(RejectedRecord, match="column 'PMC_ID' is no name like"):
        source.load(2)
    assert source.arguments["files"] != hashes

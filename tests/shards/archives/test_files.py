"""Files of an archive: folders and zips, any case, sizes before memory, paths that stay inside."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from shards.archives.files import ArchiveFiles, read_member
from shards.archives.texts import ArchiveTexts
from shards.errors import DataError

ORIGIN = "https://example.org/set"


def files(root: Path) -> ArchiveFiles:
    return ArchiveFiles(root, ORIGIN)


def put(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def packed(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_path_is_found_one_folder_deeper_in_any_case_and_with_gz(tmp_path: Path) -> None:
    put(tmp_path / "Release-1" / "Sub" / "Table.CSV.gz")
    assert files(tmp_path).get("sub/table.csv").name == "Table.CSV.gz"
    assert files(tmp_path).find("sub/table.csv") is None
    assert files(tmp_path).find("sub\\TABLE.csv.gz") is not None


def test_the_exact_name_wins_and_two_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.png", b"small")
    put(tmp_path / "A.png", b"large")
    assert files(tmp_path).read("A.png") == b"large"
    with pytest.raises(DataError, match="differ in upper and lower case"):
        files(tmp_path).read("a.PNG")
    packed(tmp_path / "z" / "x.zip", {"a.png": b"small", "A.png": b"large"})
    assert files(tmp_path / "z").read("a.png") == b"small"
    with pytest.raises(
        DataError, match=r"^x\.zip: several members differ in upper and lower case"
    ) as refused:
        files(tmp_path / "z").read("a.PNG")
    assert "a.PNG" not in str(refused.value)  # names of folders are those of patients in some archives


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "C:\\x", "a\0b"])
def test_a_path_that_leaves_the_archive_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves the archive"):
        files(tmp_path).read(path)


def test_what_is_missing_is_said_with_where_to_get_it_and_what_to_unpack(tmp_path: Path) -> None:
    put(tmp_path / "images_001.tar.gz")
    with pytest.raises(
        DataError, match=r"has no a\.csv or b\.csv \(or \.gz\); get it from https.*images_001"
    ):
        files(tmp_path).get("a.csv", "b.csv")
    with pytest.raises(DataError, match="neither a folder nor a zip file; get the archive from https"):
        files(tmp_path / "nowhere")


def test_many_folders_below_the_root_are_not_searched(tmp_path: Path) -> None:
    for number in range(70):
        put(tmp_path / f"patient{number}" / "a.csv")
    assert files(tmp_path).find("a.csv") is None
    assert files(tmp_path).find("patient3/a.csv") is not None


def test_zips_below_the_root_are_read_without_being_unpacked(tmp_path: Path) -> None:
    packed(tmp_path / "part0.zip", {"images/a.png": b"a" * 100_000, "top/deep/b.png": b"b"})
    packed(tmp_path / "part1.ZIP", {"images/c.png": b"c"})
    source = pickle.loads(pickle.dumps(files(tmp_path)))
    assert source.read("images/a.png") == b"a" * 100_000
    assert source.read("IMAGES/C.png") == b"c"
    assert source.read("deep/b.png") == b"b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part0.zip", "part1.ZIP"]
    assert list(source.names(".PNG")) == ["images/a.png", "top/deep/b.png", "images/c.png"]
    with pytest.raises(DataError, match="does not exist"):
        source.read("images/d.png")


def test_a_listed_path_is_that_file_and_no_other(tmp_path: Path) -> None:
    put(tmp_path / "A" / "a.png", b"deeper")
    packed(tmp_path / "x.zip", {"a.png": b"packed", "B\\a.png": b"windows", "../a.png": b"outside"})
    found = files(tmp_path)
    assert list(found.names(".png")) == ["A/a.png", "../a.png", "B/a.png", "a.png"]
    contents = [read_member(found.listed(name)) for name in ("A/a.png", "B/a.png", "a.png")]
    assert contents == [b"deeper", b"windows", b"packed"]
    assert found.read("B/a.png") == b"windows"
    with pytest.raises(DataError, match="leaves the archive"):
        found.listed("../a.png")
    (tmp_path / "A" / "a.png").unlink()
    with pytest.raises(DataError, match="file is gone"):
        found.listed("A/a.png")


def test_companions_of_macos_are_no_archives_and_no_hint(tmp_path: Path) -> None:
    for name in ("._x.zip", "._a.tar.gz", "a.tar.gz", "__MACOSX/b.png", "._c.png", "c.png"):
        put(tmp_path / name)
    assert list(files(tmp_path).names(".png")) == ["c.png"]
    with pytest.raises(DataError, match=r"\(if it is in a\.tar\.gz, unpack that\)"):
        files(tmp_path).get("b.csv")


def test_a_file_over_the_limit_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    os.truncate(put(tmp_path / "large.png"), 1 << 40)
    packed(tmp_path / "x.zip", {"bomb.png": bytes(1 << 21)})
    with pytest.raises(DataError, match="larger than the limit"):
        files(tmp_path).read("large.png")
    with pytest.raises(DataError, match="2,097,152 bytes is larger than the limit"):
        files(tmp_path).read("bomb.png", 1 << 20)


def test_a_zip_that_lies_about_a_size_is_found_out(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip", {"a.png": bytes(5000)})
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2") + 24
    assert struct.unpack_from("<L", data, place) == (5000,)
    struct.pack_into("<L", data, place, 10)
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged in its zip"):
        files(tmp_path).read("a.png")


def test_damaged_zips_are_named(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip", {"a.png": bytes(range(256)) * 40})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x\.zip is not a complete zip file"):
        files(tmp_path).read("a.png")
    damaged = bytearray(whole)
    damaged[60] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged in its zip"):
        files(tmp_path).read("a.png")


def test_a_path_that_cannot_be_looked_for_is_refused_without_being_said(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    files = ArchiveFiles(tmp_path, "example.org")
    for path in ("patient1" * 40 + ".jpg", "images/" + "patient1" * 40 + ".jpg", "patient1/" * 600):
        with pytest.raises(DataError, match=r"^file cannot be looked for: File name too long$"):
            files.read(path)


@pytest.mark.parametrize("place", [0, -1])
def test_a_zip_with_a_name_that_is_no_text_is_named(place: int, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\u00e9.txt", "text")
    name = "\u00e9.txt".encode()
    pieces = path.read_bytes().split(name)  # before the member's own name, and before the directory's
    assert len(pieces) == 3
    names = [name, name]
    names[place] = b"\xff" + name[1:]
    path.write_bytes(pieces[0] + names[0] + pieces[1] + names[1] + pieces[2])
    with pytest.raises(DataError, match=r"a\.zip is .*; download it again"):
        ArchiveFiles(path, "example.org").read("\u00e9.txt")


def test_half_a_surrogate_pair_is_no_name_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    assert ArchiveFiles(tmp_path / "a.zip", "example.org").find("a\ud800.txt") is None


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip", {"a.png": b"secret"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="encrypted") as refused:
        files(tmp_path).read("a.png")
    assert "a.png" not in str(refused.value)


def test_a_zip_that_is_replaced_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip", {"a.png": b"first", "b.png": b"second"})
    found = files(tmp_path)
    assert found.read("b.png") == b"second"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"x\.zip is damaged or has changed"):
        found.read("b.png")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="does not exist"):
        files(tmp_path).read("a.png")
    assert read_member(files(put(tmp_path / "b.png").parent).get("b.png"), 10) == b"content"


def test_latin_1_is_read_and_said_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    put(tmp_path / "old.csv", "name, note \nMüller,é\n".encode("latin-1"))
    put(tmp_path / "marked.csv", "\ufeffname,note\nMüller,nan\n".encode())
    texts = ArchiveTexts(files(tmp_path))
    assert [row.cells for row in texts.table("old.csv", columns=["name", "note"])] == [
        {"name": "Müller", "note": "é"}
    ]
    assert texts.remarks == ["old.csv is not UTF-8; it was read as Latin-1"]
    assert [row.cells for row in texts.table("marked.csv", columns=["name", "note"])] == [
        {"name": "Müller", "note": ""}
    ]
    assert texts.remarks == ["old.csv is not UTF-8; it was read as Latin-1"]
    assert set(texts.hashes) == {"old.csv", "marked.csv"}


def test_columns_are_checked_and_optional_ones_may_be_absent(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", b"image,Box [x,y]\na.png,1,2\n")
    texts = ArchiveTexts(files(tmp_path))
    (row,) = texts.table("a.csv", columns=["image", "Box [y]"], optional=["split", "Box [x]"])
    assert row.cells == {"image": "a.png", "Box [y]": "2", "Box [x]": "1", "split": ""}
    with pytest.raises(
        DataError, match=r"a\.csv, line 1: no column 'images' .*did you mean 'image'\?; get the"
    ):
        texts.table("a.csv", columns=["images"])


def test_json_lines_under_another_name_and_broken_json(tmp_path: Path) -> None:
    put(tmp_path / "a.json", b'{"path": "x", "Edema": 1.0}\n{"path": "y", "Edema": null}\n')
    put(tmp_path / "b.json", '\ufeff{"name": "é"}'.encode())
    texts = ArchiveTexts(files(tmp_path))
    rows = list(texts.table("a.json", kind=".jsonl", columns=["path", "Edema"]))
    assert [row.cells for row in rows] == [{"path": "x", "Edema": "1.0"}, {"path": "y", "Edema": ""}]
    assert texts.json("b.json") == {"name": "é"}
    with pytest.raises(DataError, match=r"a\.json: .*; get the file again from https"):
        texts.json("a.json")


def test_files_of_one_name_in_several_folders_are_all_remembered(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        put(tmp_path / folder / "ids.txt", f"{folder}\n".encode())
    texts = ArchiveTexts(files(tmp_path))
    assert [list(texts.lines(f"{folder}/ids.txt")) for folder in ("train", "test")] == [
        [(1, "train")],
        [(1, "test")],
    ]
    assert texts.hashes.keys() == {"train/ids.txt", "test/ids.txt"}


def test_a_list_that_ends_within_a_line_is_refused_where_the_original_does_not(tmp_path: Path) -> None:
    put(tmp_path / "ids.txt", b"one\ntw")
    texts = ArchiveTexts(files(tmp_path))
    assert list(texts.lines("ids.txt")) == [(1, "one"), (2, "tw")]
    with pytest.raises(DataError, match=r"ids\.txt, line 2: the file ends within a line; get it again from"):
        list(texts.lines("ids.txt", ended=True))

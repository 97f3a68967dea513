"""Records, joins on disk, and lists of ids."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from shards.archives.files import ArchiveFiles
from shards.archives.id_lists import IdLists, UserLists
from shards.archives.records import Join, Record, object_records
from shards.archives.texts import ArchiveTexts, Table
from shards.errors import DataError, UsageError
from shards.sources.base import RejectedRecord


def table(path: Path, text: str) -> Table:
    path.write_text(text)
    columns = text.splitlines()[0].split(",")
    return ArchiveTexts(ArchiveFiles(path.parent, "https://example.org")).table(path.name, columns=columns)


def record(**cells: str) -> Record:
    return Record("a.csv", 7, cells)


def test_cells_have_meaning_or_the_row_is_rejected_without_its_text() -> None:
    row = record(x="1.5", y="inf", label="-1.0", odd="Smith", w="-3", none="")
    assert (row.number("x"), row.label("label"), row.label("none"), row.text("odd")) == (
        1.5,
        -1,
        None,
        "Smith",
    )
    for read in (
        lambda: row.number("y"),
        lambda: row.number("odd"),
        lambda: row.label("odd"),
        lambda: row.text("none"),
        lambda: row.box("Mass", "x", "x", "w", "x"),
    ):
        with pytest.raises(RejectedRecord, match=r"^a\.csv: column '") as error:
            read()
        assert "Smith" not in str(error.value)
        assert error.value.line == 7


def test_a_join_keeps_order_and_counts_rows_about_nothing(tmp_path: Path) -> None:
    join = Join()
    join.add("boxes", table(tmp_path / "boxes.csv", "id,x\nb,1\na,2\nb,3\nz,4\n"), key="id")
    films = table(tmp_path / "films.csv", "id,patient\na,p\nb,p\nb,q,too many\nc,q\n")
    found = list(join.records(films, boxes="id"))
    assert [[row["x"] for row in film.joined.get("boxes", [])] for film in found] == [
        ["2"],
        ["1", "3"],
        [],
        [],
    ]
    assert found[2].problem == "row has 3 cells, the header 2"
    assert join.unused() == {"boxes.csv": 1}
    assert Record.from_json(found[1].to_json()) == found[1]


def test_a_key_that_is_there_twice_or_empty_is_refused_where_it_must_be_unique(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.csv: what line 2 is about stands in another line too; get the file"
    ):
        Join().add("a", table(tmp_path / "a.csv", "id,x\nb,1\nb,2\n"), key="id", unique=True)
    with pytest.raises(DataError, match=r"b\.csv, line 3: column 'id' is empty"):
        Join().add("b", table(tmp_path / "b.csv", "id,x\nb,1\n,2\n"), key="id")


def test_a_join_does_not_hold_its_tables_in_memory(tmp_path: Path) -> None:
    rows = "".join(f"image{n:07d},{'x' * 100}\n" for n in range(4_000))
    large = table(tmp_path / "large.csv", "id,text\n" + rows)
    tracemalloc.start()
    join = Join()
    join.add("large", large, key="id")
    count = sum(1 for found in join.records(large, large="id") if len(found.joined["large"]) == 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4_000
    assert peak < 700_000  # 2.5 MB where all records are held


def test_lists_tell_which_hold_an_id_and_which_ids_were_never_asked_for() -> None:
    lists = IdLists(lambda text: text.strip().lower())
    lists.add("train", ["A", "b", ""], "train.txt")
    lists.add("test", ["c", "a "], "test.txt")
    assert lists.of("A") == ["train", "test"]
    assert lists.one_of(["test"], "a") == "test"
    assert lists.one_of(["train", "test"], "x", "b") == "train"
    assert lists.of("x") == []
    with pytest.raises(DataError, match=r"both train\.txt and test\.txt"):
        lists.one_of(["train", "test"], "a")
    assert list(lists.unused()) == [("train.txt", 2, 0), ("test.txt", 2, 1)]
    with pytest.raises(DataError, match=r"none\.txt holds no ids"):
        lists.add("none", [" "], "none.txt")


@pytest.mark.parametrize("text", ["train", "=x", "train=", "a b=x", "../x=y"])
def test_a_split_list_has_a_form(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=FILE"):
        UserLists([text], [], str)


def test_a_split_list_has_a_file_and_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x\n")
    with pytest.raises(UsageError, match="'valid' is there twice"):
        UserLists([f"valid={tmp_path / 'a'}", f"val={tmp_path / 'a'}"], [], str.strip)
    with pytest.raises(DataError, match="cannot read"):
        UserLists([f"train={tmp_path / 'b'}"], [], str.strip)
    (tmp_path / "a").write_bytes(b"x\n\xff\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        UserLists([], [tmp_path / "a"], str.strip)


def test_a_list_may_be_the_id_column_of_a_csv_file(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text(',ID,boxes,classes\n0,a,"1;2;3;4|5;6;7;8",1\n1,b,,0\n')
    lists = UserLists([f"train={file}"], [], str.strip)
    assert [lists.place(name)[0] for name in ("a", "b", "ID", "1")] == ["train", "train", None, None]
    assert lists.check() == []
    file.write_text("ID,boxes\na,1\nb\n")
    with pytest.raises(DataError, match=r"train\.csv, line 3: row has 1 cells"):
        UserLists([f"train={file}"], [], str.strip)
    file.write_text("a,b\nc\n")  # no such column: an id a line, commas and all
    assert UserLists([f"train={file}"], [], str.strip).place("a,b")[0] == "train"


def test_records_of_a_json_list_are_numbered_and_no_item_vanishes() -> None:
    items = [{"a": " x ", "b": 3, "c": [1, "é"]}, {"a": None, "b": True}, {"a": "y"}, "none"]
    records = list(object_records(items, "list.json", ["a", "b"], ["c"]))
    assert [record.cells for record in records] == [
        {"a": "x", "b": "3", "c": '[1, "é"]'},
        {"a": "", "b": "true", "c": ""},
        {},
        {},
    ]
    assert [record.line for record in records] == [1, 2, 3, 4]
    assert [record.problem for record in records[2:]] == [
        "an item is no object with 'b'",
        "an item is no object with 'a'",
    ]
    with pytest.raises(DataError, match=r"list\.json holds no list of objects"):
        list(object_records({"a": 1}, "list.json", ["a"]))

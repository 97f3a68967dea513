"""Tables as text: every kind, encodings, delimiters, typed values, and the words for missing."""

from __future__ import annotations

import datetime
import gzip
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from shards.errors import DataError
from shards.tables.reading import TableFormat, read_rows
from shards.tables.rows import BadRow, Row

COLUMNS = ["id", "text"]


def cells(table: Path, form: TableFormat | None = None) -> list[list[str] | str]:
    """The cells of every row, or the reason why there are none."""
    rows = read_rows(table, COLUMNS, form)
    return [row.reason if isinstance(row, BadRow) else list(row.cells.values()) for row in rows]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def parquet(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf8", "UTF_8", "U8"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "id,text\r\n007,é\r\n"),
        ("t.tsv", "id\ttext\n007\té\n"),
        ("t.jsonl", '{"id": "007", "text": "é"}\n'),
    ],
)
def test_text_tables_plain_compressed_and_marked(
    name: str, content: str, encoding: str, mark: bytes, ending: str, tmp_path: Path
) -> None:
    table = written(tmp_path / (name + ending), mark + content.encode())
    assert cells(table, TableFormat(encoding)) == [["007", "é"]]
    other = table.with_name(name + ("" if ending else ".gz"))
    assert cells(other, TableFormat(encoding)) == [["007", "é"]]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_utf_16_is_named_when_met_and_read_when_said(encoding: str, name: str, tmp_path: Path) -> None:
    table = written(tmp_path / name, "id,text\n1,naïve heart\n".encode(encoding))
    with pytest.raises(DataError, match=r"UTF-(16|32)"):
        cells(table)
    assert cells(table, TableFormat(encoding)) == [["1", "naïve heart"]]


def test_a_mark_that_contradicts_the_encoding_is_an_error(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", "\ufeffid,text\n1,é\n".encode())
    with pytest.raises(DataError, match="byte order mark of UTF-8, but is read as iso8859-1"):
        cells(table, TableFormat("latin-1"))


@pytest.mark.parametrize(
    ("delimiter", "sign"), [(";", ";"), ("|", "|"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t")]
)
def test_delimiters(delimiter: str, sign: str, tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", f'id{sign}text\n1{sign}"a{sign}b, c"\n'.encode())
    assert cells(table, TableFormat(delimiter=delimiter)) == [["1", f"a{sign}b, c"]]
    with pytest.raises(DataError, match="set `delimiter: "):
        cells(table)
    for wrong in ("ab", '"', "\n"):
        with pytest.raises(DataError, match="delimiter"):
            cells(table, TableFormat(delimiter=wrong))


def test_missing_words_in_every_kind(tmp_path: Path) -> None:
    words = ["", " ", "nan", "NaN", "NA", "N/A", "None", "null", "NULL", "<NA>", "NaT"]
    expected = [[f"{n}", ""] for n in range(len(words))]
    lines = [f"{n},{word}" for n, word in enumerate(words)]
    assert cells(written(tmp_path / "t.csv", "\n".join(["id,text", *lines]).encode())) == expected
    objects = [f'{{"id": {n}, "text": "{word}"}}' for n, word in enumerate(words)]
    assert cells(written(tmp_path / "t.jsonl", "\n".join(objects).encode())) == expected
    numbers = [f"{n}" for n in range(len(words))]
    assert cells(parquet(tmp_path / "t.parquet", id=numbers, text=words)) == expected


def test_typed_nulls_are_missing_whatever_the_words_are(tmp_path: Path) -> None:
    form = TableFormat(missing=("-99", "Not Done"))
    table = written(
        tmp_path / "t.jsonl",
        b'{"id": 1, "text": NaN}\n{"id": 2, "text": null}\n{"id": 3}\n{"id": -99, "text": "NOT done"}\n'
        b'{"id": 4, "text": "None"}\n',
    )
    assert cells(table, form) == [["1", ""], ["2", ""], ["3", ""], ["", ""], ["4", "None"]]
    table = parquet(tmp_path / "t.parquet", id=[1, None], text=[float("nan"), 2.0])
    assert cells(table, form) == [["1", ""], ["", "2.0"]]


def test_json_values_stay_as_they_were_written(tmp_path: Path) -> None:
    table = written(
        tmp_path / "t.jsonl",
        b'{"id": 1e5, "text": 12.0}\n{"id": 123456789012345678901, "text": 0.10}\n'
        b'{"id": true, "text": false}\n'
        b'{"id": "01", "text": "Yes"}\r\n{"id": 1, "text": "a\\u2028b"}\n',
    )
    expected = [["1e5", "12.0"], ["123456789012345678901", "0.10"], ["true", "false"], ["01", "Yes"]]
    assert cells(table) == [*expected, ["1", "a\u2028b"]]


def test_a_json_field_that_is_named_twice_is_no_row(tmp_path: Path) -> None:
    table = written(tmp_path / "t.jsonl", b'{"id": 1, "text": "a", "text": "b"}\n{"id": 2, "text": "c"}\n')
    assert cells(table) == ["line names a field twice", ["2", "c"]]
    deep = b'{"id": 1, "text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert cells(written(tmp_path / "d.jsonl", deep + b'\n{"id": 2, "text": "c"}')) == [
        "line is not a JSON object",
        ["2", "c"],
    ]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([b"caf\xc3\xa9", None], pyarrow.binary(), ["café", ""]),
        ([b"ab", b"cd"], pyarrow.binary(2), ["ab", "cd"]),
        ([True, False, None], pyarrow.bool_(), ["true", "false", ""]),
        ([12.0, 1e5, 0.1], pyarrow.float64(), ["12.0", "100000.0", "0.1"]),
        ([12.0, 0.1], pyarrow.float32(), ["12.0", "0.1"]),
        ([7, None], pyarrow.int8(), ["7", ""]),
        ([datetime.date(2020, 1, 2)], pyarrow.date32(), ["2020-01-02"]),
        ([datetime.datetime(2020, 1, 2, 3)], pyarrow.timestamp("ns"), ["2020-01-02 03:00:00"]),
        (["a", "b"], pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["a", "b"]),
    ],
)
def test_parquet_types(
    values: list[object], kind: pyarrow.DataType, expected: list[str], tmp_path: Path
) -> None:
    ids = [f"{n}" for n in range(len(values))]
    table = parquet(tmp_path / "t.parquet", id=ids, text=pyarrow.array(values, kind))
    assert cells(table) == [[identifier, text] for identifier, text in zip(ids, expected, strict=True)]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([float(2**53)], pyarrow.float64(), "cannot tell apart"),
        ([float(2**24)], pyarrow.float32(), "cannot tell apart"),
        ([["a"]], pyarrow.list_(pyarrow.string()), "more than one value"),
    ],
)
def test_parquet_columns_that_have_no_text(
    values: list[object], kind: pyarrow.DataType, message: str, tmp_path: Path
) -> None:
    table = parquet(tmp_path / "t.parquet", id=pyarrow.array(values, kind), text=["a"])
    with pytest.raises(DataError, match=f"'id'.*{message}"):
        cells(table)


def test_bad_bytes_and_nul_spoil_one_row(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", b"id,text\n1,\xff\n2,a\0b\n3,c\n")
    assert cells(table) == [
        "column 'text' is not utf-8 text (set `encoding` in the map)",
        "column 'text' holds a NUL character",
        ["3", "c"],
    ]
    table = parquet(tmp_path / "t.parquet", id=[1, 2], text=[b"\xff", b"c"])
    assert cells(table) == ["column 'text' is not utf-8 text (set `encoding` in the map)", ["2", "c"]]


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    whole = gzip.compress(b"id,text\n" + os.urandom(5000).hex().encode())
    os.mkfifo(tmp_path / "pipe.csv")
    for name, content, message in (
        ("a.csv", whole, "compressed by gzip"),
        ("b.csv.gz", b"id,text\n1,a\n", "not a complete gzip file"),
        ("c.csv.gz", whole[:-2000], "not a complete gzip file"),
        ("pipe.csv", None, "not a regular file"),
        ("d.parquet.gz", whole, "a table is a"),
        ("e.parquet", b"PAR1", "not a Parquet file"),
        ("f.csv", b"", "is empty"),
        ("g.csv", b'id,"text\n1,a\n', "line 1: a quote is opened and never closed, in the header"),
        ("h.jsonl", b'{"id": 1}\n', "no column 'text'"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            cells(tmp_path / name)


def test_all_columns_of_a_table(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", b"id,text,more\n1,a,b\n")
    assert list(read_rows(table)) == [Row(2, {"id": "1", "text": "a", "more": "b"})]

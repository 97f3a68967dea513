"""What a table and its map say is text: no YAML or CSV typing changes an id, a label or what is missing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.table import TableSource
from tests.shards.test_table import rejections, samples
from tests.shards.toy_data import MAP, Rows, build, folder_bytes, write_csv

MapWriter = Callable[..., Path]
WORDS = [
    "Yes",
    "No",
    "ON",
    "off",
    "y",
    "true",
    "1.0",
    "01",
    "1e5",
    "1_000",
    "0x1F",
    "12:30:00",
    "2020-01-02",
    "~",
]


def labels(root: Path) -> dict[int, dict[str, int | None]]:
    return {int(key[:8]): sample["labels"] for key, sample in samples(root).items()}


@pytest.mark.parametrize("word", WORDS)
def test_yaml_decides_nothing_about_a_label(
    word: str, tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for number, row in enumerate(rows):
        row["finding"] = word if number % 3 == 0 else "else"
    path = map_file(f"labels:\n  {word}: {{column: finding, equals: {word}}}\n")
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, path)
    summary = build(source, tmp_path / "out")
    assert labels(tmp_path / "out") == {n: {word: int(n % 3 == 0)} for n in range(12)}
    assert summary.labels == {word: {1: 4, 0: 8}}
    assert summary.remarks == []


@pytest.mark.parametrize("word", ["007", "1e5", "12.0", "0x1F", "on", "2020-01-02", "1_000"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_ids_stay_as_they_were_written(
    kind: str, word: str, tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    rows[0]["patient"] = word
    table = write_csv(tmp_path / "t.csv", rows)
    if kind == "jsonl":
        table = tmp_path / "t.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        table = tmp_path / "t.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert TableSource(table, image_folder, map_file()).load(0)[0].patient_id == word


def test_numbers_of_json_lines_are_the_ids_they_look_like(
    tmp_path: Path, image_folder: Path, map_file: MapWriter
) -> None:
    table = tmp_path / "t.jsonl"
    texts = ["12.0", "1e5", "123456789012345678901"]
    lines = [f'{{"image": "{n}.jpg", "patient": {text}, "report": "x"}}' for n, text in enumerate(texts)]
    table.write_text("\n".join(lines))
    source = TableSource(table, image_folder, map_file())
    assert [source.load(n)[0].patient_id for n in range(3)] == texts


def test_missing_is_missing_in_every_kind_of_column(
    tmp_path: Path, image_folder: Path, map_file: MapWriter
) -> None:
    more = "findings: found\nsplit: split\nview: view\nlicense: license\nextra: [sex]\nlabels: [edema]\n"
    full = {
        "image": "0.jpg", "patient": "p0", "report": "IMPRESSION: Clear.", "found": "No edema.",
        "split": "test", "view": "PA", "license": "CC0", "sex": "F", "edema": 1,
    }  # fmt: skip
    rows = [full | {"image": f"{n}.jpg"} for n in range(12)]
    for number, column in enumerate(list(full)[3:]):
        rows[number][column] = float("nan")
    rows[6]["patient"], rows[7]["report"], rows[8]["report"] = float("nan"), float("nan"), "N/A"
    rows[8]["found"] = "nan"
    rows[9]["edema"] = None
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        table = tmp_path / name
        if name == "t.jsonl":
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name == "t.csv":
            write_csv(table, [{key: f"{value}" for key, value in row.items()} for row in rows])
        else:
            clean = [{k: None if v != v else v for k, v in row.items()} for row in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(clean), table)
        out = tmp_path / f"out-{name}"
        build(TableSource(table, image_folder, map_file(more)), out)
        found = {int(key[:8]): sample for key, sample in samples(out).items()}
        assert rejections(out) == {6: "missing patient_id", 8: "missing report"}
        assert found[0]["sections"] == {"impression": "Clear."}
        assert (found[2]["view"], found[3]["license"], found[4]["extra"]) == ("", "", {"sex": ""})
        assert found[5]["labels"] == found[9]["labels"] == {"edema": None}
        assert found[7]["sections"] == {"findings": "No edema."}
        assert {sample["split"] for n, sample in found.items() if n != 1} == {"test"}
        assert found[1]["split"] in ("train", "valid", "test")
        for file in out.glob("*.tar"):
            assert b'"nan"' not in file.read_bytes().lower()


def test_words_for_missing_can_be_set(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for number, row in enumerate(rows):
        row["finding"] = ("None", "-99", "x")[number % 3]
    more = "missing: [-99]\nlabels: {none: {column: finding, equals: None}}\n"
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file(more))
    assert [source.load(n)[0].labels["none"] for n in range(3)] == [1, None, 0]


def test_a_rule_that_fits_no_row_is_said(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for row in rows:
        row["finding"] = "edema"
    more = (
        "labels:\n  a: {column: finding, equals: Edema}\n  b: {column: finding, equals: null}\n"
        "  c: {column: finding, contains: mass}\n  d: {column: finding, equals: edema}\n"
    )
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file(more))
    summary = build(source, tmp_path / "out")
    assert summary.remarks == [
        "label 'a': no row's 'finding' equals 'Edema'; 12 rows hold it in another spelling "
        "(capitals, separators)",
        "label 'b': no row's 'finding' equals 'null'; it is a word for missing (set `missing` in the map)",
        "label 'c': no row's 'finding' contains 'mass'",
    ]
    assert summary.labels["d"] == {1: 12}
    assert build(source, tmp_path / "out").remarks == summary.remarks


@pytest.mark.parametrize(
    ("rule", "cells", "almost"),
    [
        ("equals: Edema", ["Edema", "edema", "No", ""], 3),
        ("contains: Edema", ["Edema|Mass", "mass; edema", "Mass , Edema", "Pulmonary Edema"], 6),
        ("contains: Mass/Nodule", ["Mass/Nodule", "mass/nodule|Edema", "Mass", ""], 3),
    ],
)
def test_rows_that_almost_fit_a_rule_are_told(
    rule: str, cells: list[str], almost: int,
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter,
) -> None:  # fmt: skip
    """They count as absent, as the rest of the table does that spells the text otherwise."""
    for number, row in enumerate(rows):
        row["found"] = cells[number % 4]
    more = f"labels: {{a: {{column: found, {rule}}}}}\n"
    summary = build(
        TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file(more)), tmp_path / "out"
    )
    assert summary.labels["a"][1] == 3
    how = rule.replace(": ", " '") + "'"
    assert summary.remarks == [
        f"label 'a' {how}: {almost} rows hold it in another spelling (capitals, separators), and count as "
        "absent"
    ]


@pytest.mark.parametrize(("separator", "sign"), [(None, "|"), ("';'", ";"), ("', '", ", ")])
def test_labels_joined_by_a_separator(
    separator: str | None, sign: str, tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    cells = [sign.join(["Effusion", "Mass"]), "Pleural Effusion", "", "Mass"]
    for number, row in enumerate(rows):
        row["found"] = cells[number % 4]
    rule = f"column: found, contains: Effusion{f', separator: {separator}' if separator else ''}"
    more = f"labels: {{effusion: {{{rule}}}}}\n"
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file(more))
    assert [source.load(n)[0].labels["effusion"] for n in range(4)] == [1, 0, None, 0]


def test_booleans_are_labels(tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter) -> None:
    typed = [row | {"edema": (True, False, None)[n % 3]} for n, row in enumerate(rows)]
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), table)
    source = TableSource(table, image_folder, map_file("labels: [edema]\n"))
    assert [source.load(n)[0].labels["edema"] for n in range(3)] == [1, 0, None]
    text = [row | {"edema": f"{value['edema']}"} for row, value in zip(rows, typed, strict=True)]
    source = TableSource(write_csv(tmp_path / "t.csv", text), image_folder, map_file("labels: [edema]\n"))
    assert [source.load(n)[0].labels["edema"] for n in range(3)] == [1, 0, None]


def test_a_stray_quote_costs_its_own_row(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    lines = [f"{row['image']},{row['patient']},Report {n}." for n, row in enumerate(rows)]
    lines[2] = lines[2].replace("Report", '"Report')
    lines[7] = lines[7] + '"'
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["image,patient,report", *lines]) + "\n")
    summary = build(TableSource(table, image_folder, map_file()), tmp_path / "out")
    assert (summary.records, sum(summary.rejected.values())) == (12, 1)
    entries = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["record"], entry["line"]) for entry in entries] == [(2, 4)]
    assert list(summary.first_lines.values()) == [4]
    for key, sample in samples(tmp_path / "out").items():
        assert sample["sections"]["findings"].strip('"') == f"Report {int(key[:8])}."


def test_ways_to_write_an_image_path(tmp_path: Path, image_folder: Path, map_file: MapWriter) -> None:
    (image_folder / "sub").mkdir()
    for name in ("a.jpg", unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "ö.jpg")):
        (image_folder / "sub" / name).write_bytes((image_folder / "0.jpg").read_bytes())
    os.mkfifo(image_folder / "pipe.jpg")
    names = {
        "sub\\a.jpg": None,
        str(image_folder / "1.jpg"): None,
        unicodedata.normalize("NFC", "sub/é.jpg"): None,
        unicodedata.normalize("NFD", "sub/ö.jpg"): None,
        "./sub/a.jpg": "duplicate image",
        "sub//a.jpg/": "duplicate image",
        "1.jpg": "duplicate image",
        "/etc/passwd": "image path leaves the image folder",
        "C:\\2.jpg": "image path leaves the image folder",
        "sub\\..\\..\\2.jpg": "image path leaves the image folder",
        "pipe.jpg": "image is not a regular file",
        "3.jpg": None,
    }
    rows = [{"image": name, "patient": "p", "report": "x"} for name in names]
    table = write_csv(tmp_path / "t.csv", rows)
    summary = build(TableSource(table, image_folder, map_file()), tmp_path / "out")
    assert rejections(tmp_path / "out") == {n: reason for n, reason in enumerate(names.values()) if reason}
    assert summary.remarks == [
        "image files were found under another Unicode form of their name (NFC or NFD): 2",
        "image paths were written with backslashes: 1",
    ]
    absolute = [row | {"image": str(image_folder / f"{n}.jpg")} for n, row in enumerate(rows)]
    source = TableSource(write_csv(tmp_path / "u.csv", absolute), Path("/"), map_file())
    assert source.load(11)[0].image.shape[0] == 40


def test_a_row_without_a_group_goes_by_its_patient(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for row in rows:
        row["patient"], row["group"] = "p", "nan"
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file("group: group\n"))
    assert {source.split_key(n) for n in range(12)} == {"p"}


def test_a_group_that_some_rows_of_a_patient_name_is_that_of_all(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    """One row went by the group and the other by the patient, into two splits."""
    for number, row in enumerate(rows):
        row["patient"] = f"p{number // 2}"
        row["group"] = f"family {number // 4}" if number % 2 and number < 8 else ""
    table = write_csv(tmp_path / "t.csv", rows)
    source = TableSource(table, image_folder, map_file("group: group\n"))
    assert [source.split_key(n) for n in range(12)] == (
        ["family 0"] * 4 + ["family 1"] * 4 + ["p4", "p4", "p5", "p5"]
    )
    rows[2]["group"] = "family 1"
    with pytest.raises(DataError, match="lines 4 and 5: one patient is in two groups"):
        TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file("group: group\n"))


def test_a_split_that_some_rows_of_a_patient_name_is_that_of_all(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    """One row went where it says and the other where the hash of the patient says, into two splits."""
    splits = ("test", "", "", "val", "", "", "train", "train", "test", "train", "", "")
    for number, row in enumerate(rows):
        row["patient"], row["split"] = f"p{number // 2}", splits[number]
        row["group"] = "family" if number in (0, 4) else ""  # p0 and p2
    table = write_csv(tmp_path / "t.csv", rows)
    source = TableSource(table, image_folder, map_file("split: split\ngroup: group\n"))
    assert [source.prescribed_split(n) for n in range(12)] == (
        ["test"] * 2 + ["valid"] * 2 + ["test"] * 2 + ["train"] * 2 + ["test", "train", None, None]
    )
    assert source.remarks() == []


def test_a_patient_called_like_a_group_of_others_has_a_split_of_his_own(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    """Both are numbers in many tables."""
    for number, row in enumerate(rows):
        row["patient"] = str(number // 2)
        row["group"] = "1" if number < 2 else ""
        row["split"] = {0: "test", 2: "train"}.get(number, "")
    source = TableSource(
        write_csv(tmp_path / "t.csv", rows), image_folder, map_file("split: split\ngroup: group\n")
    )
    splits = [source.prescribed_split(n) for n in range(12)]
    assert splits == ["test"] * 2 + ["train"] * 2 + [None] * 8
    rows[2]["split"] = ""
    source = TableSource(
        write_csv(tmp_path / "t.csv", rows), image_folder, map_file("split: split\ngroup: group\n")
    )
    assert [source.prescribed_split(n) for n in range(12)] == ["test"] * 2 + [None] * 10


@pytest.mark.parametrize(("group", "line"), [("", 12), ("family", 13)])
def test_a_row_without_a_split_whose_patient_or_group_has_two_stops_the_build(
    group: str, line: int, tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for number, row in enumerate(rows):
        row["patient"] = f"p{number // 6}"
        row["split"], row["group"] = "test" if number == 7 else "train", group
    more = map_file("split: split\ngroup: group\n")
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, more)  # it says what it wants
    told = ["1 groups are in more than one split, as column 'split' has it"]
    assert source.remarks() == (told if group else [])
    rows[line - 2]["split"] = "no name"  # that row alone is rejected
    TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, more)
    rows[line - 2]["split"] = ""
    named = f"lines {2 if group else 8} and 9"
    with pytest.raises(DataError, match=f"line {line} names no split, and {named}, of the same patient or"):
        TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, more)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image: image\nimage: other\npatient_id: patient\n", "twice"),
        ("image: image\npatient_id: patient\nlabels: {a: b, a: c}\n", "twice"),
        ("image: image\npatient_id: patient\nlabels: [a, a]\n", "labels: a column is named twice"),
        (
            "image: image\npatient_id: patient\nlabels: {a: {column: b, equals: }}\n",
            "labels: a: give a column",
        ),
        ("image: image\npatient_id: patient\nmissing: nan\n", "missing: give a list"),
        ("image: image\npatient_id: patient\ndelimiter: ab\n", "delimiter 'ab' is not one sign"),
        ("image: image\npatient_id: patient\nencoding: rot13\n", "'rot13' is no encoding of text"),
        ("image: image\npatient_id: patient\nfindings_without_heading: 3\n", "neither true nor false"),
        ("image: &a [*a]\n", "not YAML"),
        ("image: " + "[" * 5000, "YAML|nested too deep"),
        ("image: !!python/object/apply:os.system [ls]\npatient_id: patient\n", "a value has a tag"),
    ],
)
def test_wrong_maps(text: str, message: str, tmp_path: Path, image_folder: Path, rows: Rows) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, tmp_path / "map.yaml")


def test_workers_give_the_same_bytes(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    source = TableSource(write_csv(tmp_path / "t.csv", rows * 3), image_folder, map_file())
    build(source, tmp_path / "one", workers=1)
    build(source, tmp_path / "two", workers=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    again = pickle.loads(pickle.dumps(source))
    assert again.load(3)[0].sections == source.load(3)[0].sections
    with pytest.raises(RejectedRecord, match="duplicate image"):
        again.load(12)


LARGE = """
import resource, sys
from pathlib import Path
from shards.sources.table import TableSource
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = TableSource(folder / "t.csv", folder, folder / "map.yaml")
assert len(source) == 60_000, len(source)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(MAP)
    with (tmp_path / "t.csv").open("w") as file:
        file.write("image,patient,report\n")
        file.writelines(f'{n}.jpg,p{n},"{"word, " * 500}"\n' for n in range(60_000))  # 180 MB
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert int(done.stdout) < 90, f"{done.stdout} MB"

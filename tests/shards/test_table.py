"""The table source: every kind of table and image, and a counted reason for every kind of bad row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile
from typer.testing import CliRunner

from launcher.main import app
from shards.build import BuildOptions
from shards.errors import DataError
from shards.identifiers import read_key
from shards.images import encode_jpeg, encode_png, window_to_8_bit
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.sources.base import RejectedRecord
from shards.sources.table import TableSource
from shards.sources.table_map import TableMap
from shards.text.headings import PREAMBLE, SECTION_NAMES
from tests.shards.toy_data import Rows, build, folder_bytes, write_csv

MapWriter = Callable[..., Path]


def samples(root: Path) -> dict[str, dict]:
    """Key -> metadata of every sample, with its split added."""
    reader = ShardReader(root)
    return {
        reader.key(split, i): reader.metadata(split, i) | {"split": split}
        for split in reader.index.splits
        for i in range(reader.sample_count(split))
    }


def rejections(root: Path) -> dict[int, str]:
    """Record -> reason."""
    entries = [json.loads(line) for line in (root / "rejected.jsonl").read_text().splitlines()]
    return {entry["record"]: entry["reason"] for entry in entries}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_samples(
    kind: str, tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    rows[3]["report"] = 'Quoted "text", with\nline break and é.'
    build(TableSource(write_csv(tmp_path / "a.csv", rows), image_folder, map_file()), tmp_path / "expected")
    table = tmp_path / f"a.{kind}"
    if kind == "tsv":
        cells = [[row[key] for key in rows[0]] for row in rows]
        quoted = ['"' + '"\t"'.join(cell.replace('"', '""') for cell in line) + '"' for line in cells]
        table.write_text("\n".join(["\t".join(rows[0]), *quoted]), encoding="utf-8")
    elif kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    build(TableSource(table, image_folder, map_file()), tmp_path / "out")
    assert samples(tmp_path / "out") == samples(tmp_path / "expected")
    assert len(samples(tmp_path / "out")) == 12


def test_every_kind_of_bad_row_is_rejected_with_its_reason(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter, bomb: bytes
) -> None:
    (image_folder / "1.jpg").write_bytes((image_folder / "1.jpg").read_bytes()[:-30])
    (image_folder / "2.jpg").write_bytes(b"")
    (image_folder / "3.jpg").write_bytes(bomb)
    (image_folder / "4.jpg").unlink()
    rows[5]["report"] = "  "
    rows[6]["id"] = ""
    rows[7]["patient"] = ""
    rows[8]["image"] = "../images/8.jpg"
    for number, row in enumerate(rows):
        row.setdefault("id", str(number % 9))
        row["edema"] = "1"
    rows[10]["edema"] = "maybe"
    rows[10]["id"], rows[11]["id"] = "ten", "eleven"
    table = write_csv(tmp_path / "pairs.csv", rows)
    lines = table.read_bytes().splitlines(keepends=True)
    lines[12] = lines[12].replace(b"No effusion", "Épanchement".encode("latin-1"))
    table.write_bytes(b"".join([*lines, b"too,few\n"]))

    summary = build(TableSource(table, image_folder, map_file("id: id\nlabels: [edema]\n")), tmp_path / "out")
    reasons = rejections(tmp_path / "out")
    for record, reason in {
        1: "broken JPEG: Premature end of JPEG file",
        2: "image file is empty",
        3: "image has more than 67108864 pixels",
        4: "image file does not exist",
        5: "missing report",
        6: "missing id",
        7: "missing patient_id",
        8: "image path leaves the image folder",
        9: "duplicate id",
        10: "label column 'edema' holds neither 1, 0, -1 nor nothing",
        11: "column 'report' is not utf-8 text (set `encoding` in the map)",
        12: "row has 2 cells, the header 5",
    }.items():
        assert reasons.pop(record) == reason
    assert not reasons
    assert list(samples(tmp_path / "out")) == ["00000000-0"]
    assert (summary.records, sum(summary.rejected.values())) == (13, 12)
    assert summary.rejected_share == 12 / 13


def test_reports_of_another_language_and_habit_open_their_sections(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    rows[0]["report"] = "HALLAZGOS\r\nSin derrame.\r\nIMPRESIÓN: Normal."
    rows[1]["report"] = "COMPARACIÓN: Ninguna.\n\nSin derrame.\n\nIMPRESIÓN: Normal."
    table = write_csv(tmp_path / "pairs.csv", rows)
    more = "language: es\nfindings_without_heading: true\n"
    build(TableSource(table, image_folder, map_file(more)), tmp_path / "out")
    stored = samples(tmp_path / "out")
    assert stored["00000000-0"]["sections"] == {"findings": "Sin derrame.", "impression": "Normal."}
    assert stored["00000001-0"]["sections"]["findings"] == "Sin derrame."
    with pytest.raises(DataError, match="language: 'Spanish' is unknown"):
        TableSource(table, image_folder, map_file("language: Spanish\n"))


def test_markup_in_a_section_column_goes(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for row in rows:
        row["text"] = "No&nbsp;effusion.<br><br>**Clear** lungs &lt;stable&gt;."
    table = write_csv(tmp_path / "pairs.csv", rows)
    build(TableSource(table, image_folder, map_file("impression: text\n")), tmp_path / "out")
    impression = samples(tmp_path / "out")["00000000-0"]["sections"]["impression"]
    assert impression == "No effusion.\n\nClear lungs <stable>."


def test_latin_1_report_is_read_when_the_map_says_so(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    rows[0]["report"] = "Épanchement pleural."
    table = write_csv(tmp_path / "pairs.csv", rows)
    table.write_bytes(table.read_text(encoding="utf-8").encode("latin-1"))
    source = TableSource(table, image_folder, map_file("encoding: latin-1\n"))
    assert source.load(0)[0].sections == {"findings": "Épanchement pleural."}
    with pytest.raises(RejectedRecord, match="not utf-8"):
        TableSource(table, image_folder, map_file()).load(0)


def test_json_lines_that_are_no_objects_or_no_unicode_are_rejected(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    lines = [json.dumps(row) for row in rows]
    lines[1] = "{broken"
    lines[2] = json.dumps(rows[2] | {"report": ["a", "b"]})
    lines[3] = json.dumps(rows[3] | {"report": "half a pair \ud800"})
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(lines))
    build(TableSource(table, image_folder, map_file()), tmp_path / "out")
    assert rejections(tmp_path / "out") == {
        1: "line is not a JSON object",
        2: "column 'report' holds more than one value",
        3: "column 'report' is not utf-8 text (set `encoding` in the map)",
    }


def test_png_and_tiff_of_8_and_16_bits(tmp_path: Path, map_file: MapWriter) -> None:
    deep = np.random.default_rng(1).integers(0, 60000, (48, 48)).astype(np.uint16)
    shallow = (deep >> 8).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(shallow))
    (tmp_path / "b.png").write_bytes(encode_png(deep))
    tifffile.imwrite(tmp_path / "c.tif", shallow)
    tifffile.imwrite(tmp_path / "d.tiff", deep)
    rows = [{"image": name, "patient": "p", "report": "x"} for name in ("a.png", "b.png", "c.tif", "d.tiff")]
    source = TableSource(write_csv(tmp_path / "t.csv", rows), tmp_path, map_file())
    for record, expected in enumerate([shallow, window_to_8_bit(deep)] * 2):
        np.testing.assert_array_equal(source.load(record)[0].image, expected)


def test_columns_arrive_where_the_map_says(tmp_path: Path, image_folder: Path, map_file: MapWriter) -> None:
    row = {
        "image": "0.jpg", "patient": "p1", "id": "i1", "study": "s1", "where": "val", "position": "pa",
        "terms": "CC0", "report": "HISTORY: cough. FINDINGS: Old.", "found": "Clear lungs. No edema.",
        "edema": "-1.0", "mass": "", "class": "Normal", "sex": "F",
    }  # fmt: skip
    more = """\
id: id
study_id: study
split: where
view: position
license: terms
findings: found
labels:
  edema: edema
  mass: mass
  normal: {column: class, equals: Normal}
extra: [sex]
source: hospital
"""
    table = write_csv(tmp_path / "t.csv", [row])
    build(TableSource(table, image_folder, map_file(more)), tmp_path / "out")
    assert samples(tmp_path / "out") == {
        "00000000-0": {
            "study_id": "s1",
            "patient_id": "p1",
            "view": "PA",
            "sections": {"history": "cough.", "findings": "Clear lungs. No edema."},
            "sentences": ["cough.", "Clear lungs.", "No edema."],
            "labels": {"edema": -1, "mass": None, "normal": 1},
            "entities": [],
            **{name: [] for name in ("boxes", "masks", "anatomy", "phrases", "questions", "lists")},
            "source": "hospital",
            "license": "CC0",
            "extra": {"sex": "F"},
            "split": "valid",
        }
    }


def test_groups_share_a_split_which_a_row_names_or_the_hash(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for number, row in enumerate(rows):
        row["group"] = f"g{number // 6}"
        row["patient"] = f"p{number}"
        row["split"] = "test" if number == 0 else ""
    source = TableSource(
        write_csv(tmp_path / "t.csv", rows), image_folder, map_file("group: group\nsplit: split\n")
    )
    build(source, tmp_path / "out", BuildOptions(fractions={"train": 0.5, "valid": 0.5}))
    splits = {int(key[:8]): sample["split"] for key, sample in samples(tmp_path / "out").items()}
    assert {splits[i] for i in range(6)} == {"test"}
    assert len({splits[i] for i in range(6, 12)}) == 1


def test_table_without_text_needs_no_report_and_gets_no_tokenizer(
    tmp_path: Path, image_folder: Path, rows: Rows
) -> None:
    map_path = tmp_path / "map.yaml"
    map_path.write_text("image: image\npatient_id: patient\n")
    out = tmp_path / "out"
    build(TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_path), out)
    assert all(sample["sections"] == {} for sample in samples(out).values())
    assert ShardReader(out).index.tokenizer is None
    assert not (out / "tokenizer.json").exists()


def test_hashed_ids_are_keyed_and_hide_the_ids(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    for row in rows:
        row["patient"] = f"patient-{row['patient']}"
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file("study_id: patient\n"))
    roots = {}
    for name, key in {"plain": None, "one": b"k" * 16, "again": b"k" * 16, "two": b"x" * 16}.items():
        roots[name] = tmp_path / name
        build(source, roots[name], BuildOptions(image=StoredImage(size=32), hash_key=key))
    assert folder_bytes(roots["one"]) == folder_bytes(roots["again"])
    plain, one, two = (samples(roots[name]) for name in ("plain", "one", "two"))
    assert b"patient-p" not in b"".join(folder_bytes(roots["one"]).values())
    assert {key: sample["split"] for key, sample in plain.items()} == {k: s["split"] for k, s in one.items()}
    pairs = {(plain[key]["patient_id"], one[key]["patient_id"]) for key in plain}
    assert len(pairs) == len({patient for patient, _ in pairs}) == len({hashed for _, hashed in pairs})
    assert not {s["patient_id"] for s in one.values()} & {s["patient_id"] for s in two.values()}
    with pytest.raises(DataError, match="hash_key"):
        build(source, roots["one"], BuildOptions(image=StoredImage(size=32), hash_key=b"y" * 16))


def test_columns_of_ids_are_not_kept_beside_hashed_ones(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    more = "extra: [patient, image, license]\nlicense: license\n"
    for row in rows:
        row["license"] = "CC0"
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file(more))
    plain, hashed = tmp_path / "plain", tmp_path / "hashed"
    build(source, plain, BuildOptions(image=StoredImage(size=32)))
    assert samples(plain)["00000000-0"]["extra"].keys() == {"patient", "image", "license"}
    summary = build(source, hashed, BuildOptions(image=StoredImage(size=32), hash_key=b"x" * 16))
    assert {frozenset(sample["extra"]) for sample in samples(hashed).values()} == {frozenset({"license"})}
    assert [line.partition(" were left out")[0] for line in summary.remarks] == [
        "values of extra.image", "values of extra.patient",
    ]  # fmt: skip


def test_hash_key_comes_from_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVLP_HASH_KEY", raising=False)
    with pytest.raises(DataError, match="MEDVLP_HASH_KEY"):
        read_key(None)
    monkeypatch.setenv("MEDVLP_HASH_KEY", "0123456789abcdef")
    assert read_key(None) == b"0123456789abcdef"
    (tmp_path / "key").write_bytes(b"fedcba9876543210\n")
    assert read_key(tmp_path / "key") == b"fedcba9876543210"
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(DataError, match="has 5"):
        read_key(tmp_path / "key")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image: image\npatient_id: patient\nreprot: report\n",
            "unknown key 'reprot', did you mean 'report'",
        ),
        ("image: image\n", "key 'patient_id' is missing"),
        ("image: pictures\npatient_id: patient\n", "no column 'pictures'"),
        ("image: imag\npatient_id: patient\n", "no column 'imag', did you mean 'image'"),
        ("image: [a]\npatient_id: patient\n", "yaml: image: give one value"),
        ("image: image\npatient_id: patient\nlabels: 3\n", "labels"),
        ("image: image\npatient_id: patient\nlabels: {a: {column: b}}\n", "labels: a: give a column"),
        ("image: image\npatient_id: patient\nencoding: klingon\n", "encoding"),
        ("- a\n", "a map is"),
        ("image: [", "not YAML"),
    ],
)
def test_wrong_map_is_one_clear_error(
    text: str, message: str, tmp_path: Path, image_folder: Path, rows: Rows
) -> None:
    map_path = tmp_path / "map.yaml"
    map_path.write_text(text)
    with pytest.raises(DataError, match=message):
        TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_path)


def test_wrong_table_is_one_clear_error(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    table = write_csv(tmp_path / "t.csv", rows)
    for path, content, message in (
        (tmp_path / "none.csv", None, "cannot read .*none.csv: No such file"),
        (tmp_path / "t.xlsx", b"x", "a table is a"),
        (tmp_path / "e.csv", b"image,patient,report\n", "has no rows"),
        (tmp_path / "d.csv", b"image,image,patient,report\n1,2,3,4\n", "more than once"),
        (tmp_path / "p.parquet", b"PAR1", "not a Parquet file"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            TableSource(path, image_folder, map_file())
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        TableSource(table, tmp_path / "nowhere", map_file())


def test_every_section_has_a_map_key() -> None:
    assert set(SECTION_NAMES) - {PREAMBLE} <= TableMap.__dataclass_fields__.keys()


def test_rejections_hold_no_text_and_no_ids(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    rows[0]["edema"] = "secret finding"
    rows[1]["image"] = "/secret/path.jpg"
    (image_folder / "2.jpg").write_bytes(encode_jpeg(np.zeros((9, 9), np.uint8))[:50])
    table = write_csv(tmp_path / "t.csv", rows)
    build(TableSource(table, image_folder, map_file("labels: [edema]\n")), tmp_path / "out")
    text = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert len(text.splitlines()) == 3
    assert "secret" not in text
    assert "2.jpg" not in text


def test_rows_of_excluded_patients_ids_and_images_are_left_out_and_counted(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: MapWriter
) -> None:
    table = write_csv(tmp_path / "t.csv", rows)
    leave = tmp_path / "leave.txt"
    leave.write_text(f"{rows[0]['patient']}\n{rows[-1]['image']}\nnobody\n")
    options = [
        "--table",
        str(table),
        "--images",
        str(image_folder),
        "--map",
        str(map_file()),
        "--exclude",
        str(leave),
    ]
    built = CliRunner().invoke(
        app, ["shards", "build", "table", *options, "--out", str(tmp_path / "out"), "--image-size", "16"]
    )
    assert built.exit_code == 0, built.output
    kept = [row for row in rows if row["patient"] != rows[0]["patient"] and row is not rows[-1]]
    reader = ShardReader(tmp_path / "out")
    found = [
        reader.metadata(split, i) for split in reader.index.splits for i in range(reader.sample_count(split))
    ]
    assert sorted(item["study_id"] for item in found) == sorted(row["image"] for row in kept)
    assert f"{len(rows) - len(kept)} rows left out by --exclude" in built.output
    assert "1 of 3 ids in leave.txt are not in the data" in built.output
    assert "nobody" not in built.output
    leave.write_text("nobody\n")
    with pytest.raises(DataError, match=r"none of the 1 ids in .*leave\.txt is in the data"):
        TableSource(table, image_folder, map_file(), [leave])

"""What every importer of an archive keeps, on the archive of its fixture (`tests/fixtures/<name>.py`)."""

from __future__ import annotations

import gzip
import importlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import webdataset
from typer.testing import CliRunner

from launcher.main import app
from shards import dicom, images
from shards.archives.source import ArchiveOptions, ArchiveSource
from shards.errors import DataError
from shards.identifiers import hash_identifiers
from shards.metadata import to_metadata
from shards.reader import ShardReader
from shards.sample import StoredImage, to_sample
from shards.sources.base import PublishedCount, RejectedRecord
from shards.sources.registry import sources
from shards.study import Study
from shards.verify import verify
from tests.fixtures.archive import Archive

#: A folder of DICOM files has neither tables nor published numbers; test_dicom_folder.py has its tests.
SETS = [
    name for name, entry in sources().items() if issubclass(entry.options, ArchiveOptions) and name != "dicom"
]


def fixture(name: str) -> Any:
    """The module that writes the archive of an importer."""
    return importlib.import_module(f"tests.fixtures.{name.replace('-', '_')}")


#: Importers by name; "name/form" where an archive comes in further forms (`FORMS` of its fixture).
ARCHIVES = SETS + [f"{name}/{form}" for name in SETS for form in getattr(fixture(name), "FORMS", {})]
TABLES = (".csv", ".tsv")
pytestmark = pytest.mark.parametrize("name", ARCHIVES)


def write(name: str, root: Path) -> Archive:
    """The archive of an importer's fixture."""
    name, _, form = name.partition("/")
    archive: Archive = fixture(name).FORMS[form](root) if form else fixture(name).write(root)
    return archive


def open_archive(name: str, archive: Archive, **more: Any) -> ArchiveSource:
    """The source that a build of it would have."""
    entry = sources()[name.partition("/")[0]]
    source = entry.open(entry.options(**{"root": archive.root} | archive.options | more), 64)
    assert isinstance(source, ArchiveSource)
    return source


def outcome(source: ArchiveSource) -> tuple[list[dict[str, bytes]], set[tuple[str, int | None]]]:
    """Members of all samples, and reason and line of all rejections."""
    samples, rejected = [], set()
    for i in range(len(source)):
        try:
            studies = source.load(i)
        except RejectedRecord as error:
            rejected.add((error.reason, error.line))
            continue
        samples += [to_sample(study, "key", StoredImage(64)).members for study in studies]
    return samples, rejected


def studies_of(source: ArchiveSource) -> Iterator[tuple[int, Study]]:
    """Every study with the number of its record; rejected ones are left out."""
    for i in range(len(source)):
        with suppress(RejectedRecord):
            yield from ((i, study) for study in source.load(i))


def ids(source: ArchiveSource) -> list[tuple[str, str]]:
    """Patient and prescribed split of every record that is not rejected at sight."""
    kept = [i for i in range(len(source)) if not source.split_key(i).startswith("row ")]
    return [(source.split_key(i), source.prescribed_split(i) or "") for i in kept]


def test_no_image_that_its_file_turns_has_places(
    name: str, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether boxes and masks were drawn on it before or after that turn cannot be known."""
    decode = images.decode_turned
    monkeypatch.setattr(images, "decode_turned", lambda *words: (decode(*words)[0], 6))
    source = open_archive(name, archive)
    if any(source.files.names(".dcm")) or any(source.files.names(".dicom")):
        pytest.skip("DICOM files have no such orientation")
    for i, study in studies_of(source):
        places = (
            study.boxes,
            study.anatomy,
            study.masks,
            [box for of in study.phrases for box in of.boxes],
        )
        assert not any(places), f"record {i}"


def test_what_is_done_to_dicom_films_is_told(
    name: str, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = dicom._shown
    monkeypatch.setattr(dicom, "_shown", lambda *words: (shown(*words)[0], ["films were noted"]))
    source = open_archive(name, archive)
    loaded = sum(1 for _ in studies_of(source))
    films = [*source.files.names(".dcm"), *source.files.names(".dicom")]
    reads_them = films and hasattr(importlib.import_module(type(source).__module__), "read_dicom")
    assert source.take_notes().get("films were noted", 0) == (loaded if reads_them else 0)
    assert source.take_notes() == {}


def test_hashed_ids_stand_nowhere_else_in_a_sample(name: str, archive: Archive) -> None:
    source = open_archive(name, archive)
    for i, study in studies_of(source):
        hashed = to_metadata(hash_identifiers(study, b"k" * 16, source.identifying))
        kept = json.dumps({field: hashed[field] for field in ("patient_id", "study_id", "extra", "lists")})
        # Shorter ones stand in anything.
        for told in {text for text in (study.patient_id, study.study_id) if len(text) > 4}:
            assert told not in kept, f"record {i}"


@pytest.fixture
def archive(name: str, tmp_path: Path) -> Archive:
    """A fresh copy of the archive."""
    return write(name, tmp_path / "archive")


def through_pickle(
    function: Callable[[Any, Any], Any], shared: Any, tasks: Iterable[Any], workers: int
) -> Iterator[Any]:
    """`run_tasks` with what worker processes would get, without the seconds that starting them takes."""
    assert workers == 2
    shared = pickle.loads(pickle.dumps(shared))
    return (function(shared, pickle.loads(pickle.dumps(task))) for task in tasks)


def test_it_builds_is_verified_and_webdataset_reads_it(
    name: str, archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.build.run_tasks", through_pickle)
    out = tmp_path / "out"
    words = ["--root", archive.root, "--out", out, "--image-size", 64, "--workers", 2, "--max-rejected", 1]
    for option, value in archive.options.items():
        words += [f"--{option.replace('_', '-')}", value]
    kind = name.partition("/")[0]
    result = CliRunner().invoke(app, ["shards", "build", kind, *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"{archive.rejected} rejected" in result.output
    assert "as published" in result.output
    assert verify(out, 1) == []
    reader = ShardReader(out)
    tars = [str(out / shard.file) for shard in reader.index.shards]
    read = [json.loads(sample["json"]) for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert len(read) == archive.samples
    for metadata in read:
        assert metadata["license"]
        assert metadata["extra"]["access"]
        assert metadata["source"] == kind
        assert set(metadata["labels"]) <= set(reader.index.label_names)


def test_each_missing_file_is_named_with_where_to_get_it(name: str, tmp_path: Path) -> None:
    for number in range(len(write(name, tmp_path / "first").tables)):
        copy = write(name, tmp_path / f"{number}")
        copy.tables[number].unlink()
        with pytest.raises(DataError) as error:
            open_archive(name, copy)
        message = str(error.value)
        assert copy.tables[number].name.removesuffix(".gz") in message
        assert "get it from" in message
        assert "\n" not in message


def noise(data: bytes) -> bytes:
    return bytes(range(256)) * 4


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def other_header(data: bytes) -> bytes:
    header, newline, rows = data.lstrip(b"\xef\xbb\xbf").partition(b"\n")
    return b"unknown" + header.replace(b",", b"_,") + newline + rows


def short_row(data: bytes) -> bytes:
    lines = data.rstrip(b"\n").split(b"\n")
    return b"\n".join([*lines[:-1], lines[-1].rpartition(b",")[0]]) + b"\n"


@pytest.mark.parametrize("damage", [noise, half, other_header, short_row])
def test_each_damaged_file_is_named(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    first = write(name, tmp_path / "first")
    good = open_archive(name, first)
    _, expected = outcome(good)
    for number, table in enumerate(first.tables):
        kind = Path(table.name.removesuffix(".gz")).suffix
        if damage in (other_header, short_row) and kind not in TABLES:
            continue
        copy = write(name, tmp_path / f"{number}")
        path = copy.tables[number]
        packed = path.suffix == ".gz"
        data = damage(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        path.write_bytes(gzip.compress(data) if packed else data)
        said = path.name.removesuffix(".gz")
        lines = complaints(name, copy, expected, good.published_counts())
        assert any(said in line for line in lines), (said, lines)
        assert not any("\n" in line for line in lines)


def complaints(
    name: str,
    archive: Archive,
    expected: set[tuple[str, int | None]],
    expected_counts: list[PublishedCount],
) -> list[str]:
    """The error of opening an archive; or reasons of rejections, and counts, that are not expected."""
    try:
        source = open_archive(name, archive)
        _, rejected = outcome(source)
    except DataError as error:
        return [str(error)]
    counts = set(source.published_counts()) - set(expected_counts)
    return [*(reason for reason, _ in rejected - expected), *(count.name for count in counts)]


def test_workers_get_the_same_records(name: str, archive: Archive) -> None:
    source = open_archive(name, archive)
    expected = outcome(source)
    assert len(expected[0]) == archive.samples
    assert outcome(pickle.loads(pickle.dumps(source))) == expected


def test_a_zip_is_read_like_the_folder(name: str, archive: Archive, tmp_path: Path) -> None:
    expected = outcome(open_archive(name, archive))
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(archive.root.rglob("*")):
            zipped.write(path, path.relative_to(archive.root))
    source = open_archive(name, archive, root=packed)
    assert outcome(source) == expected
    assert outcome(pickle.loads(pickle.dumps(source))) == expected


def test_names_in_capitals_and_gzipped_tables_are_found(name: str, archive: Archive) -> None:
    expected = outcome(open_archive(name, archive))[0]
    for table in archive.tables:
        data = table.read_bytes()
        table.unlink()
        if table.suffix == ".gz":
            table.with_name(table.name.removesuffix(".gz").upper()).write_bytes(gzip.decompress(data))
        else:
            table.with_name(table.name.upper() + ".gz").write_bytes(gzip.compress(data))
    assert outcome(open_archive(name, archive))[0] == expected


def test_numbers_that_are_not_the_published_ones_are_told_or_fail(name: str, archive: Archive) -> None:
    source = open_archive(name, archive)
    assert any(count.published != count.found for count in source.published_counts())
    assert sum(count.found for count in source.published_counts()) > 0
    with pytest.raises(DataError, match="published"):
        open_archive(name, archive, strict=True)


def test_the_first_records_only(name: str, archive: Archive) -> None:
    whole, first = open_archive(name, archive), open_archive(name, archive, limit=1)
    assert len(first) == 1
    assert first.published_counts() == whole.published_counts()


def test_excluded_patients_are_left_out(name: str, archive: Archive, tmp_path: Path) -> None:
    whole = ids(open_archive(name, archive))
    patient = whole[0][0]
    (tmp_path / "out.txt").write_text(f"{patient}\n")
    rest = open_archive(name, archive, exclude=[tmp_path / "out.txt"])
    assert ids(rest) == [known for known in whole if known[0] != patient]
    assert any("left out: --exclude" in remark for remark in rest.remarks())
    (tmp_path / "none.txt").write_text("no such id\n")
    with pytest.raises(DataError, match="none of the 1 ids"):
        open_archive(name, archive, exclude=[tmp_path / "none.txt"])


def test_lists_give_splits_and_parts(name: str, archive: Archive, tmp_path: Path) -> None:
    whole = ids(open_archive(name, archive))
    patients = list(dict.fromkeys(patient for patient, _ in whole))
    lists = {"valid": patients[:1], "test": patients[1:2], "train_1": patients[:1]}
    for split, members in lists.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(members))
    given = [f"{split}={tmp_path / split}.txt" for split in lists]
    source = open_archive(name, archive, split_list=given)
    assert set(ids(source)) == {(patients[0], "valid"), (patients[1], "test")}
    for i in range(len(source)):
        try:
            studies = source.load(i)
        except RejectedRecord:
            continue
        for study in studies:
            assert ("train_1" in study.lists) == (study.patient_id == patients[0])

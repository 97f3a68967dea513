"""`medvlp shards annotate`: only entities change, work is kept, nothing is overwritten unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.commands.shards import app
from shards.entities import annotate as annotation
from shards.entities.extractor import extract
from shards.errors import DataError, UsageError
from shards.format import Index
from shards.reader import ShardReader
from shards.verify import verify
from tests.shards.toy_data import Rows, folder_bytes, write_csv


def run(*arguments: object) -> Result:
    """Run `medvlp shards ...`; an error of the command is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result


@pytest.fixture
def table(tmp_path: Path, image_folder: Path, rows: Rows, map_file: Callable[..., Path]) -> list[object]:
    """The command that builds twelve real images with reports and without entities."""
    csv = write_csv(tmp_path / "pairs.csv", rows)
    command = ["build", "table", "--table", csv, "--images", image_folder, "--map", map_file()]
    return [*command, "--image-size", 32, "--workers", 1, "--samples-per-shard", 4]


@pytest.fixture
def plain(tmp_path: Path, table: list[object]) -> Path:
    """That dataset."""
    run(*table, "--out", tmp_path / "plain")
    return tmp_path / "plain"


def samples(dataset: Path) -> list[tuple[str, bytes, dict[str, object]]]:
    reader = ShardReader(dataset)
    return [reader.read(split, i) for split in reader.index.splits for i in range(reader.sample_count(split))]


def test_rules_fill_entities_and_change_nothing_else(plain: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", folder_bytes(plain)
    assert (
        "12 of 12 samples have entities"
        in run("annotate", plain, "--out", out, "--rules", "--workers", 1).stdout
    )
    assert folder_bytes(plain) == before
    assert verify(out, 1) == []
    old, new = Index.load(plain), Index.load(out)
    assert new.fingerprint != old.fingerprint
    assert new.arguments["entities"]["dataset"] == old.fingerprint
    assert (new.tokenizer, new.label_names) == (old.tokenizer, old.label_names)
    for first, second in zip(samples(plain), samples(out), strict=True):
        assert first[:2] == second[:2]
        assert first[2]["entities"] == []
        sections = first[2]["sections"]
        assert isinstance(sections, dict)
        expected = [[e.anatomy, e.observation, e.value] for e in extract(sections)]
        assert second[2] == {**first[2], "entities": expected}
        assert ["pleural space", "effusion", 0] in expected


def test_build_with_rules_gives_the_same_entities(plain: Path, table: list[object], tmp_path: Path) -> None:
    run("annotate", plain, "--out", tmp_path / "annotated", "--rules", "--workers", 1)
    run(*table, "--entities", "rules", "--out", tmp_path / "built")
    assert samples(tmp_path / "annotated") == samples(tmp_path / "built")
    with pytest.raises(SystemExit, match="2"):
        run(*table, "--entities", "model", "--out", tmp_path / "other")


def test_the_rules_refuse_another_language(
    table: list[object], tmp_path: Path, map_file: Callable[..., Path]
) -> None:
    table[table.index("--map") + 1] = map_file("language: es\n")
    with pytest.raises(DataError, match="language: es"):
        run(*table, "--entities", "rules", "--out", tmp_path / "built")
    run(*table, "--out", tmp_path / "spanish")
    with pytest.raises(DataError, match="language: es"):
        run("annotate", tmp_path / "spanish", "--out", tmp_path / "out", "--rules", "--workers", 1)
    assert not (tmp_path / "out").exists()


def test_annotated_phantoms_keep_masks_and_workers_change_nothing(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    for workers in (1, 2):
        out = tmp_path / f"workers{workers}"
        run("annotate", phantom_dataset, "--out", out, "--rules", "--overwrite", "--workers", workers)
    assert folder_bytes(tmp_path / "workers1") == folder_bytes(tmp_path / "workers2")
    old, new = ShardReader(phantom_dataset), ShardReader(tmp_path / "workers1")
    for i in range(old.sample_count("train")):
        masks = new.masks("train", i)
        assert list(masks) == new.index.label_names
        assert all((mask == masks[name]).all() for name, mask in old.masks("train", i).items())
        assert old.image("train", i) == new.image("train", i)


def test_interrupted_annotation_goes_on(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run("annotate", plain, "--out", whole, "--rules", "--workers", 1)
    written = []
    real = annotation.write_shard

    def failing(folder: Path, file: str, content: object) -> int:
        if len(written) == 1:
            raise DataError("disk full")
        written.append(file)
        return real(folder, file, content)  # type: ignore[arg-type]

    monkeypatch.setattr(annotation, "write_shard", failing)
    with pytest.raises(DataError, match="disk full"):
        run("annotate", plain, "--out", out, "--rules", "--workers", 1)
    assert not (out / "index.json").exists()
    time = (out / written[0]).stat().st_mtime_ns
    monkeypatch.setattr(annotation, "write_shard", real)
    run("annotate", plain, "--out", out, "--rules", "--workers", 1)
    assert (out / written[0]).stat().st_mtime_ns == time
    assert folder_bytes(out) == folder_bytes(whole)
    (out / written[0]).write_bytes(b"")
    run("annotate", plain, "--out", out, "--rules", "--workers", 1)
    assert folder_bytes(out) == folder_bytes(whole)


def test_radgraph_reports_are_found_by_study(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "radgraph.json"
    node = {"tokens": "effusion", "label": "OBS-DA", "start_ix": 1, "end_ix": 1, "relations": []}
    path.write_text(json.dumps({"3.jpg": {"text": "No effusion .", "entities": {"1": node}}}))
    out = tmp_path / "out"
    result = run("annotate", plain, "--out", out, "--radgraph", path, "--workers", 1).stdout
    assert "1 of 12 samples have entities" in result
    assert "11 samples have no report" in result
    found = {m["study_id"]: m["entities"] for _, _, m in samples(out) if m["entities"]}
    assert found == {"3.jpg": [["unspecified", "effusion", 0]]}
    path.write_text(json.dumps({"other": {"text": "No effusion .", "entities": {"1": node}}}))
    with pytest.raises(DataError, match="none of its ids"):
        run("annotate", plain, "--out", tmp_path / "none", "--radgraph", path, "--workers", 1)


def test_radgraph_refuses_studies_that_patients_share(
    table: list[object], tmp_path: Path, map_file: Callable[..., Path]
) -> None:
    """Visit 1 of a patient is not visit 1 of another, and the file of RadGraph knows one "1" only."""
    csv = tmp_path / "pairs.csv"
    csv.write_text(
        "".join(f"{line},{'visit' if i == 0 else 1}\n" for i, line in enumerate(csv.read_text().splitlines()))
    )
    table[table.index("--map") + 1] = map_file("study_id: visit\n")
    run(*table, "--out", tmp_path / "visits")
    path = tmp_path / "radgraph.json"
    node = {"tokens": "effusion", "label": "OBS-DA", "start_ix": 1, "end_ix": 1, "relations": []}
    path.write_text(json.dumps({"1": {"text": "No effusion .", "entities": {"1": node}}}))
    with pytest.raises(DataError, match="several patients have one study id"):
        run("annotate", tmp_path / "visits", "--out", tmp_path / "out", "--radgraph", path, "--workers", 1)
    assert not (tmp_path / "out" / "index.json").exists()


def test_wrong_uses_are_one_clear_error(plain: Path, phantom_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="has entities already"):
        run("annotate", phantom_dataset, "--out", tmp_path / "a", "--rules", "--workers", 1)
    run("annotate", plain, "--out", out, "--rules", "--workers", 1)
    with pytest.raises(DataError, match="annotated already"):
        run("annotate", out, "--out", tmp_path / "b", "--rules", "--workers", 1)
    with pytest.raises(DataError, match="another folder"):
        run("annotate", plain, "--out", plain, "--rules", "--workers", 1)
    with pytest.raises(DataError, match="holds another dataset"):
        run("annotate", phantom_dataset, "--out", out, "--rules", "--overwrite", "--workers", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not touch")
    with pytest.raises(DataError, match="not empty"):
        run("annotate", plain, "--out", tmp_path / "full", "--rules", "--workers", 1)
    for options in ([], ["--rules", "--radgraph", tmp_path / "x.json"]):
        with pytest.raises(UsageError, match="choose one"):
            run("annotate", plain, "--out", tmp_path / "c", *options)
    with pytest.raises(DataError, match="cannot read"):
        run("annotate", plain, "--out", tmp_path / "d", "--radgraph", tmp_path / "x.json")
    tar = plain / Index.load(plain).shards[0].file
    tar.write_bytes(tar.read_bytes()[:-512] + b"x" * 512)
    with pytest.raises(DataError, match="differs from its hash"):
        run("annotate", plain, "--out", tmp_path / "e", "--rules", "--workers", 1)

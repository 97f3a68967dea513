"""`medvlp predict` and `medvlp embed`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import medvlp
from launcher.main import app
from medvlp.library import embedding
from shards.errors import DataError, UsageError
from shards.reader import ShardReader
from tests.export.saved import save_run, stored_at


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_predict_writes_a_table_and_overlays(run: Path, films: list[Path], tmp_path: Path) -> None:
    out, overlays = tmp_path / "table.csv", tmp_path / "overlays"
    words = ("--findings", "effusion, edema", "--out", out, "--overlays", overlays, "--device", "cpu")
    result = invoke("predict", run, *films, *words)
    assert result.exit_code == 0, result.exception
    table = pd.read_csv(out, index_col="image")
    expected = medvlp.load(run, "cpu").zero_shot(films, ["effusion", "edema"])
    np.testing.assert_allclose(table.to_numpy(), expected.to_numpy(), atol=1e-6)
    assert sorted(path.name for path in overlays.iterdir()) == [
        "0000-film0-edema.png", "0000-film0-effusion.png", "0001-film1-edema.png", "0001-film1-effusion.png",
    ]  # fmt: skip
    assert isinstance(invoke("predict", run, *films, *words).exception, UsageError)
    assert isinstance(invoke("predict", run, *films, "--out", out).exception, UsageError)
    taken = invoke("predict", run, *films, "--findings", "edema", "--out", out, "--overlays", films[0])
    assert "is not an empty folder" in str(taken.exception)


def test_predict_names_images_whose_names_are_not_utf8(run: Path, films: list[Path], tmp_path: Path) -> None:
    """Latin-1 names ended it after all the work, without a table."""
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    shutil.copy(films[0], named)
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9"))
    folder.mkdir()
    words = ("--findings", "edema", "--out", folder / "table.csv", "--overlays", folder / "seen")
    result = CliRunner().invoke(app, ["predict", str(run), str(named), *map(str, words), "--device", "cpu"])
    assert result.exit_code == 0, result.exception
    assert b"/caf\xe9.png," in (folder / "table.csv").read_bytes()
    assert [file.name for file in (folder / "seen").iterdir()] == ["0000-caf--edema.png"]


def check(file: Path, run: Path, data: Path) -> None:
    table = pq.read_table(file).to_pandas()
    whole = medvlp.open_dataset(data)
    assert table["key"].tolist() == whole.to_pandas()["key"].tolist()
    embedded = medvlp.load(run, "cpu").encode_image([sample.image for sample in whole]).numpy()
    np.testing.assert_allclose(np.stack(table["image"].to_list()), embedded, atol=1e-5)
    assert pq.read_schema(file).metadata[b"medvlp.corrupt"] == b"0"


def test_embed_writes_every_sample_once(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "BLOCK", 5)
    out = tmp_path / "all.parquet"
    result = invoke("embed", run, "--data", data, "--out", out, "--features", "--nproc", 1)
    assert result.exit_code == 0, result.exception
    check(out, run, data)
    assert len(pq.read_table(out)["features"][0]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]


def test_a_part_that_is_lost_is_no_shorter_file(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it was when two commands with one `--out` shared their folder of parts."""
    monkeypatch.setattr(embedding, "BLOCK", 5)
    join = embedding._join

    def lose_one(parts: Path, *rest: object) -> None:
        assert parts.name.startswith(".all.parquet.parts-")
        next(parts.glob("*.parquet")).unlink()
        join(parts, *rest)

    monkeypatch.setattr(embedding, "_join", lose_one)
    result = invoke("embed", run, "--data", data, "--out", tmp_path / "all.parquet", "--nproc", 1)
    assert isinstance(result.exception, DataError)
    assert "samples of 24: something else changed it" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_dataset_stored_at_another_size_is_said(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its images another part is embedded than of those the run has learned from."""
    save_run(data, tmp_path / "run")
    stored_at(tmp_path / "run", data, 48)
    result = invoke("embed", tmp_path / "run", "--data", data, "--out", tmp_path / "a.parquet", "--nproc", 1)
    assert result.exit_code == 0, result.exception
    (said,) = (record for record in caplog.records if "is not what" in record.getMessage())
    assert said.getMessage().endswith("was trained on: stored images of 32 pixels, not 48")
    assert said.levelname == "WARNING"


def test_what_has_no_report_has_no_embedding_of_one(run: Path, data: Path, tmp_path: Path) -> None:
    """It was the embedding of [CLS] and [SEP], the same for all of them."""
    silent, out = tmp_path / "data", tmp_path / "all.parquet"
    shutil.copytree(data, silent, ignore=shutil.ignore_patterns("tokens"))
    reader = ShardReader(silent)
    for position in (0, 2):
        shard, _, members = reader._members("train", position)
        start, size = members["json"]
        content = bytearray((silent / shard.file).read_bytes())
        metadata = bytes(content[start : start + size])
        for section in reader.metadata("train", position)["sections"]:
            metadata = metadata.replace(f'"{section}"'.encode(), f'"{section.upper()}"'.encode())
        content[start : start + size] = metadata
        (silent / shard.file).write_bytes(content)
    result = invoke("embed", run, "--data", silent, "--split", "train", "--out", out, "--nproc", 1)
    assert result.exit_code == 0, result.exception
    table = pq.read_table(out)
    assert [row is None for row in table["report"].to_pylist()[:4]] == [True, False, True, False]
    assert not any(row is None or len(row) != 8 for row in table["image"].to_pylist())
    whole = tmp_path / "whole.parquet"
    invoke("embed", run, "--data", data, "--split", "train", "--out", whole, "--nproc", 1)
    expected = pq.read_table(whole)["report"].to_pylist()
    for row, of in zip(table["report"].to_pylist(), expected, strict=True):
        assert row is None or np.allclose(row, of, atol=1e-6)


def damaged(data: Path, out: Path, places: Sequence[int]) -> Path:
    """The dataset with other bytes where the images of some of all samples begin."""
    shutil.copytree(data, out)
    reader = ShardReader(out)
    all_of = [(split, i) for split in reader.index.splits for i in range(reader.sample_count(split))]
    for split, i in (all_of[place] for place in places):
        shard, _, members = reader._members(split, i)
        with (out / shard.file).open("r+b") as tar:
            tar.seek(members["jpg"][0])
            tar.write(bytes(100))
    return out


def test_corrupt_samples_are_too_many_by_their_share_of_the_whole(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of one corrupt sample was judged by itself, and one of a few gave an error of its own."""
    monkeypatch.setattr(embedding, "BLOCK", 2)
    save_run(data, tmp_path / "run", "data.max_bad_fraction=0.15", "data.allow_changed=true")
    some = damaged(data, tmp_path / "some", [0, 1, 4])
    out = tmp_path / "some.parquet"
    result = invoke("embed", tmp_path / "run", "--data", some, "--out", out, "--nproc", 1)
    assert result.exit_code == 0, result.exception
    keys = medvlp.open_dataset(data).to_pandas()["key"].tolist()
    assert pq.read_table(out)["key"].to_pylist() == [keys[n] for n in range(24) if n not in (0, 1, 4)]
    assert pq.read_schema(out).metadata[b"medvlp.corrupt"] == b"3"
    many = damaged(data, tmp_path / "many", [0, 5, 10, 23])
    result = invoke("embed", tmp_path / "run", "--data", many, "--out", out, "--nproc", 1)
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith("4 of 24 samples read by this rank are corrupt")


def part(run: Path, data: Path, out: Path) -> None:
    embedding.BLOCK = 5
    embedding.embed_dataset(embedding.Request(run, str(data), out))


@pytest.mark.dist
def test_two_ranks_write_the_same_file(run: Path, data: Path, tmp_path: Path, gloo_pool) -> None:
    gloo_pool(2).run(part, run, data, tmp_path / "two.parquet")
    check(tmp_path / "two.parquet", run, data)

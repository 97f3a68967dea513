"""`medvlp predict` and `medvlp embed`."""

from __future__ import annotations

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


def part(run: Path, data: Path, out: Path) -> None:
    embedding.BLOCK = 5
    embedding.embed_dataset(embedding.Request(run, str(data), out))


@pytest.mark.dist
def test_two_ranks_write_the_same_file(run: Path, data: Path, tmp_path: Path, gloo_pool) -> None:
    gloo_pool(2).run(part, run, data, tmp_path / "two.parquet")
    check(tmp_path / "two.parquet", run, data)

"""A source registered from outside is a command with its options, and builds, with no edit elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launcher.commands import shards as shards_command
from launcher.main import app
from shards.errors import UsageError
from shards.reader import ShardReader
from shards.sources import registry
from shards.sources.base import RejectedRecord, Source, option
from shards.study import Study


@dataclass(frozen=True)
class ToyOptions:
    records: int = option("number of records", least=1)
    word: str = option("what the reports say", "clear")
    also: list[str] = option("more words", [])


class ToySource(Source):
    name = "toy"
    label_names = ("bright",)  # type: ignore[assignment]

    def __init__(self, options: ToyOptions, image_size: int) -> None:
        assert type(options) is ToyOptions  # else no worker process could unpickle the source
        self.options, self.image_size, self.label_names = options, image_size, ["bright"]
        self.arguments = {"records": options.records, "word": options.word}

    def __len__(self) -> int:
        return self.options.records

    def split_key(self, i: int) -> str:
        return f"p{i}"

    def load(self, i: int) -> list[Study]:
        if i == 1:
            raise RejectedRecord("toy reason")
        image = np.full((self.image_size,) * 2, i, dtype=np.uint8)
        text = " ".join([self.options.word, *self.options.also])
        return [Study(f"s{i}", f"p{i}", image, sections={"findings": text}, labels={"bright": i % 2})]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(registry.sources())
    monkeypatch.setattr(registry, "_REGISTRY", known)

    @registry.register("toy", ToyOptions)
    def open_toy(options: ToyOptions, image_size: int) -> ToySource:
        """Build from a toy."""
        return ToySource(options, image_size)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["shards", "build", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_it_stands_in_the_help_with_its_own_options_and_the_shared_ones(toy: None) -> None:
    assert "Build from a toy." in run("--help")
    text = run("toy", "--help")
    for expected in ("--records", "number of records", "required", "--word", "clear", "--image-size"):
        assert expected in text


def test_it_builds(toy: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--records", "20", "--also", "a", "--also", "b", "--image-size", "32", "--workers", "1")
    assert "1 rejected" in run("toy", *words, "--max-rejected", "0.2", "--out", str(out))
    reader = ShardReader(out)
    assert (reader.index.name, reader.index.label_names) == ("toy", ["bright"])
    assert reader.index.arguments["source"] == {"name": "toy", "records": 20, "word": "clear"}
    samples = [
        reader.metadata(split, i) for split in reader.index.splits for i in range(reader.sample_count(split))
    ]
    assert {sample["sections"]["findings"] for sample in samples} == {"clear a b"}
    assert len(samples) == 19
    assert json.loads((out / "rejected.jsonl").read_text())["reason"] == "toy reason"


def test_a_value_out_of_range_or_a_missing_one_is_refused(toy: None, tmp_path: Path) -> None:
    for words in (["--records", "0"], []):
        result = CliRunner().invoke(
            shards_command.app, ["build", "toy", *words, "--out", str(tmp_path / "x")]
        )
        assert result.exit_code == 2
        assert "--records" in result.output


def test_a_name_belongs_to_one_source(toy: None) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("toy", ToyOptions)(lambda options, image_size: ToySource(options, image_size))


def test_an_entry_point_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("broken", "no_such_module_of_ours", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    registry._import_sources.cache_clear()
    try:
        with pytest.raises(UsageError, match="'broken' \\(no_such_module_of_ours\\)"):
            registry.sources()
    finally:
        registry._import_sources.cache_clear()

"""The page about a dataset: what it says, what it must not hold, that it stands alone."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.main import app
from shards.errors import DataError
from shards.info import count_split
from shards.page import Bar, _edges, _histogram, dataset_page
from shards.reader import ShardReader
from shards.sources.phantom import PhantomSource
from tests.shards.test_overlap import PNG, Given, study
from tests.shards.toy_data import build

_VOID = {"meta", "img"}


class Balance(HTMLParser):
    """Collects tags that do not close, all attributes and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page") / "data"
    build(PhantomSource(studies=60, image_size=64, seed=4), root, PNG)
    return root


def test_it_says_what_the_dataset_holds(dataset: Path) -> None:
    reader = ShardReader(dataset)
    page = Balance(dataset_page(reader, samples=3))
    assert page.open == []
    text = " ".join(page.text.split())
    totals = reader.index.splits["train"]
    assert f"train {totals.samples} {totals.studies} {totals.patients}" in text
    values = count_split(reader, "train").labels["nodule"]
    share = values[1] / (values[1] + values[0])
    row = f"nodule {values[1]} / {values[0]} / {values[-1]} / {values[None]} {share:.1%}"
    assert row in text
    assert f"Apache-2.0 {sum(part.samples for part in reader.index.splits.values())}" in text
    for target in ("boxes", "masks", "phrases", "questions"):
        assert re.search(rf"{target} [1-9]", text), target
    assert "source.seed 4" in text


def test_it_stands_alone_and_runs_nothing(dataset: Path) -> None:
    page = Balance(dataset_page(ShardReader(dataset), samples=3))
    assert not page.tags & {"script", "link", "iframe", "object", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or (value or "").startswith("data:image/jpeg;base64,")
    images = [value for name, value in page.attributes if name == "src"]
    assert len(images) == len(ShardReader(dataset).index.splits)
    assert len([value for name, value in page.attributes if name == "alt" and value]) == len(images)


def test_without_samples_it_holds_neither_images_nor_text_nor_ids(tmp_path: Path) -> None:
    secret = replace(study("q", 1, text="Unmistakable words."), sections={"findings": "Unmistakable words."})
    build(Given([secret]), tmp_path / "a", PNG)
    out = tmp_path / "page.html"
    command = ["shards", "info", str(tmp_path / "a"), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--samples", "0"])
    assert result.exit_code == 0, result.output
    assert "no image and no report text" in result.output
    page = out.read_text()
    assert "data:" not in page
    for word in ("Unmistakable", "patient q", "study q"):
        assert word not in page
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "data:image/jpeg" in out.read_text()


def test_names_of_strangers_are_text_not_markup(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    source = Given([replace(study("a", 1), labels={name: 1}, view=name, license=name)])
    source.label_names = [name]
    build(source, tmp_path / "a", PNG)
    page = Balance(dataset_page(ShardReader(tmp_path / "a"), samples=0))
    assert "img" not in page.tags
    assert page.text.count(name) >= 2


def test_reasons_of_rejected_records_are_counted(dataset: Path, tmp_path: Path) -> None:
    build(PhantomSource(studies=4, image_size=64, seed=0), tmp_path / "a", PNG)
    lines = [
        {"record": n, "reason": reason} for n, reason in enumerate(["no report", "no report", "no image"])
    ]
    (tmp_path / "a/rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(Balance(dataset_page(ShardReader(tmp_path / "a"), samples=0)).text.split())
    assert "no report 2" in text
    assert "no image 1" in text


@pytest.mark.parametrize("line", ["[]", "{}", "{", "null"])
def test_a_damaged_list_of_rejected_records_is_named(tmp_path: Path, line: str) -> None:
    build(PhantomSource(studies=2, image_size=64, seed=0), tmp_path / "a", PNG)
    (tmp_path / "a/rejected.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"rejected\.jsonl is damaged"):
        dataset_page(ShardReader(tmp_path / "a"), samples=0)


def test_lengths_fall_into_equal_bars_and_a_last_one() -> None:
    lengths = [0, 1, 29, 30, 31, 32, 5000]
    edges = _edges([30] * 200)
    assert edges == list(range(0, 30, 2))
    bars = _histogram(lengths, edges)
    assert (bars[0], bars[-1]) == (Bar("0 to 1", 2, 0.4), Bar("28 or more", 5, 1.0))
    assert sum(bar.count for bar in bars) == len(lengths)
    assert [bar.count for bar in _histogram([], _edges([]))] == [0] * 15

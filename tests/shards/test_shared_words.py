"""A name that few patients' reports hold does not leave with a data set's vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from launcher.commands.shards import app
from shards.format import Index
from shards.images import encode_png
from tests.shards.toy_data import MAP, folder_bytes, write_csv

NAME = "Zyxwvutov"
PATIENTS = 60


@pytest.fixture
def table(tmp_path: Path) -> list[object]:
    """The command that builds two reports of each of sixty patients, the name in those of two of them."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "film.png").write_bytes(encode_png(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    rows = [
        {
            "id": str(number),
            "image": "film.png",
            "patient": f"p{number // 2}",
            "report": "FINDINGS: No effusion is seen."
            + (f" Read by {NAME}. {NAME} agrees." * 5 if number in (4, 5, 40) else ""),
        }
        for number in range(2 * PATIENTS)
    ]
    (tmp_path / "map.yaml").write_text(MAP + "id: id\n")
    csv = write_csv(tmp_path / "pairs.csv", rows)
    command = ["build", "table", "--table", csv, "--images", images, "--map", tmp_path / "map.yaml"]
    return [*command, "--image-size", 16, "--samples-per-shard", 10]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result


def pieces(dataset: Path) -> set[str]:
    """Pieces of the vocabulary longer than a character, without their mark."""
    vocabulary = json.loads((dataset / "tokenizer.json").read_text())["model"]["vocab"]
    return {piece.removeprefix("##") for piece in vocabulary if len(piece.removeprefix("##")) > 1}


def test_the_name_is_neither_in_the_vocabulary_nor_on_the_terminal(
    table: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    built = run(*table, "--out", out, "--workers", 1).stdout
    assert "fewer than 20 patients" in " ".join(built.split())
    found = pieces(out)
    assert {"effusion", "seen"} <= found
    assert not {piece for piece in found if piece in NAME.lower()}
    assert Index.load(out).arguments["min_patients"] == 20
    info = " ".join(run("info", out).stdout.split())
    assert "effusion" in info
    assert "0 words of fewer than 20 patients are not shown" in info
    assert NAME.lower() not in (built + info).lower()


def test_a_smaller_number_lets_it_in_and_info_counts_without_naming_it(
    table: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(*table, "--out", out, "--workers", 1, "--min-patients", 1)
    assert NAME.lower() in pieces(out)
    info = " ".join(run("info", out).stdout.split())
    assert "the rarest has 2" in info or "the rarest has 1" in info
    assert NAME.lower() not in info.lower()


def test_no_shared_word_leaves_characters_and_a_warning(table: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    built = run(*table, "--out", out, "--workers", 1, "--min-patients", PATIENTS + 1).stdout
    assert "vocabulary is single characters" in " ".join(built.split())
    assert pieces(out) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


def test_parts_and_processes_count_the_same_patients(table: list[object], tmp_path: Path) -> None:
    run(*table, "--out", tmp_path / "whole", "--workers", 1)
    for part in (2, 0, 1):
        run(*table, "--out", tmp_path / "parts", "--workers", 2, "--part", f"{part}/3")
    run("merge", tmp_path / "parts")
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "whole")

"""What an export says of its tokenizer, and that a rare name of the reports is not in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from launcher.main import app
from shards.images import encode_png
from tests.export.saved import save_run
from tests.shards.toy_data import MAP, write_csv

NAME = "Zyxwvutov"


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """`build(*more)`: a data set of 48 patients, two of whose reports hold the name."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "film.png").write_bytes(encode_png(np.arange(1024, dtype=np.uint16).reshape(32, 32)))
    texts = ["No effusion is seen." + (f" Read by {NAME}." * 5 if n in (4, 30) else "") for n in range(48)]
    rows = [
        {"id": str(n), "image": "film.png", "patient": f"p{n}", "report": text}
        for n, text in enumerate(texts)
    ]
    (tmp_path / "map.yaml").write_text(MAP + "id: id\n")
    csv = write_csv(tmp_path / "pairs.csv", rows)

    def built(*more: str) -> Path:
        command = ["shards", "build", "table", "--table", csv, "--images", images, "--image-size", 32]
        command += ["--map", tmp_path / "map.yaml", "--out", tmp_path / "data", "--workers", 1, *more]
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.exception
        return tmp_path / "data"

    return built


def exported(data: Path, tmp_path: Path, export: Callable[..., Result]) -> tuple[str, str]:
    """(card, everything else in the folder that is text, lower case)."""
    save_run(data, tmp_path / "run", "image.name=test_resnet")
    assert export(tmp_path / "run", tmp_path / "out").exit_code == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "tokenizer.json" for path in files)
    others = [path.read_bytes().decode("latin-1") for path in files if path.name != "README.md"]
    return (tmp_path / "out" / "README.md").read_text(), "\n".join(others).lower()


def test_a_rare_name_does_not_leave_with_the_export(
    build: Callable[..., Path], tmp_path: Path, export: Callable[..., Result]
) -> None:
    card, others = exported(build(), tmp_path, export)
    for start in range(len(NAME) - 2):
        assert f'"{NAME[start : start + 3].lower()}' not in others
        assert f"##{NAME[start : start + 3].lower()}" not in others
    assert NAME.lower() not in (card + others).lower()
    assert "trained on the reports of" in card
    assert "(train split of pairs)" in card
    assert "at least 20 patients" in card


def test_the_card_warns_of_words_of_single_patients(
    build: Callable[..., Path], tmp_path: Path, export: Callable[..., Result]
) -> None:
    card, others = exported(build("--min-patients", "1"), tmp_path, export)
    assert NAME.lower() in others
    assert "do not publish it if the reports are private" in card

"""`medvlp shards` as a user types it, on phantoms and on the real pairs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from launcher.commands.shards import app
from shards.errors import DataError, UsageError
from shards.format import Index
from shards.reader import ShardReader
from tests.shards.toy_data import Rows, folder_bytes, write_csv

PHANTOM = [
    "build",
    "phantom",
    "--studies",
    "40",
    "--image-size",
    "64",
    "--seed",
    "0",
    "--samples-per-shard",
    "10",
]


def run(*arguments: object, check: bool = True) -> Result:
    """Run a command; without `check` its error is in the result."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if check and result.exception is not None:
        raise result.exception
    return result


def test_phantom_build_verify_info_and_view(tmp_path: Path, phantom_dataset: Path) -> None:
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    built = run(*PHANTOM, "--out", out, "--workers", 1)
    assert "40 records, 0 rejected" in built.stdout
    expected = {name: data for name, data in folder_bytes(phantom_dataset).items() if name != "index.json"}
    assert {name: data for name, data in folder_bytes(out).items() if name != "index.json"} == expected
    assert Index.load(out).image_size == 64
    assert run("verify", out, "--workers", 1).stdout.endswith("ok\n")
    info = run("info", out).stdout
    for word in ("train", "cardiomegaly", "sentences", "PA"):
        assert word in info
    run("view", out, "--out", sheet, "--samples", 5, "--columns", 3)
    with Image.open(sheet) as image:
        assert image.width > 3 * 300
        assert image.height > 2 * 300
        assert len(image.convert("L").getcolors(256) or []) > 50


def test_contact_sheet_is_the_same_for_the_same_seed(tmp_path: Path, phantom_dataset: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("view", phantom_dataset, "--out", tmp_path / f"{name}.png", "--seed", seed, "--samples", 4)
    first, second, third = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == second != third


def test_parts_are_merged(tmp_path: Path, phantom_dataset: Path) -> None:
    for part in ("0/2", "1/2"):
        built = run(*PHANTOM, "--out", tmp_path, "--workers", 1, "--part", part)
        assert "shards merge" in built.stdout
    assert "40 records, 0 rejected" in run("merge", tmp_path).stdout
    assert Index.load(tmp_path).shards == Index.load(phantom_dataset).shards


def test_verify_lists_all_problems_and_fails(tmp_path: Path, phantom_dataset: Path) -> None:
    dataset = shutil.copytree(phantom_dataset, tmp_path / "copy")
    (dataset / "train-000000.tar").write_bytes(b"")
    (dataset / "train-000001.idx").unlink()
    result = run("verify", dataset, "--workers", 1, check=False)
    assert isinstance(result.exception, DataError)
    assert result.exception.exit_code == 3
    assert "train-000000.tar: content differs" in result.stdout
    assert "train-000001.idx: missing" in result.stdout


def test_too_many_rejected_fails_after_the_dataset_is_written(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: Callable[..., Path]
) -> None:
    rows[0]["report"] = ""
    table = write_csv(tmp_path / "pairs.csv", rows)
    command = ["build", "table", "--table", table, "--images", image_folder, "--map", map_file()]
    out = tmp_path / "out"
    result = run(*command, "--out", out, "--image-size", 32, "--workers", 1, check=False)
    assert isinstance(result.exception, DataError)
    assert "1 of 12 records were rejected" in str(result.exception)
    assert "1 x missing report" in result.stdout
    assert sum(totals.samples for totals in Index.load(out).splits.values()) == 11
    run(*command, "--out", out, "--image-size", 32, "--workers", 1, "--max-rejected", 0.1)


def test_leaking_source_is_warned_about_when_built(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: Callable[..., Path]
) -> None:
    for number, row in enumerate(rows):
        row["split"] = "test" if number == 1 else "train"
    table = write_csv(tmp_path / "pairs.csv", rows)
    command = [
        "build",
        "table",
        "--table",
        table,
        "--images",
        image_folder,
        "--map",
        map_file("split: split\n"),
    ]
    assert "1 patients are in more than one split" in run(*command, "--out", tmp_path / "out").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "3/2"], "--part"),
        (["--part", "x"], "--part"),
        (["--split", "train=2"], "--split"),
        (["--hash-key", "key"], "--hash-key without --hash-ids"),
    ],
)
def test_wrong_option_is_one_clear_error(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*PHANTOM, "--out", tmp_path, *arguments, check=False)
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    assert message in str(result.exception)
    assert folder_bytes(tmp_path) == {}


def test_an_unknown_image_format_is_refused(tmp_path: Path) -> None:
    result = run(*PHANTOM, "--out", tmp_path, "--image-format", "bmp", check=False)
    assert result.exit_code == 2
    assert "--image-format" in result.output


def test_missing_dataset_is_one_clear_error(tmp_path: Path) -> None:
    for command in (["verify"], ["info"], ["view", "--out", tmp_path / "x.png"], ["merge"]):
        result = run(command[0], tmp_path / "nowhere", *command[1:], check=False)
        assert isinstance(result.exception, DataError), command


def test_real_pairs_through_the_documented_map(shared: Path, repository: Path, tmp_path: Path) -> None:
    readme = (repository / "shards" / "sources" / "README.md").read_text()
    text = readme.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "map.yaml").write_text(text)
    pairs, out = shared / "data" / "pairs", tmp_path / "out"
    command = [
        "build",
        "table",
        "--table",
        pairs / "pairs.csv",
        "--images",
        pairs,
        "--map",
        tmp_path / "map.yaml",
    ]
    assert "249 records, 0 rejected" in run(*command, "--out", out, "--workers", 1).stdout
    assert run("verify", out, "--workers", 1).stdout.endswith("ok\n")
    reader = ShardReader(out)
    assert {split: totals.samples for split, totals in reader.index.splits.items()} == {
        "train": 166,
        "valid": 28,
        "test": 55,
    }
    assert yaml.safe_load(text)["split"] == "split"
    licences = {reader.metadata("train", i)["license"] for i in range(166)}
    assert "CC BY-NC-SA" in licences
    assert "" not in licences


def test_info_shows_names_in_brackets_as_they_are(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: Callable[..., Path]
) -> None:
    """They were taken for markup: left out, or an error."""
    for row in rows:
        row["view"] = "[PA]"
    labels = (
        "labels: {'[/mass]': {column: patient, equals: p0}, 'nodule [left]': {column: patient, equals: p1}}"
    )
    table = ("--table", write_csv(tmp_path / "t.csv", rows), "--images", image_folder)
    run("build", "table", *table, "--map", map_file(f"view: view\n{labels}\n"), "--out", tmp_path / "out")
    shown = run("info", tmp_path / "out").stdout
    assert all(name in shown for name in ("[PA]", "[/mass]", "nodule [left]"))

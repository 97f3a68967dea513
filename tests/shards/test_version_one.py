"""Datasets of format version 1 are read, checked, described and annotated; nothing is added to them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launcher.main import app
from shards.build import BuildOptions
from shards.build_state import BuildPlan
from shards.errors import DataError
from shards.format import FORMAT_VERSION, Index
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.sources.phantom import PhantomSource
from shards.verify import verify
from tests.shards.toy_data import build, folder_bytes
from tests.shards.version_one import BOX, LABELS, MASK, write_version_one


@pytest.fixture
def old(tmp_path: Path, phantom_dataset: Path) -> Path:
    return write_version_one(tmp_path / "old", (phantom_dataset / "tokenizer.json").read_bytes())


def test_metadata_have_what_version_1_lacks_as_empty(old: Path) -> None:
    reader = ShardReader(old)
    metadata = reader.metadata("train", 0)
    assert metadata["boxes"] == [BOX | {"side": "", "reader": ""}]
    assert metadata["extra"] == {"kept": 0}
    for name in ("masks", "anatomy", "phrases", "questions", "lists"):
        assert metadata[name] == []
    assert reader.read("train", 0)[2] == metadata


def test_its_index_mask_gives_the_masks_it_shows(old: Path) -> None:
    reader = ShardReader(old)
    masks = reader.masks("train", 0)
    assert list(masks) == ["mass", "nodule"]
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, LABELS.index(name) + 1 == MASK)
    assert reader.masks("train", 1) == {}


def test_verify_info_and_view_read_it(old: Path, tmp_path: Path) -> None:
    assert verify(old) == []
    for command in (["info", old], ["view", old, "--split", "train", "--out", tmp_path / "sheet.png"]):
        result = CliRunner().invoke(app, ["shards", *map(str, command)])
        assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(app, ["shards", "info", str(old)]).output
    assert "format version 1" in " ".join(shown.split())


def test_verify_still_finds_what_is_wrong_with_it(old: Path) -> None:
    tar = old / "train-000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b'"width": 6.0', b'"width":"6.0', 1).replace(b"\x00IEND", b"\x00IENX"))
    problems = verify(old)
    assert any(problem.startswith("train-000000.tar: content differs") for problem in problems)
    assert any("its metadata cannot be used" in problem for problem in problems)


def test_annotating_it_gives_a_dataset_of_the_version_builds_write(old: Path, tmp_path: Path) -> None:
    before = folder_bytes(old)
    result = CliRunner().invoke(
        app, ["shards", "annotate", str(old), "--out", str(tmp_path / "new"), "--rules", "--overwrite"]
    )
    assert result.exit_code == 0, result.output
    assert folder_bytes(old) == before
    assert Index.load(tmp_path / "new").version == FORMAT_VERSION
    assert verify(tmp_path / "new") == []
    was, now = ShardReader(old), ShardReader(tmp_path / "new")
    for split, i in (("train", 0), ("train", 1), ("test", 2)):
        masks = now.masks(split, i)
        assert now.metadata(split, i)["masks"] == list(masks) == list(was.masks(split, i))
        for name, mask in was.masks(split, i).items():
            np.testing.assert_array_equal(masks[name], mask)
        same = {"boxes", "labels", "sections", "extra"}
        assert {name: now.metadata(split, i)[name] for name in same} == {
            name: was.metadata(split, i)[name] for name in same
        }


@pytest.mark.parametrize("finished", [True, False])
def test_a_build_does_not_go_on_with_shards_of_another_version(tmp_path: Path, finished: bool) -> None:
    source, options = PhantomSource(4, 32, 0), BuildOptions(image=StoredImage(size=32))
    build(source, tmp_path / "out", options)
    index = Index.load(tmp_path / "out")
    if finished:
        old = dataclasses.replace(index, version=1)
        (tmp_path / "out" / "index.json").write_bytes(old.to_json())
    else:
        (tmp_path / "out" / "index.json").unlink()
        plan = BuildPlan("phantom", "phantom", [], 32, 4, [], None, 100, 1, index.arguments)
        (tmp_path / "out" / ".build").mkdir()
        stated = dataclasses.asdict(plan)
        del stated["version"]  # as programs wrote it that knew one version only
        (tmp_path / "out" / ".build" / "plan.json").write_text(json.dumps(stated))
    with pytest.raises(DataError, match="format version 1, this program writes 2; choose another --out"):
        build(source, tmp_path / "out", options)


def test_version_2_members_and_fields_do_not_belong_into_it(old: Path) -> None:
    index = json.loads((old / "index.json").read_text()) | {"version": 2}
    (old / "index.json").write_text(json.dumps(index))
    problems = verify(old)
    assert any("mask.png' does not belong there" in problem for problem in problems)
    assert any("missing field 'phrases'" in problem for problem in problems)
    with pytest.raises(DataError, match="missing field 'masks'"):
        ShardReader(old).metadata("train", 0)

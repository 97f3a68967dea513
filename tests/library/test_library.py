"""`import medvlp`: what notebooks call, with every example of its docstrings."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import medvlp
from launcher.main import app
from medvlp.data.text import Tokenizer
from medvlp.evaluation.features import load_models
from medvlp.library import dataset, images, model
from medvlp.library.loading import LoadError
from medvlp.runs import saved_run
from medvlp.runs.identity import DataRecord, RunIdentity
from medvlp.runs.manifest import Manifest
from shards.errors import DataError, UsageError
from shards.format import IMAGE_LIMIT, Index
from tests.export.saved import save_run


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, medvlp; medvlp.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", [medvlp, model, dataset])
def test_the_examples_run(module: Any, run: Path, data: Path, films: list[Path]) -> None:
    names = {
        "medvlp": medvlp, "run": run, "films": films, "folder": data,
        "model": medvlp.load(run, "cpu"), "dataset": medvlp.open_dataset(data),
    }  # fmt: skip
    found = doctest.DocTestFinder().find(module, extraglobs=names)
    failed = sum(doctest.DocTestRunner().run(example).failed for example in found)
    assert sum(len(example.examples) for example in found) >= 2
    assert not failed


def test_every_public_function_has_an_example() -> None:
    for kind in (medvlp.Model, medvlp.Dataset, model.Grounding):
        for name, value in vars(kind).items():
            if (callable(value) or isinstance(value, property)) and not name.startswith("_"):
                assert ">>>" in (value.__doc__ or ""), f"{kind.__name__}.{name}"
    functions = [name for name in medvlp.__all__ if not isinstance(getattr(medvlp, name), type)]
    assert functions == ["load", "open_dataset"]
    for name in functions:
        assert ">>>" in getattr(medvlp, name).__doc__, name


def test_images_are_seen_as_evaluation_sees_them(run: Path, data: Path) -> None:
    """A stored sample given as array, tensor or file has the embedding that evaluation computes."""
    found, loaded = medvlp.open_dataset(data, "test"), medvlp.load(run, "cpu")
    source = saved_run.locate(run)
    config = saved_run.load_config(source, [])
    tokenizer = saved_run.load_tokenizer(source, config)
    from medvlp.data.cache import open_reader
    from medvlp.data.loader import evaluation_loader

    batch = next(iter(evaluation_loader(config, open_reader(config.data), tokenizer, "test", 4)))
    expected = load_models(source, config, tokenizer, torch.device("cpu"))["trained"]
    with torch.no_grad():
        wanted = expected.encode_image(batch.image)
        texts = expected.encode_text(batch.text)
    pictures = [found[number].image for number in range(3)]
    torch.testing.assert_close(loaded.encode_image(pictures), wanted)
    torch.testing.assert_close(loaded.encode_image([torch.from_numpy(one)[None] for one in pictures]), wanted)
    torch.testing.assert_close(loaded.encode_image(torch.from_numpy(np.stack(pictures))[:, None]), wanted)
    joined = ["\n".join(found[n].metadata["sections"][s] for s in config.data.sections
                        if s in found[n].metadata["sections"]) for n in range(3)]  # fmt: skip
    torch.testing.assert_close(loaded.encode_text(joined), texts)


def test_an_export_gives_what_its_run_gives(run: Path, exported: Path, films: list[Path]) -> None:
    one, other = medvlp.load(run, "cpu"), medvlp.load(exported, "cpu")
    torch.testing.assert_close(one.encode_image(films), other.encode_image(films))
    texts = ["no pleural effusion", "the heart is enlarged"]
    torch.testing.assert_close(one.encode_text(texts), other.encode_text(texts))


def test_an_export_sees_the_part_of_an_image_that_its_run_sees(
    data: Path, tmp_path: Path, films: list[Path]
) -> None:
    """Datasets are stored larger than the view, which is the middle of them."""
    run, out = tmp_path / "run", tmp_path / "out"
    save_run(data, run)
    tokenizer = Tokenizer.load(None, str(data))
    record = replace(DataRecord.of(Index.load(str(data)), "train"), image_size=48)
    identity = RunIdentity(tokenizer.content, tokenizer.special, None, (record,))
    identity.write(run, tokenizer)
    (folder,) = (run / "checkpoints").iterdir()
    manifest = replace(Manifest.read(folder), identity=identity.summary())
    (folder / "manifest.json").write_text(manifest.to_json())
    assert CliRunner().invoke(app, ["export", str(run), "--out", str(out)]).exit_code == 0
    one, other = medvlp.load(run, "cpu"), medvlp.load(out, "cpu")
    assert one._seen(films[0]).where.width == 32  # of 48
    described = json.loads((out / "image" / "config.json").read_text())
    assert described["pretrained_cfg"]["crop_pct"] == pytest.approx(32 / 48), (
        "as timm's transform of evaluation"
    )
    assert np.array_equal(one._seen(films[0]).view, other._seen(films[0]).view)
    torch.testing.assert_close(one.encode_image(films), other.encode_image(films))
    heads = out / "heads.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(heads), heads)
    with pytest.raises(LoadError, match=r"does not say which part of an image .*: export the run again"):
        medvlp.load(out, "cpu")


def test_a_query_may_be_as_long_as_a_report(run: Path) -> None:
    loaded = medvlp.load(run, "cpu")
    words = "the heart is enlarged and there is no pleural effusion " * 9
    texts = loaded.encode_text([words, "no"], clean=False)
    assert loaded.nearest(words, texts, 1)[0].position == 0


def test_published_quirks_of_the_text_encoder_survive_an_export(data: Path, tmp_path: Path) -> None:
    save_run(data, tmp_path / "run", "text.positions=false", "text.token_types=false", "text.layers=1")
    words = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 0
    one, other = (medvlp.load(tmp_path / place, "cpu") for place in ("run", "out"))
    torch.testing.assert_close(
        one.encode_text("the heart is enlarged"), other.encode_text("the heart is enlarged")
    )


def test_zero_shot_scores_are_those_of_the_task(run: Path, films: list[Path]) -> None:
    loaded = medvlp.load(run, "cpu")
    own = {"edema": medvlp.Prompts(("edema",), ("no edema",))}
    table = loaded.zero_shot(films, own)
    edema, none = loaded.encode_text(["edema", "no edema"], clean=False)
    expected = loaded.encode_image(films) @ (edema - none)
    np.testing.assert_allclose(table["edema"].to_numpy(), expected.numpy(), atol=1e-6)
    assert table.index.tolist() == [str(film) for film in films]
    with pytest.raises(UsageError, match="no prompts for 'Other'"):
        loaded.zero_shot(films, ["Other"])


def test_a_map_lies_over_the_image_it_is_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = medvlp.load(run, "cpu")
    film = np.zeros((40, 90), dtype=np.uint8)

    def corner(image: torch.Tensor, prompts: Any) -> torch.Tensor:
        grid = torch.zeros(1, 1, 8, 8)
        grid[0, 0, 4, 0] = 1  # half-way down, at the left edge
        return grid

    monkeypatch.setattr(loaded.method, "ground", corner)
    found = loaded.ground(film, "effusion")
    row, column = found.peak
    assert found.map.shape == (40, 90)
    assert column < 90 / 8, "the left edge of the square is that of the film"
    assert 15 <= row <= 30, "the padding above a broad film is no part of it"
    assert found.overlay().shape == (40, 90, 3)


def test_what_is_outside_the_crop_has_no_value() -> None:
    film = np.full((100, 100), 128, dtype=np.uint8)
    seen = images.see(film, stored=64, size=32, crop="center")
    laid = seen.laid_out(np.ones((4, 4)))
    assert np.isnan(laid[0, 0])
    assert laid[50, 50] == 1
    assert 0.2 < np.isfinite(laid).mean() < 0.3


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((4, 4)), "8-bit"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "shape"),
        (np.zeros((0, 4), dtype=np.uint8), "shape"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, told: str, run: Path) -> None:
    with pytest.raises(UsageError, match=told):
        medvlp.load(run, "cpu").encode_image(image)


def test_files_are_named(run: Path, tmp_path: Path) -> None:
    loaded = medvlp.load(run, "cpu")
    (tmp_path / "film.png").write_bytes(b"no image")
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", IMAGE_LIMIT + 1)
    for name, reason in (("film", "image"), ("gone", "cannot be read"), ("huge", "more than the limit")):
        with pytest.raises(DataError, match=rf"{name}\.png: .*{reason}"):
            loaded.encode_image(tmp_path / f"{name}.png")


def test_a_dataset_as_table_and_by_number(data: Path) -> None:
    whole, train = medvlp.open_dataset(data), medvlp.open_dataset(data, "train")
    table = whole.to_pandas()
    assert table["split"].value_counts()["train"] == len(train)
    assert table["key"].is_unique
    assert whole[-1].key == table["key"].iloc[-1]
    assert whole[len(train)].key == table["key"].iloc[len(train)]
    with pytest.raises(IndexError):
        whole[len(whole)]
    with pytest.raises(DataError, match="no split"):
        medvlp.open_dataset(data, "nowhere")
    loader = torch.utils.data.DataLoader(train.to_torch(), batch_size=3)
    pictures, labels, reports = next(iter(loader))
    assert pictures.shape == (3, 1, 32, 32)
    assert labels.shape == (3, len(whole.label_names))
    assert len(reports) == 3

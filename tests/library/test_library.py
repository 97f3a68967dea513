"""`import medvlp`: what notebooks call, with every example of its docstrings."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import medvlp
from launcher.main import app
from medvlp.data.transforms import evaluation_view
from medvlp.evaluation.features import load_models
from medvlp.evaluation.heads.classification import Classification
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.heads.segmentation import Segmentation
from medvlp.library import dataset, images, loading, model
from medvlp.library.loading import LoadError
from medvlp.runs import saved_run
from medvlp.runs.identity import DataRecord, IdentityError
from shards.dicom import read_dicom
from shards.errors import DataError, NotFiniteError, UsageError
from shards.format import IMAGE_LIMIT, Index
from shards.images import fit_square
from tests.export.saved import save_run, stored_at
from tests.fixtures import dicom


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
    stored_at(run, data, 48)
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


def test_an_image_is_seen_as_a_dataset_stored_smaller_than_the_view_shows_it(
    data: Path, tmp_path: Path, films: list[Path]
) -> None:
    """Training has seen it made small and enlarged again."""
    run, out = tmp_path / "run", tmp_path / "out"
    save_run(data, run)
    stored_at(run, data, 24)
    assert CliRunner().invoke(app, ["export", str(run), "--out", str(out)]).exit_code == 0
    described = json.loads((out / "image" / "config.json").read_text())
    assert described["pretrained_cfg"]["crop_pct"] == 1
    pixels = np.asarray(cv2.imread(str(films[0]), cv2.IMREAD_GRAYSCALE), dtype=np.uint8)
    expected, _ = evaluation_view(fit_square(pixels, 24)[0], 32, "center")
    for place in (run, out):
        seen = medvlp.load(place, "cpu")._seen(films[0])
        assert np.array_equal(seen.view, expected)
        assert np.isfinite(seen.laid_out(np.ones((4, 4)))).all()
    stored_at(run, data, 0)
    with pytest.raises(IdentityError, match=r"image_size of its .* is no side in pixels"):
        medvlp.load(run, "cpu")


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
    one = loaded.zero_shot(films, "edema")
    assert one.equals(loaded.zero_shot(films, ["edema"])), "a column, not one for each letter"
    with pytest.raises(UsageError, match="no prompts for 'Other'"):
        loaded.zero_shot(films, "Other")


RESNET = "image.name=test_resnet"


@pytest.mark.parametrize(
    ("words", "drifting", "moved"),
    [
        ((), False, True),
        (("image.frozen=true",), False, False),
        (("image.frozen=true",), True, False),  # a transformer has no batch norms
        (("image.frozen=true", RESNET), False, False),
        (("image.frozen=true", RESNET), True, True),
    ],
)
def test_images_are_not_compared_with_texts_after_a_task_has_moved_them(
    words: tuple[str, ...], drifting: bool, moved: bool, data: Path, tmp_path: Path, films: list[Path]
) -> None:
    """Zero-shot scores of a fine-tuned run were those of an encoder and of texts that no longer fit."""
    save_run(data, tmp_path / "run", *words)
    found = loading.read_model(tmp_path / "run")
    head = torch.nn.Linear(64, 1)
    objective: SupervisedObjective = (
        Segmentation(found.method, head, [0], "medslip", [0.0], drifting)  # type: ignore[arg-type]
        if drifting
        else Classification(found.method, head, [0], "multi_label", [0.0])
    )
    found.config.task = "fine-tuning"
    loaded = medvlp.Model(replace(found, moved=loading._moves_method(objective.eval())), torch.device("cpu"))
    assert not any(part.training for part in loaded.method.modules())
    among = loaded.encode_image(films)
    asked = (
        lambda: loaded.zero_shot(films, ["edema"]),
        lambda: loaded.similarity(films, "edema"),
        lambda: loaded.ground(films[0], "edema"),
        lambda: loaded.nearest("edema", among),
    )
    for ask in asked:
        if moved:
            with pytest.raises(UsageError, match=r"has learned task fine-tuning, .* load the pre-training"):
                ask()
        else:
            ask()
    assert loaded.nearest(films[1], among, 1)[0].similarity == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("part", ["image_encoder", "text_encoder"])
def test_a_network_that_has_diverged_says_so(part: str, run: Path, films: list[Path]) -> None:
    """The table was one of empty cells."""
    loaded = medvlp.load(run, "cpu")
    next(loaded.method.get_submodule(part).parameters()).data.fill_(float("nan"))
    for ask in (lambda: loaded.zero_shot(films, ["edema"]), lambda: loaded.ground(films[0], "edema")):
        with pytest.raises(
            NotFiniteError, match=r"network of first are NaN or infinite: .* earlier checkpoint"
        ):
            ask()


def test_a_device_that_is_not_there_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, told in (("cuda", "no usable CUDA device"), ("gpu", "there are auto, cpu and cuda")):
        with pytest.raises(UsageError, match=told):
            medvlp.load(run, device)
    assert medvlp.load(run, "auto").device.type == "cpu"


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


@pytest.mark.parametrize("window", ["max", "equalize"])
def test_dicom_films_are_shown_as_those_of_the_training_were(
    data: Path, window: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dark films, as a detector of 12 bits leaves them, are black without that."""
    film = tmp_path / "film.dcm"
    pixels = np.random.default_rng(0).integers(0, 900, (40, 40), dtype=np.uint16)
    film.write_bytes(dicom.write(pixels, 12))
    built = tmp_path / "built"
    shutil.copytree(data, built)
    index = json.loads((built / "index.json").read_text())
    index["arguments"]["source"] = {"name": "rsna", "options": {"window": window}}
    (built / "index.json").write_text(json.dumps(index))
    save_run(built, tmp_path / "run")
    stored_at(tmp_path / "run", built, 32)
    words = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 0
    shown = {kind: read_dicom(film.read_bytes(), kind).pixels for kind in ("auto", "max", "equalize")}
    assert len({of.tobytes() for of in shown.values()}) == 3
    for place in ("run", "out"):
        loaded = medvlp.load(tmp_path / place, "cpu")
        assert loaded._seen(film).pixels.tolist() == shown[window].tolist()
    assert not caplog.messages
    assert medvlp.load(tmp_path / "run", "cpu", "auto")._seen(film).pixels.tolist() == shown["auto"].tolist()
    with pytest.raises(UsageError, match="window film: there are auto, max, equalize"):
        medvlp.load(tmp_path / "run", "cpu", "film")
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    del identity["data"][0]["window"]  # as a run of before has it
    (tmp_path / "run" / "identity.json").write_text(json.dumps(identity))
    before = medvlp.load(tmp_path / "run", "cpu")
    for _ in range(2):
        assert before._seen(film).pixels.tolist() == shown["auto"].tolist()
    assert len([line for line in caplog.messages if "does not say how the DICOM films" in line]) == 1


def test_images_of_mimic_cxr_jpg_were_equalised(data: Path) -> None:
    index = Index.load(data)
    assert DataRecord.of(index, "train").window == "auto"
    index = replace(index, arguments={"source": {"name": "mimic-cxr", "options": {}}})
    assert DataRecord.of(index, "train").window == "equalize"
    for strange in ({"source": "mimic-cxr"}, {"source": {"name": "dicom", "options": ["max"]}}):
        assert DataRecord.of(replace(index, arguments=strange), "train").window is None


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

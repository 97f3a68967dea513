"""`medvlp export`: the folder, the model card, which checkpoint, and what is refused."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor
from typer.testing import Result

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.text import Tokenizer
from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report import results
from medvlp.export.card import _start as card_start
from medvlp.export.folder import ExportError, new_folder
from medvlp.methods.base import Method, StepOutput
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.registry import REGISTRY, Entry
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs.errors import CheckpointError, RunFolderError
from medvlp.runs.identity import RunIdentity
from medvlp.runs.start import Start
from shards.reader import ShardReader
from tests.export.saved import save_run
from tests.training.tiny import TinyMethod


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_run(data, folder, "image.name=test_resnet", "image.resize_to=40", steps=(4, 9))
    return folder


def python_block(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("overrides", [(), ("image.mean=[0.4,0.5,0.6]",)], ids=["gray", "each channel"])
@torch.no_grad()
def test_the_code_of_the_card_runs_and_gives_the_features(
    overrides: tuple[str, ...],
    data: Path,
    tmp_path: Path,
    export: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = save_run(data, tmp_path / "run", "image.name=test_resnet", "image.resize_to=40", *overrides)
    assert export(tmp_path / "run", tmp_path / "out").exit_code == 0
    film = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "out" / "film.png"), film)
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, object] = {}
    exec(python_block((tmp_path / "out" / "README.md").read_text()), names)
    expected = method.image_features(torch.from_numpy(film)[None, None])
    torch.testing.assert_close(names["image_features"], expected, rtol=1e-5, atol=1e-5)
    text = Tokenizer.load(None, data).tokenize([["no pleural effusion"]], 12)
    torch.testing.assert_close(names["text_features"], method.text_encoder(text).hidden)
    assert isinstance(names["heads"], dict)
    assert "alignment.image_head" in " ".join(names["heads"])


def test_an_export_shows_how_far_it_is(
    run: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = export(run, tmp_path / "log").stderr
    said = [line.partition(":")[0].partition(" ")[0] for line in plain.splitlines()]
    assert [word for word in said if word in ("loading", "image/", "text/")] == ["loading", "image/", "text/"]
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = export(run, tmp_path / "terminal").stderr
    assert "exporting step-00000009" in shown
    assert "4/4" in shown


def test_the_card_says_what_was_trained_on_what(run: Path, data: Path, tmp_path: Path, export) -> None:
    assert export(run, tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    reader = ShardReader(data)
    totals = reader.index.splits["train"]
    for told in (
        "# tiny", "mgca", "test_resnet", "bert", "9 optimiser steps", "Not for clinical use", "torch 9.9",
        f"{totals.samples} samples", reader.index.fingerprint, "Apache-2.0", "72, 8 a step",
        "float32 master weights", "resized to 40×40", "cut at 12 tokens", "None is stored with the run",
        "All weights were trained from scratch", "| `method.embedding` | 8 |", "alignment.word_head",
    ):  # fmt: skip
        assert told in card, told
    config = (tmp_path / "out" / "config.yaml").read_bytes()
    assert config == (run / "config.yaml").read_bytes()
    for split, count in reader.index.splits.items():
        for number in range(count.samples):
            sample = reader.metadata(split, number)
            for private in (sample["patient_id"], sample["study_id"], *sample["sentences"]):
                assert private not in card
                assert private.encode() not in config


def test_the_card_names_the_run_that_training_began_with(
    run: Path, data: Path, tmp_path: Path, export
) -> None:
    """It said "trained from scratch", and the licence of an import was lost at the first further training."""
    imported = {
        "title": "MGCA",
        "file": "vit.ckpt",
        "sha256": "0a1b",
        "licence": "ask its authors.",
        "stored_side": "256",
    }
    tokenizer = Tokenizer.load(None, data)
    content = tokenizer.content, tokenizer.special, None, ()
    first = RunIdentity(*content, origin=imported)
    began = Start(SimpleNamespace(run=tmp_path / "import", stored=(first, tokenizer))).origin
    told = {key: of for key, of in imported.items() if key != "stored_side"}
    assert began == {"run": "import", **told}
    second = RunIdentity(*content, start_origin=began)
    again = Start(SimpleNamespace(run=tmp_path / "tuned", stored=(second, tokenizer))).origin
    assert again == {"run": "tuned", **told}
    assert Start(SimpleNamespace(run=tmp_path / "old", stored=None)).origin == {"run": "old"}
    assert second.summary() != RunIdentity(*content).summary(), "the manifest vouches for it"

    copy = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["train"]["start"] = "runs/import"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert export(copy, tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Training started from the weights of another run (`train.start`)" in card
    assert "from scratch" not in card
    said = card_start(again)
    assert "the weights of the run tuned" in said
    assert "goes back to MGCA (vit.ckpt, sha256 `0a1b`)" in said
    assert said.endswith("licence of those weights: ask its authors")


@pytest.mark.parametrize(
    ("step", "told"), [(9, "| trained | 0.750 (0.70–0.80) |"), (4, "is of step 4, not of")]
)
def test_the_evaluation_of_these_very_weights_is_in_the_card(
    step: int, told: str, run: Path, tmp_path: Path, export
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    evaluation = results.Evaluation(
        model={"name": "tiny", "run": "x", "checkpoint": "y", "step": step},
        data={"name": "phantom", "fingerprint": "f", "split": "test"},
        settings={"uncertain": "exclude"},
        results={"zero-shot": {"trained": {"auroc/macro": Estimate(0.75, 0.7, 0.8)}}},
        notes={"zero-shot": {"threshold_split": "valid"}},
    )
    results.write(evaluation, copy / "evaluation.json")
    assert export(copy, tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert told in card
    assert ("AUROC macro" in card) == (step == 9)


def test_which_checkpoint_is_exported(run: Path, tmp_path: Path, export) -> None:
    def exported(source: Path, *more: str) -> dict[str, Tensor]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        result = export(source, out, *more)
        assert result.exit_code == 0, result.exception
        assert str(out) in result.output
        return safetensors.torch.load_file(out / "heads.safetensors")

    copy = shutil.copytree(run, tmp_path / "run")
    newest = exported(copy)
    old = exported(copy, "--checkpoint", "step-00000004")
    name = next(name for name in newest if name.endswith("weight"))
    assert not torch.equal(newest[name], old[name])
    weights = copy / "checkpoints" / "step-00000009" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert torch.equal(exported(copy)[name], old[name]), "a damaged checkpoint is passed over"
    assert torch.equal(exported(copy / "checkpoints" / "step-00000004")[name], old[name])
    for arguments in ((copy, "--checkpoint", "step-00000009"), (weights.parent,)):
        result = export(arguments[0], tmp_path / "never", *arguments[1:])
        assert isinstance(result.exception, CheckpointError)
        assert "is damaged" in str(result.exception)
    result = export(copy, tmp_path / "never", "--checkpoint", "step-5")
    assert isinstance(result.exception, RunFolderError)
    assert not (tmp_path / "never").exists()


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(run: Path, tmp_path: Path, export) -> None:
    for name in ("file", "used/file", "empty/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "empty" / "file").unlink()
    for name in ("file", "used"):
        result = export(run, tmp_path / name)
        assert isinstance(result.exception, ExportError)
        assert "is not an empty folder" in str(result.exception)
    assert (tmp_path / "file").read_text() == (tmp_path / "used" / "file").read_text() == "mine"
    assert export(run, tmp_path / "empty").exit_code == 0
    assert (tmp_path / "empty" / "image" / "config.json").is_file()
    assert isinstance(export(run, "/dev/null/out").exception, ExportError)


def fill_the_disk(out: Path) -> None:
    with new_folder(out) as folder:
        assert not list(folder.iterdir())
        (folder / "half").touch()
        raise OSError(28, "No space left on device")


def test_a_failed_export_leaves_nothing_and_a_killed_one_is_cleared_away(tmp_path: Path) -> None:
    killed = tmp_path / f".out.{socket.gethostname()}-{(1 << 22) + 1}.partial"  # no process has that id
    killed.mkdir()
    (killed / "old").touch()
    with pytest.raises(ExportError, match="No space left"):
        fill_the_disk(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_data_that_have_moved_are_found_by_option(data: Path, tmp_path: Path, export) -> None:
    copy = shutil.copytree(data, tmp_path / "old")
    save_run(copy, tmp_path / "run")
    copy.rename(tmp_path / "new")
    result = export(tmp_path / "run", tmp_path / "out")
    assert result.exit_code != 0
    assert "/old" in str(result.exception)
    assert export(tmp_path / "run", tmp_path / "out", "--data", str(tmp_path / "new")).exit_code == 0


class ImageOnly(Method):
    """A method that trains no text encoder of its own."""

    embeds_reports = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config.image, config.data.image_size)
        self.head = torch.nn.Linear(self.image_encoder.width, 4)

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        return StepOutput(self.encode_image(batch.image).sum(), {})

    def encode_image(self, image: Tensor) -> Tensor:
        return self.head(self.image_features(image))

    def encode_text(self, text: Text) -> Tensor:
        raise NotImplementedError

    def image_features(self, image: Tensor) -> Tensor:
        return self.image_encoder(image).pooled


def test_a_method_without_text_encoder_says_what_is_left_out(
    data: Path, tmp_path: Path, export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        REGISTRY, "imageonly", Entry(MGCAConfig, lambda config, vocab_size: ImageOnly(config))
    )
    save_run(data, tmp_path / "run", "method.name=imageonly", "image.frozen=true")
    result = export(tmp_path / "run", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert "text/ left out" in result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Left out: `text/`" in card
    assert "`image/` was frozen" in card
    assert "transformers import" not in card
    assert not (tmp_path / "out" / "text").exists()
    assert set(safetensors.torch.load_file(tmp_path / "out" / "heads.safetensors")) == {
        "head.weight",
        "head.bias",
    }


def test_a_method_without_image_encoder_is_refused(
    data: Path, tmp_path: Path, export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "foreign", Entry(MGCAConfig, lambda config, vocab_size: TinyMethod()))
    save_run(data, tmp_path / "run", "method.name=foreign")
    result = export(tmp_path / "run", tmp_path / "out")
    assert isinstance(result.exception, ExportError)
    assert "keeps no image encoder" in str(result.exception)
    assert not (tmp_path / "out").exists()

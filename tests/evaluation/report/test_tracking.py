"""Examples of an evaluation in W&B: only on the user's word, read back with W&B's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from medvlp import trust
from medvlp.config import Config
from medvlp.evaluation import evaluate
from medvlp.evaluation.report import results
from medvlp.evaluation.report.tracking import track
from medvlp.runs import saved_run
from shards.reader import ShardReader
from tests.export.conftest import data as data
from tests.run_page.made import add_examples, make_run
from tests.training.test_monitor import records


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    made = make_run(data, tmp_path / "run", 0.75)
    add_examples(made, data)
    (made / "wandb-run-id").write_text("abcd1234\n")
    return made


def tracked(run: Path, data: Path, shares: bool) -> dict[str, Any]:
    """Logs the evaluation offline; names of the images -> their number, and what tables hold."""
    config = saved_run.load_config(saved_run.locate(run), [])
    config.monitor.wandb, config.monitor.share_samples = "offline", shares
    track(results.read(run / "evaluation.json"), saved_run.locate(run), config, ShardReader(data))
    items = [record["item"] for record in records(run / "wandb")["history"]]
    images = {
        name.removesuffix(".count"): value
        for item in items
        for name, value in item.items()
        if name.endswith(".count")
    }
    tables = [json.loads(file.read_text()) for file in (run / "wandb").rglob("*.table.json")]
    return {
        "images": images,
        "texts": [row for of in tables if "generated" in of["columns"] for row in of["data"]],
    }


def test_images_and_reports_go_only_where_samples_are_shared(run: Path, data: Path) -> None:
    found = tracked(run, data, shares=False)
    assert found == {"images": {}, "texts": []}
    assert not list((run / "wandb").rglob("*.png"))
    text = "".join(file.read_text(errors="replace") for file in (run / "wandb").rglob("*.json"))
    assert "possible edema" not in text


def test_examples_are_images_and_a_table(run: Path, data: Path) -> None:
    found = tracked(run, data, shares=True)
    place = "evaluation/test/{}/fraction-1-seed-0/examples"
    assert found["images"] == {place.format("segmentation"): 4, place.format("detection"): 1}
    assert found["texts"] == [["no effusion . possible edema .", "moderate effusion . no edema ."]]
    sizes = [Image.open(file).size for file in (run / "wandb").rglob("*.png")]
    assert sizes == [(320, 320)] * 4, "true and predicted mask of what is not there are one file"


def test_a_run_folder_alone_shares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config, said = Config(), list[str]()
    session: Any = SimpleNamespace(config=config, say=said.append)
    options = evaluate.EvaluationOptions(tmp_path)
    assert not evaluate._shares(options, session)
    assert said == []
    config.monitor.share_samples = True
    assert not evaluate._shares(options, session)
    assert "say monitor.share_samples=true" in said[0]
    typed = evaluate.EvaluationOptions(tmp_path, overrides=["monitor.share_samples=true"])
    assert evaluate._shares(typed, session)
    trust.remember("monitor.share_samples", True)
    assert evaluate._shares(options, session)

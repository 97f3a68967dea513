"""`medvlp evaluate` of a run folder that cannot be written: somebody else's, or mounted for reading only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp.evaluation.report import results
from medvlp.evaluation.task import EvaluationError
from shards.errors import UsageError
from tests.launcher.tiny_run import make_run, make_shards


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root may write everywhere, so that the answer about this folder is made up."""
    folder = make_run(make_shards(tmp_path / "data"), tmp_path / "run")
    access = os.access

    def asked(path: Any, mode: int, **more: Any) -> bool:
        return not (Path(path) == folder and mode == os.W_OK) and access(path, mode, **more)

    monkeypatch.setattr(os, "access", asked)
    return folder


def evaluate(*words: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_results_go_to_another_place_which_is_asked_for_before_the_work(run: Path, tmp_path: Path) -> None:
    few = ("--task", "retrieval", "evaluation.bootstrap=2")
    refused = evaluate(run, *few)
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception) == f"{run}/evaluation.json cannot be written: name another file with --out"
    assert isinstance(evaluate(run, *few, "--out", tmp_path / "none" / "out.json").exception, UsageError)
    result = evaluate(run, *few, "--out", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    assert results.read(tmp_path / "out.json").results["retrieval"]
    assert not (run / "evaluation-units").exists()


def test_a_task_that_trains_says_what_to_do(run: Path, tmp_path: Path) -> None:
    words = ("--task", "fine-tuning", "--fraction", "1", "monitor.wandb=disabled")
    refused = evaluate(run, *words, "--out", tmp_path / "out.json")
    assert isinstance(refused.exception, EvaluationError), refused.exception
    assert f"fine-tuning: it trains networks inside {run}, which cannot be written" in str(refused.exception)

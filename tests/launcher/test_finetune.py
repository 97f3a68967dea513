"""`medvlp finetune` and the options of `medvlp evaluate` that concern what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from launcher.commands import evaluate as command
from launcher.commands import pretrain
from launcher.main import app
from medvlp.config import Config
from medvlp.evaluation.supervised import recipe_of
from medvlp.training.run import train
from shards.errors import UsageError
from tests.launcher.tiny_run import make_run, make_shards

FAST = [
    "train.epochs=1", "train.min_steps=0", "train.global_batch=16", "monitor.wandb=disabled",
    "monitor.progress=false", "zero.stage=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return make_run(make_shards(folder / "data"), folder / "run")


@pytest.fixture
def medvlp() -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_a_fine_tuning_is_a_run_of_its_own(
    run: Path, medvlp: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Config] = []
    monkeypatch.setattr(
        pretrain,
        "_train_rank",
        lambda config, fresh: trained.append(config) or train(recipe_of(config), fresh),
    )
    words = ["finetune", run, "task=fine-tuning", f"run.dir={tmp_path / 'tuned'}", *FAST, "--fraction", "0.5"]
    first = medvlp(*words)
    assert first.exit_code == 0, first.output
    config = trained[0]
    assert (config.task, config.finetune.fraction, config.image.name, config.precision) == (
        "fine-tuning", 0.5, "vit_tiny_patch16_224", "fp32",
    )  # fmt: skip
    assert config.checkpoint.keep_best == "valid/auroc/macro"
    assert "valid/auroc/macro" in (tmp_path / "tuned" / "metrics.jsonl").read_text()
    assert medvlp(*words, "train.epochs=2").exit_code == 0
    assert '"resume"' in (tmp_path / "tuned" / "events.jsonl").read_text()
    refused = medvlp("evaluate", tmp_path / "tuned", "--task", "retrieval")
    assert "a fine-tuning of task fine-tuning" in str(refused.exception)


def test_the_config_can_be_printed_for_submit(
    run: Path, medvlp: Callable[..., Result], tmp_path: Path
) -> None:
    shown = medvlp(
        "finetune", run, "--task", "fine-tuning", f"run.dir={tmp_path / 'tuned'}", "--print", "--seed", "4"
    )
    assert shown.exit_code == 0, shown.output
    (tmp_path / "made.yaml").write_text(shown.stdout)
    again = medvlp("submit", tmp_path / "made.yaml", "--dry-run")
    assert again.exit_code == 0, again.output
    assert "task: fine-tuning" in shown.stdout
    assert "seed: 4" in shown.stdout


def test_what_a_file_says_counts_where_no_option_does(
    run: Path, medvlp: Callable[..., Result], tmp_path: Path
) -> None:
    """The defaults of the options stood above the file: all patients were taught, whatever it said."""
    file = tmp_path / "asked.yaml"
    file.write_text("train: {seed: 5}\nfinetune: {fraction: 0.25, start: untrained}\n")
    words = ("finetune", run, file, "--task", "fine-tuning", f"run.dir={tmp_path / 'tuned'}", "--print")

    def shown(*more: str) -> tuple[object, ...]:
        config = yaml.safe_load(medvlp(*words, *more).stdout)
        tuned = config["finetune"]
        return config["train"]["seed"], tuned["fraction"], tuned["start"]

    assert shown() == (5, 0.25, "untrained")
    assert shown("--seed", "4", "--fraction", "0.5") == (4, 0.5, "untrained")
    assert shown("train.seed=6", "finetune.start=trained") == (6, 0.25, "trained")
    for option, key in (("--seed=1", "train.seed=2"), ("--untrained", "finetune.start=trained")):
        error = medvlp(*words, option, key).exception
        assert isinstance(error, UsageError)
        assert "leave one of them out" in str(error)


def test_what_cannot_be_trained_is_named(run: Path, medvlp: Callable[..., Result], tmp_path: Path) -> None:
    words = ("finetune", run, f"run.dir={tmp_path / 'tuned'}")
    for more, message in (
        ((), "name the task"),
        (("task=retrieval",), "no task of this name trains; there are"),
        (("task=zeroshoot",), "there are"),
        (("task=fine-tuning", "optimizer.rate=1"), "unknown key 'optimizer.rate'"),
    ):
        assert message in str(medvlp(*words, *more).exception)
    assert "no value for run.dir" in str(medvlp("finetune", run, "task=fine-tuning").exception)


def test_fractions_and_seeds_are_units_of_the_named_tasks() -> None:
    names, keys = ["fine-tuning", "linear-probe"], "evaluation.tasks"
    fractions = [f"{keys}.{name}.fractions=[0.1, 1.0]" for name in names]
    assert command.unit_words(names, [0.1, 1.0], None) == fractions
    assert command.unit_words(["fine-tuning"], None, [0, 3]) == [f"{keys}.fine-tuning.seeds=[0, 3]"]
    with pytest.raises(UsageError, match="retrieval has no key seeds"):
        command.unit_words(["retrieval"], None, [1])
    with pytest.raises(UsageError, match="name it with --task"):
        command.unit_words([], [0.1], None)

"""Every task that trains, on several ranks and killed: the same as pre-training."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from medvlp.evaluation.supervised import Supervised, finetuning_config, recipe_of
from medvlp.evaluation.task import tasks
from medvlp.evaluation.trained import TrainedTask
from medvlp.training.monitor import Monitor
from medvlp.training.predictions import Predictions
from medvlp.training.run import train
from shards.sources.phantom import PhantomSource
from tests.distributed_pool import Pools, imported
from tests.launcher.tiny_run import build, make_run
from tests.training.test_resume import comparable, killed_after, weights

pytestmark = pytest.mark.dist

TRAINED = sorted(name for name, task in tasks().items() if issubclass(task, TrainedTask))
FAST = [
    "train.min_steps=0", "train.global_batch=6", "train.threads=1", "monitor.wandb=disabled",
    "monitor.progress=false", "precision=fp32", "validation.every_epochs=0", "validation.every_steps=2",
    "validation.batch=3", "checkpoint.every_steps=2", "checkpoint.asynchronous=false",
    "checkpoint.keep_last=0", "optimizer.lr=1e-3",
]  # fmt: skip
SMALL = {
    "detection": ["labels=[mass,cardiomegaly]"],
    "segmentation": ["labels=[mass,cardiomegaly]"],
    "report": ["width=16", "heads=2", "layers=1", "hidden=16", "beams=2", "max_words=8"],
    "vqa": ["width=16"],
}
#: For ranks to be compared, nothing draws on each of them, and rounding is not made larger: Adam's first
#: steps are as long for a gradient of noise as for any other.
PLAIN = [
    "train.steps=2", "image.options={drop_path_rate: 0}", "text.dropout=0", "optimizer.name=sgd",
    "evaluation.tasks.report.dropout=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shards = build(PhantomSource(studies=40, image_size=32, seed=3), folder / "data", vocab_size=300)
    return make_run(shards, folder / "run")


def finetune(source: str, run: str, task: str, words: list[str]) -> int:
    """A whole training of a task on this rank; its exit code."""
    small = [f"evaluation.tasks.{task}.{word}" for word in SMALL.get(task, [])]
    overrides = [*FAST, *small, f"run.dir={run}", *words]
    return train(recipe_of(finetuning_config(Path(source), task, 0.9, 1, False, [], overrides)))


def finetuned(source: str, run: str, task: str, words: list[str]) -> tuple[int, dict[str, Any]]:
    """The same, with what the last validation predicted (rank 0)."""
    found: dict[str, Any] = {}
    measure = Supervised.measure

    def measured(recipe: Supervised, predictions: Predictions, data: Any) -> Any:
        found.update(predictions.arrays, sample=predictions.sample)
        return measure(recipe, predictions, data)

    with mock.patch.object(Supervised, "measure", measured):
        return finetune(source, run, task, words), found


def validations(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name.startswith("valid/")}
        for line in without_times(run)
        if "valid/loss" in line
    ]


def without_times(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if "seconds" not in name} for line in comparable(run)
    ]


@pytest.mark.parametrize("task", TRAINED)
def test_any_number_of_ranks_and_any_stage_give_the_same_metrics(
    gloo_pool: Pools, source: Path, tmp_path: Path, task: str
) -> None:
    """Only rounding is left. Ranks have unequal numbers of samples to predict."""
    found = []
    for ranks, stage in ((1, 0), (2, 3), (3, 2)):
        run = tmp_path / f"{ranks}-{stage}"
        answers = gloo_pool(ranks).run(
            finetuned, str(source), str(run), task, [*PLAIN, f"zero.stage={stage}"]
        )
        assert [code for code, _ in answers] == [0] * ranks
        found.append((validations(run), answers[0][1]))
    (expected,), arrays = found[0]
    assert len(expected) > 1
    assert len(arrays["sample"]) % 3
    # Sums of each sample, not its dense maps: those of two findings have 8 KiB.
    assert sum(array[0].nbytes for array in arrays.values()) < 6 << 10
    for (line,), other in found[1:]:
        assert line == pytest.approx(expected, abs=1e-4)
        assert other.keys() == arrays.keys()
        for name, array in arrays.items():
            # A pixel may lie at a threshold.
            near = 2 if name == "pixels" else 1e-3
            assert np.allclose(array, other[name], atol=near, equal_nan=True), name


def test_two_ranks_go_on_bit_for_bit(gloo_pool: Pools, source: Path, tmp_path: Path) -> None:
    words = ["train.steps=4", "zero.stage=2", "precision=bf16", "image.options={drop_path_rate: 0.2}"]
    pool = gloo_pool(2)
    assert pool.run(finetune, str(source), str(tmp_path / "whole"), "fine-tuning", words) == [0, 0]
    killed_after(tmp_path / "whole", tmp_path / "resumed", step=2)
    assert pool.run(finetune, str(source), str(tmp_path / "resumed"), "fine-tuning", words) == [0, 0]
    assert weights(tmp_path / "resumed", 4) == weights(tmp_path / "whole", 4)
    assert without_times(tmp_path / "resumed") == without_times(tmp_path / "whole")


def finetune_until_killed(source: str, run: str, task: str, words: list[str]) -> None:
    """In a process of its own."""
    on_step = Monitor.on_step

    def killing(self: Monitor, record: Any) -> None:
        on_step(self, record)
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Monitor, "on_step", killing):
        finetune(source, run, task, words)


@pytest.mark.parametrize("task", TRAINED)
def test_sigkill_costs_the_steps_since_the_last_checkpoint_and_changes_nothing(
    source: Path, tmp_path: Path, task: str
) -> None:
    words = ["train.steps=4", "zero.stage=0", "image.options={drop_path_rate: 0.2}"]
    process = imported().Process(
        target=finetune_until_killed, args=(str(source), str(tmp_path / "killed"), task, words)
    )
    process.start()
    process.join(250)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000004").exists()
    assert finetune(str(source), str(tmp_path / "whole"), task, words) == 0
    assert finetune(str(source), str(tmp_path / "killed"), task, words) == 0
    assert weights(tmp_path / "killed", 4) == weights(tmp_path / "whole", 4)
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")

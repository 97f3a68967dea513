"""Fine-tuning on several ranks, at every ZeRO stage, killed and taken up: the same as pre-training."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medvlp.evaluation.supervised import finetuning_config, recipe_of
from medvlp.training.run import train
from tests.distributed_pool import Pools
from tests.launcher.tiny_run import make_run, make_shards
from tests.training.test_resume import comparable, killed_after, weights

FAST = [
    "train.steps=6", "train.min_steps=0", "train.global_batch=12", "train.threads=1",
    "monitor.wandb=disabled", "monitor.progress=false", "precision=fp32",
    "validation.every_epochs=0", "validation.every_steps=2",
    "validation.batch=8", "image.options={drop_path_rate: 0.2}", "checkpoint.every_steps=2",
    "checkpoint.asynchronous=false", "checkpoint.keep_last=0", "optimizer.lr=1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return make_run(make_shards(folder / "data"), folder / "run")


def finetune(source: str, run: str, words: list[str]) -> int:
    """A whole fine-tuning on this rank; its exit code."""
    overrides = [*FAST, f"run.dir={run}", *words]
    return train(recipe_of(finetuning_config(Path(source), "fine-tuning", 0.5, 1, False, [], overrides)))


def validations(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name.startswith("valid/")}
        for line in comparable(run)
        if "valid/loss" in line
    ]


def without_times(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if "seconds" not in name} for line in comparable(run)
    ]


@pytest.mark.dist
def test_any_number_of_ranks_and_any_stage_give_the_same_metrics(
    gloo_pool: Pools, source: Path, tmp_path: Path
) -> None:
    """Only rounding is left. Dropout draws on each rank, so it is off here."""
    found = []
    for ranks, stage in ((1, 0), (2, 1), (3, 2), (2, 3)):
        run = tmp_path / f"{ranks}-{stage}"
        words = [f"zero.stage={stage}", "image.options={drop_path_rate: 0}"]
        assert gloo_pool(ranks).run(finetune, str(source), str(run), words) == [0] * ranks
        found.append(validations(run))
    assert len(found[0]) == 3
    assert "valid/auroc/macro" in found[0][0]
    for other in found[1:]:
        for one, line in zip(found[0], other, strict=True):
            line["valid/seconds"] = one["valid/seconds"]
            assert line == pytest.approx(one, abs=1e-4)


@pytest.mark.dist
def test_two_ranks_go_on_bit_for_bit(gloo_pool: Pools, source: Path, tmp_path: Path) -> None:
    words = ["zero.stage=2", "precision=bf16"]
    pool = gloo_pool(2)
    assert pool.run(finetune, str(source), str(tmp_path / "whole"), words) == [0, 0]
    killed_after(tmp_path / "whole", tmp_path / "resumed", step=2)
    assert pool.run(finetune, str(source), str(tmp_path / "resumed"), words) == [0, 0]
    assert weights(tmp_path / "resumed", 6) == weights(tmp_path / "whole", 6)
    assert without_times(tmp_path / "resumed") == without_times(tmp_path / "whole")


@pytest.mark.dist
def test_sigkill_costs_the_steps_since_the_last_checkpoint_and_changes_nothing(
    source: Path, tmp_path: Path
) -> None:
    program = (
        "import os, signal\n"
        "from medvlp.training.monitor import Monitor\n"
        "on_step = Monitor.on_step\n"
        "def killing(self, record):\n"
        "    on_step(self, record)\n"
        "    if record.step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Monitor.on_step = killing\n"
        "from tests.evaluation.test_trained_ranks import finetune\n"
        f"finetune({str(source)!r}, {str(tmp_path / 'killed')!r}, ['zero.stage=0'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=250)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000006").exists()
    assert finetune(str(source), str(tmp_path / "whole"), ["zero.stage=0"]) == 0
    assert finetune(str(source), str(tmp_path / "killed"), ["zero.stage=0"]) == 0
    assert weights(tmp_path / "killed", 6) == weights(tmp_path / "whole", 6)
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")

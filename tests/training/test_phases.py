"""Optimiser phases in whole runs: the rates and restarts, and resuming inside and between phases."""

import shutil
from pathlib import Path

import pytest

from tests.distributed_pool import Pools
from tests.training.runs import Overrides, Precision, read_metrics, train

pytestmark = pytest.mark.dist

#: Of 16 samples a step; the phantoms' training split gives three steps an epoch.
PHASES = [
    "train.steps=null",
    "optimizer.phases=[{epochs: 1, lr: 1e-3}, {epochs: 1.34, lr: 1e-4, start_lr: 1e-5, warmup_epochs: 0.7}]",
    "checkpoint.every_steps=1", "checkpoint.keep_last=0", "text.dropout=0.2",
]  # fmt: skip


def phased(overrides: list[str]) -> list[str]:
    """Without the one rate of the tiny run, which phases stand above."""
    return [text for text in overrides if not text.startswith("optimizer.lr=")]


def cut_after(run_dir: Path, copy: Path, step: int) -> None:
    """Copy a run without the checkpoints after `step`."""
    shutil.copytree(run_dir, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def weights(run_dir: Path, step: int) -> bytes:
    return (run_dir / "checkpoints" / f"step-{step:08d}" / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_resuming_at_and_after_a_boundary_is_bit_identical(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path, stage: int, precision: Precision
) -> None:
    options = [*PHASES, f"zero.stage={stage}", f"precision={precision}"]
    pool = gloo_pool(2)
    assert pool.run(train, phased(overrides(*options, run="whole"))) == [0, 0]
    lines = read_metrics(tmp_path / "whole")
    rates = [line["lr"] for line in lines]
    boundary = rates.index(1e-5)
    assert boundary == round(len(rates) / 2.34), rates
    assert rates[0] == 1e-3
    assert rates[boundary + 1] == 1e-4
    last = len(rates)
    for step in (boundary, boundary + 1):
        cut_after(tmp_path / "whole", tmp_path / f"from{step}", step)
        assert pool.run(train, phased(overrides(*options, run=f"from{step}"))) == [0, 0]
        assert weights(tmp_path / f"from{step}", last) == weights(tmp_path / "whole", last)


def test_the_optimizer_restarts_in_a_run(gloo_pool: Pools, overrides: Overrides, tmp_path: Path) -> None:
    """The first step of phase 2 moves weights as Adam's first does: by the learning rate."""
    import torch
    from safetensors.torch import load

    assert gloo_pool(1).run(train, phased(overrides(*PHASES, "optimizer.weight_decay=0"))) == [0]
    boundary = [line["lr"] for line in read_metrics(tmp_path / "run")].index(1e-5)
    before, after = (load(weights(tmp_path / "run", step)) for step in (boundary, boundary + 1))
    moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in before if n.endswith(".weight")])
    assert moved[moved > 0].median().item() == pytest.approx(1e-5, rel=0.02)

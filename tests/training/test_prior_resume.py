"""PRIOR resumed inside its third stage equals a run that never stopped: noise, phases, revival."""

from pathlib import Path

import pytest

from tests.distributed_pool import Pools
from tests.training.runs import Overrides, train
from tests.training.test_resume import comparable, killed_after, weights

pytestmark = pytest.mark.dist

#: 80 studies make about 4 steps an epoch: stages 1 and 2 of one step each, then four of stage 3.
PRIOR = [
    "method.name=prior", "method.embedding=16", "method.pool_heads=2", "method.prototypes=8",
    "method.queries=4", "method.decoder_layers=1", "method.decoder_heads=2", "method.decoder_hidden=16",
    "method.image_decoder_width=16", "method.bank_schedule=exponential",
    "checkpoint.every_steps=1", "checkpoint.keep_last=0",
    "prototypes.init=kmeans", "prototypes.init_samples=32", "prototypes.revive_below=0.5",
    "prototypes.refresh_steps=5",
    "optimizer.phases=[{epochs: 0.25, lr: 1e-3}, {epochs: 0.25, lr: 1e-3}, {epochs: 1.0, lr: 1e-3}]",
]  # fmt: skip
#: Of the tiny run, which PRIOR's config or the phases do not have.
DROPPED = ("method.", "train.steps", "optimizer.lr")


@pytest.mark.parametrize("stage", [0, 2])
def test_resuming_where_the_bank_starts_and_in_the_third_stage_is_bit_identical(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path, stage: int
) -> None:
    def options(run: str) -> list[str]:
        tiny = [text for text in overrides(run=run) if not text.startswith(DROPPED)]
        return [*tiny, *PRIOR, f"zero.stage={stage}"]

    pool = gloo_pool(2)
    assert pool.run(train, options("whole")) == [0, 0]
    lines = comparable(tmp_path / "whole")
    last = lines[-1]["step"]
    assert last > 4
    assert "loss/bank" not in lines[0]
    assert "loss/sentence" not in lines[1]
    assert all("loss/sentence" in line for line in lines[2:])
    # By the uses before the checkpoint and after it.
    assert lines[4]["prototypes/revived"] > 0
    # After the step before stage 2, the first that uses the bank.
    assert ["prototypes/start_similarity" in line for line in lines] == [True] + [False] * (last - 1)
    for step in (1, 4):
        killed_after(tmp_path / "whole", tmp_path / f"from{step}", step)
        assert pool.run(train, options(f"from{step}")) == [0, 0]
        assert weights(tmp_path / f"from{step}", last) == weights(tmp_path / "whole", last)
        assert comparable(tmp_path / f"from{step}") == lines


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rehearsal_of_later_phases_leaves_no_trace(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path, stage: int
) -> None:
    def options(run: str, *more: str) -> list[str]:
        tiny = [text for text in overrides(run=run) if not text.startswith(DROPPED)]
        return [*tiny, *PRIOR, f"zero.stage={stage}", "checkpoint.every_steps=0", *more]

    pool = gloo_pool(1)
    assert pool.run(train, options("plain")) == [0]
    assert pool.run(train, options("rehearsed", "train.rehearse=true")) == [0]
    assert comparable(tmp_path / "rehearsed") == comparable(tmp_path / "plain")
    last = comparable(tmp_path / "plain")[-1]["step"]
    assert weights(tmp_path / "rehearsed", last) == weights(tmp_path / "plain", last)

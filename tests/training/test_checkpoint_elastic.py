"""A checkpoint of any world size and ZeRO stage is taken up by any other; the run goes on as before."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from medvlp import distributed
from medvlp.config import Config
from medvlp.runs.conversion import OPTIMIZER, to_safetensors
from medvlp.runs.errors import CheckpointError
from medvlp.runs.optimizer_files import OptimizerFiles
from medvlp.training import optimizer_fragments
from medvlp.training.callbacks import StepRecord
from medvlp.training.interrupts import Interrupts
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, Precision, read_metrics, train
from tests.training.saving import load_and_save, start, tiny_config, train_and_save, train_steps
from tests.training.tiny import TinyMethod

pytestmark = pytest.mark.dist

#: Precision, (ranks, stage) that save, those that load.
LAYOUTS = [
    ("fp32", (2, 0), (1, 3)), ("fp32", (2, 2), (3, 3)), ("bf16", (2, 1), (3, 0)), ("bf16", (2, 3), (1, 2)),
    ("bf16", (3, 3), (2, 1)), ("bf16", (2, 0), (1, 1)),
]  # fmt: skip


def whole(run_dir: Path, out: Path) -> dict[str, torch.Tensor]:
    """Weights and optimiser state of a run's only checkpoint."""
    folder = next((run_dir / "checkpoints").glob("step-*"))
    weights, optimizer = to_safetensors(folder, out)
    assert optimizer.name == OPTIMIZER
    return load_file(weights) | load_file(optimizer)


@pytest.mark.parametrize(("precision", "saved", "loaded"), LAYOUTS)
def test_another_layout_holds_the_same_bits(
    gloo_pool: Pools, tmp_path: Path, precision: Precision, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    gloo_pool(saved[0]).run(train_and_save, tiny_config(first, saved[1], precision), 3)
    gloo_pool(loaded[0]).run(load_and_save, tiny_config(first, loaded[1], precision), second)
    before, after = whole(tmp_path / "first", tmp_path / "a"), whole(tmp_path / "second", tmp_path / "b")
    assert before.keys() == after.keys()
    assert before["head.weight.step"].item() == 3
    assert before["head.weight.exp_avg"].shape == before["head.weight"].shape
    assert before["head.weight.exp_avg_sq"].count_nonzero() > 100
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_momentum_of_sgd_moves_too(gloo_pool: Pools, tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    expected = gloo_pool(2).run(train_steps_of_one_run, tiny_config(first, 1, optimizer="sgd"), 5)[0]
    gloo_pool(2).run(train_and_save, tiny_config(first, 1, optimizer="sgd"), 3)
    state = whole(tmp_path / "first", tmp_path / "a")
    assert state["head.weight.momentum_buffer"].count_nonzero() > 100
    found = gloo_pool(1).run(
        load_and_save, tiny_config(first, 0, optimizer="sgd"), str(tmp_path / "second"), 2
    )[0]
    assert found == pytest.approx(expected[3:], rel=1e-5)


def train_steps_of_one_run(config: Config, steps: int) -> list[float]:
    engine, _ = start(config)
    losses = train_steps(engine, 1, steps)
    engine.close()
    return losses


def train_and_list_samples(overrides: list[str], forget: bool = False) -> list[tuple[int, list[str]]]:
    """A whole run; (step, sample keys) of this rank. `forget` leaves the optimiser state out on loading."""
    from medvlp.training import engine
    from medvlp.training.checkpointing import CheckpointCallback

    seen: list[tuple[int, list[str]]] = []
    original = CheckpointCallback.on_step

    def on_step(self: CheckpointCallback, record: StepRecord) -> None:
        seen.append((record.step, list(record.keys)))
        original(self, record)

    with ExitStack() as changed:
        changed.enter_context(mock.patch.object(CheckpointCallback, "on_step", on_step))
        if forget:
            changed.enter_context(mock.patch.object(engine, "load_fragments", return_value=None))
        train(overrides)
    return seen


def cut(run_dir: Path, step: int) -> None:
    """Make a run look as if it had been killed after this step's checkpoint."""
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def samples_by_step(of_ranks: list[list[tuple[int, list[str]]]]) -> dict[int, list[str]]:
    return {steps[0][0]: [key for _, keys in steps for key in keys] for steps in zip(*of_ranks, strict=True)}


def test_other_ranks_and_stages_in_the_middle_of_a_run(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    """2 -> 1 -> 3 ranks and ZeRO 2 -> 3 -> 1: the samples are the same, losses agree to rounding."""
    options = [
        "train.global_batch=12", "train.steps=9", "checkpoint.every_steps=3", "checkpoint.keep_last=0",
        "optimizer.lr=2e-5",
    ]  # fmt: skip
    expected = samples_by_step(gloo_pool(2).run(train_and_list_samples, overrides(*options, "zero.stage=2")))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    found = {step: expected[step] for step in (1, 2, 3)}
    for ranks, stage, after in ((1, 3, 3), (3, 1, 6)):
        cut(tmp_path / "moved", after)
        if after == 6:
            shutil.copytree(tmp_path / "moved", tmp_path / "forgot")
        arguments = overrides(*options, f"zero.stage={stage}", run="moved")
        found |= samples_by_step(gloo_pool(ranks).run(train_and_list_samples, arguments))
    assert found == expected
    assert largest_difference(tmp_path / "moved", losses) < 1e-4
    arguments = overrides(*options, "zero.stage=1", run="forgot")
    gloo_pool(3).run(train_and_list_samples, arguments, True)
    assert largest_difference(tmp_path / "forgot", losses) > 1e-4, "the test would not see lost moments"
    manifest = json.loads((tmp_path / "moved/checkpoints/step-00000009/manifest.json").read_text())
    assert (manifest["world_size"], manifest["zero_stage"]) == (3, 1)


def largest_difference(run_dir: Path, losses: list[float]) -> float:
    found: list[float] = [line["loss"] for line in read_metrics(run_dir)]
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True))
    print(f"{run_dir.name}: largest relative difference of a loss {difference:.1e}")
    return difference


def test_clusters_of_the_service_move_without_the_banks(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    options = [
        "train.global_batch=12", "method.prototype_source=clusters", "prototypes.refresh_steps=2",
        "prototypes.balance=bias", "train.steps=5", "checkpoint.every_steps=3", "checkpoint.keep_last=0",
    ]  # fmt: skip
    gloo_pool(2).run(train, overrides(*options))
    cut(tmp_path / "run", 3)
    assert gloo_pool(3).run(train, overrides(*options)) == [0, 0, 0]
    versions = [line.get("prototypes/version") for line in read_metrics(tmp_path / "run")]
    assert [version for version in versions if version is not None][-1] == 2


def random_numbers(overrides: list[str]) -> list[float]:
    """Draws of this rank's generator right after a run's start."""
    from medvlp.training import trainer

    drawn: list[float] = []

    def first(self: trainer.Trainer, interrupts: Interrupts) -> None:
        drawn.extend(torch.rand(2).tolist())

    with mock.patch.object(trainer.Trainer, "train", first):
        train(overrides)
    return drawn


def test_new_ranks_get_generators_of_their_own(gloo_pool: Pools, overrides: Overrides) -> None:
    options = ["train.global_batch=12", "train.steps=1"]
    gloo_pool(2).run(train, overrides(*options))
    same = gloo_pool(2).run(random_numbers, overrides(*options))
    more = gloo_pool(3).run(random_numbers, overrides(*options))
    assert more[:2] == same
    assert more[2] not in same
    assert gloo_pool(3).run(random_numbers, overrides(*options)) == more


def test_a_missing_part_is_named(gloo_pool: Pools, tmp_path: Path) -> None:
    gloo_pool(2).run(train_and_save, tiny_config(str(tmp_path), 2), 2)
    folder = tmp_path / "checkpoints/step-00000002"
    count = TinyMethod().head.weight.numel()
    with pytest.raises(
        CheckpointError, match=f"holds {count} of the {count + 1} elements of exp_avg of head"
    ):
        OptimizerFiles(folder, 2).part("head.weight", "exp_avg", 0, count + 1)
    (folder / "optimizer/rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors cannot be read as optimiser state"):
        OptimizerFiles(folder, 2)


def test_a_replicated_state_is_shared_out() -> None:
    parameter = torch.nn.Parameter(torch.arange(7.0))
    shard = optimizer_fragments.find_fragments([("p", parameter)], None, 0, 0, {})[0]
    shares = [shard.share(rank, 3) for rank in range(3)]
    assert torch.cat([share.of(parameter) for share in shares]).tolist() == list(range(7))
    assert distributed.world_size() == 1

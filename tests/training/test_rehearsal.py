"""Phases that come later are tried at the start, with reports of the greatest length."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.batch_sizes import divide_batch
from medvlp.methods.base import Progress, StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.device_memory import DeviceMemoryError
from medvlp.training.engine import Engine
from medvlp.training.rehearsal import rehearse_phases
from medvlp.training.schedule import Schedule
from medvlp.training.step_guard import StepGuard
from tests.distributed_pool import Pools
from tests.methods.small import built, small_batch, small_config
from tests.training.tiny import TinyMethod, random_batch

pytestmark = pytest.mark.dist


class Staged(TinyMethod):
    """Runs out of memory in phase `heavy`; remembers what it was given."""

    def __init__(self, heavy: int | None):
        super().__init__(dropout=0.5)
        self.heavy, self.phase = heavy, 0
        self.seen: list[tuple[int, int]] = []

    def on_progress(self, progress: Progress) -> None:
        self.phase = progress.phase

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        self.seen.append((self.phase, batch.text.input_ids.shape[1]))
        if self.phase == self.heavy:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch, clusters)


def rehearse(
    heavy: int | None, step: int, wanted: bool | None = True
) -> tuple[list[tuple[int, int]], str, bool]:
    """What the method saw, the error, and whether nothing has changed."""
    config = Config()
    config.train.global_batch, config.zero.stage, config.precision = 8, 0, "fp32"
    config.train.rehearse, config.data.max_tokens = wanted, 24
    device = distributed.initialize()
    torch.manual_seed(0)
    method = Staged(heavy)
    engine = Engine(method, config, divide_batch(config, 1), device)
    guard = StepGuard(method, 0.0, device)
    schedule = Schedule(np.ones(6), np.array([0, 0, 1, 1, 2, 2]))
    given = [random_batch(seed, 8) for seed in range(2)]
    batches: Iterator[Batch] = iter(given)
    before = {name: value.clone() for name, value in method.state_dict().items()} | {
        "r": torch.get_rng_state()
    }
    error = ""
    try:
        batches = rehearse_phases(engine, schedule, guard, batches, config, step)
    except DeviceMemoryError as found:
        error = str(found)
    after = method.state_dict() | {"r": torch.get_rng_state()}
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    same = same and all(p.grad is None for p in method.parameters())
    same = same and (bool(error) or [batch.keys for batch in batches] == [batch.keys for batch in given])
    engine.close()
    return method.seen, error, same


@pytest.mark.parametrize(
    ("step", "wanted", "seen"),
    [(0, True, [(1, 24), (2, 24)]), (2, True, [(2, 24)]), (4, True, []), (0, None, [])],
)
def test_later_phases_are_tried_and_leave_no_trace(
    gloo_pool: Pools, step: int, wanted: bool | None, seen: list[tuple[int, int]]
) -> None:
    [found] = gloo_pool(1).run(rehearse, None, step, wanted)
    assert found == (seen, "", True)


def test_a_phase_that_does_not_fit_is_named(gloo_pool: Pools) -> None:
    [(_, error, _)] = gloo_pool(1).run(rehearse, 2, 0)
    assert "out of memory in the rehearsal of phase 3" in error
    assert "train.micro_batch" in error


def rehearse_micro_batches() -> list[tuple[int, int]]:
    """Samples and report length of every losses that MGCA took, in a step of two micro-batches."""
    config = small_config("mgca")
    config.train.global_batch, config.train.micro_batch, config.train.rehearse = 8, 4, True
    config.precision, config.zero.stage, config.data.max_tokens = "fp32", 2, 24
    device = distributed.initialize()
    method: Any = built(config)
    engine = Engine(method, config, divide_batch(config, 1), device)
    seen: list[tuple[int, int]] = []
    losses = method.losses

    def noting(encodings: Any, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        seen.append((len(batch.keys), batch.text.input_ids.shape[1]))
        output: StepOutput = losses(encodings, batch, clusters)
        return output

    method.losses = noting
    batch = small_batch().rows(0, 4)
    schedule = Schedule(np.ones(2), np.array([0, 1]))
    rehearse_phases(engine, schedule, StepGuard(method, 0.0, device), iter([batch]), config, 0)
    assert all(p.grad is None for p in method.parameters())
    engine.close()
    return seen


def test_heads_and_losses_are_tried_with_all_micro_batches(gloo_pool: Pools) -> None:
    assert gloo_pool(1).run(rehearse_micro_batches) == [[(4, 24), (8, 24)]]

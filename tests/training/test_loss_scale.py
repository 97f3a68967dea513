"""fp16 on the CPU, which DeepSpeed is made to believe in: what reaches the optimiser is fp32's gradient."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.methods.base import StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.callbacks import StepRecord
from tests.distributed_pool import Pools
from tests.training.runs import Precision
from tests.training.tiny import TinyMethod, random_batch

pytestmark = pytest.mark.dist

#: Of the scale that training begins with: small enough for the first gradient.
FIRST_POWER = 10
FIRST = 2.0**FIRST_POWER


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """Let DeepSpeed accept fp16 here; the arithmetic is torch's, which has it."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    dtypes = [torch.float, torch.bfloat16, torch.float16]
    with mock.patch.multiple(kind, is_fp16_supported=lambda self: True, supported_dtypes=lambda self: dtypes):
        yield


class Scripted(TinyMethod):
    """TinyMethod whose loss or gradient is bad in the steps it is told."""

    def __init__(self, bad: dict[str, list[int]]):
        super().__init__()
        self.bad = bad

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        output = super().forward(batch, clusters)
        step = self.progress[-1][1]
        if step in self.bad.get("loss", []):
            output = output._replace(loss=output.loss * torch.nan)
        if step in self.bad.get("gradient", []):
            output.loss.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
        return output


def train_steps(
    run_dir: str, stage: int, precision: Precision, steps: int, bad: dict[str, list[int]] | None = None,
    clip: float = 0.0, micro: int = 8, limit: int = 3, deepspeed: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train; gradients that the optimiser got, norms, scales, counts, and the error."""
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.training.bad_steps import BadSteps, NotFiniteError
    from medvlp.training.callbacks import Callback
    from medvlp.training.engine import Engine
    from medvlp.training.hangs import Watchdog
    from medvlp.training.interrupts import Interrupts
    from medvlp.training.schedule import Schedule
    from medvlp.training.step_guard import StepGuard
    from medvlp.training.trainer import Trainer

    config = Config()
    config.zero.stage, config.precision = stage, precision
    config.train.global_batch, config.train.micro_batch, config.train.gradient_clip = 8, micro, clip
    config.deepspeed = deepspeed or {"fp16": {"initial_scale_power": FIRST_POWER}}
    device = distributed.initialize()
    rank, ranks = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    sizes = divide_batch(config, ranks)
    seen: list[np.ndarray] = []
    pending: list[np.ndarray] = []
    norms: list[float] = []
    scales: list[float | None] = []
    metrics: dict[str, float] = {}

    class Look(Callback):
        def on_step(self, record: StepRecord) -> None:
            if pending:
                seen.append(np.sort(np.concatenate(pending)))
            pending.clear()
            norms.append(record.engine.gradient_norm())
            scale = record.engine.loss_scale
            scales.append(None if scale is None else scale.value)

    def gradients(
        optimizer: torch.optim.Optimizer, arguments: tuple[object, ...], options: dict[str, object]
    ) -> None:
        # From stage 1 on DeepSpeed steps group by group.
        parts = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        pending.extend(part.detach().flatten().float().numpy().copy() for part in parts)

    with fp16_on_cpu():
        method = Scripted(bad or {})
        engine = Engine(method, config, sizes, device)
        engine._engine.basic_optimizer.register_step_pre_hook(gradients)
        guard = StepGuard(method, 0.0, device)
        batches = (
            random_batch(1000 * seed + part, 8 // sizes.accumulation, rank, ranks)
            for seed in range(100)
            for part in range(sizes.accumulation)
        )
        schedule = Schedule(np.full(steps, 1e-4), np.zeros(steps, dtype=np.int64))
        callbacks = [BadSteps(guard, limit, run_dir, metrics.update), Look()]
        trainer = Trainer(engine, batches, schedule, 3, callbacks, guard, Watchdog(run_dir, 1, 1))
        text = ""
        try:
            with Interrupts() as interrupts:
                trainer.train(interrupts)
        except NotFiniteError as error:
            text = str(error)
        state = engine.counters()["scaler"]
        engine.close()
    return {
        "seen": seen, "norms": norms, "scales": scales, "metrics": metrics, "text": text, "state": state,
        "step": trainer.step,
    }  # fmt: skip


def lengths(gradients: list[np.ndarray]) -> list[float]:
    return [float(np.linalg.norm(part)) for part in gradients]


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("clip", [0.0, 0.13])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimiser_gets_the_gradient_of_fp32(
    gloo_pool: Pools, tmp_path: Path, stage: int, clip: float, micro: int
) -> None:
    pool = gloo_pool(1)
    (half,) = pool.run(train_steps, str(tmp_path), stage, "fp16", 3, None, clip, micro)
    (full,) = pool.run(train_steps, str(tmp_path), stage, "fp32", 3, None, clip, micro)
    assert len(half["seen"]) == len(full["seen"]) == 3
    for ours, theirs in zip(half["seen"], full["seen"], strict=True):
        ours, theirs = ours[ours != 0], theirs[theirs != 0]
        assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), rel=0.02)
        assert abs(ours[0] - theirs[0]) + abs(ours[-1] - theirs[-1]) < 0.05 * abs(theirs).max()
        if clip:
            assert np.linalg.norm(ours) == pytest.approx(clip, rel=0.01)
    assert half["norms"] == pytest.approx(full["norms"], rel=0.02)
    assert min(full["norms"]) > 0.13
    assert half["scales"] == [FIRST] * 3


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_ranks_agree_in_fp16(gloo_pool: Pools, tmp_path: Path, stage: int) -> None:
    one = gloo_pool(1).run(train_steps, str(tmp_path), stage, "fp16", 2)
    two = gloo_pool(2).run(train_steps, str(tmp_path), stage, "fp16", 2, None, 0.0, 4)
    assert two[0]["norms"] == two[1]["norms"]
    assert two[0]["norms"] == pytest.approx(one[0]["norms"], rel=0.02)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_growing_scale_divides_no_gradient_twice(gloo_pool: Pools, tmp_path: Path, stage: int) -> None:
    options = {"fp16": {"loss_scale_window": 2, "initial_scale_power": 8}}
    (half,) = gloo_pool(1).run(train_steps, str(tmp_path), stage, "fp16", 6, None, 0.0, 8, 3, options)
    (full,) = gloo_pool(1).run(train_steps, str(tmp_path), stage, "fp32", 6)
    assert half["scales"][0] == 256
    assert half["scales"][-1] >= 1024
    assert lengths(half["seen"]) == pytest.approx(lengths(full["seen"]), rel=0.03)
    assert half["norms"] == pytest.approx(full["norms"], rel=0.03)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_loss_leaves_the_scale_and_an_overflow_halves_it(
    gloo_pool: Pools, tmp_path: Path, stage: int
) -> None:
    bad = {"loss": [1, 2, 5], "gradient": [3, 4]}
    (found,) = gloo_pool(1).run(train_steps, str(tmp_path), stage, "fp16", 7, bad)
    first, second = (FIRST, FIRST / 2) if stage else (FIRST / 2, FIRST / 4)  # from stage 1 on one is borne
    assert found["scales"] == [FIRST] * 3 + [first, second, second, second]
    assert found["metrics"]["train/bad_steps"] == 3
    assert found["metrics"]["train/overflows"] == 2
    assert found["metrics"]["train/loss_scale"] == second
    assert len(found["seen"]) == 2
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["loss_not_finite"] * 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overflows_at_the_smallest_scale_end_the_run_and_those_before_do_not(
    gloo_pool: Pools, tmp_path: Path, stage: int
) -> None:
    bad = {"gradient": list(range(100))}
    (found,) = gloo_pool(1).run(train_steps, str(tmp_path), stage, "fp16", 60, bad)
    searching = FIRST_POWER + 1 if stage else FIRST_POWER  # down to 1
    assert found["scales"][:-1][-1] == 1.0
    assert found["step"] == searching + 4
    assert "the gradient is not finite at the smallest loss scale of fp16" in found["text"]
    assert "4 skipped steps in a row (train.max_bad_steps=3)" in found["text"]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["gradient_overflow"] * 4


def test_a_fixed_scale_cannot_search(gloo_pool: Pools, tmp_path: Path) -> None:
    options = {"fp16": {"loss_scale": 128}}
    (found,) = gloo_pool(1).run(
        train_steps, str(tmp_path), 2, "fp16", 60, {"gradient": list(range(1, 100))}, 0.0, 8, 3, options
    )
    assert found["step"] == 5
    assert found["scales"] == [128.0] * 4

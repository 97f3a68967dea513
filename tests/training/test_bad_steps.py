"""A step with a bad loss or gradient leaves no trace; too many in a row stop all ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.methods.base import StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.callbacks import StepRecord
from medvlp.training.step_guard import StepGuard
from tests.distributed_pool import Pools
from tests.training.runs import Precision
from tests.training.tiny import TinyMethod, random_batch

BAD_STEP = 2


class Poisoned(TinyMethod):
    """TinyMethod with a batch norm, whose third step is bad in one of several ways."""

    def __init__(self, poison: str):
        super().__init__()
        self.poison = poison
        self.norm = torch.nn.BatchNorm1d(16, affine=False)

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        output = super().forward(batch)
        assert self.norm.running_mean is not None
        embedded = self.norm(self.encode_image(batch.image).to(self.norm.running_mean.dtype)).float()
        loss = output.loss + embedded.square().mean()
        step = self.progress[-1][1]
        if step >= BAD_STEP and distributed.rank() == 1:
            loss = self._poisoned(loss)
        elif {"spike": step == BAD_STEP, "another loss": step >= BAD_STEP}.get(self.poison, clusters):
            loss = loss + 100
        return output._replace(loss=loss)

    @property
    def loss_variant(self) -> str:
        return "later" if self.poison == "another loss" and self.progress[-1][1] >= BAD_STEP else ""

    def _poisoned(self, loss: Tensor) -> Tensor:
        persistent = self.poison == "for ever"
        if self.progress[-1][1] > BAD_STEP and not persistent:
            return loss
        if self.poison in ("loss", "for ever"):
            loss = loss * torch.nan
        if self.poison == "detached loss":
            loss = loss + torch.inf
        if self.poison == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)  # type: ignore[no-untyped-call]
        if self.poison in ("loss", "gradient"):
            self.mean.fill_(torch.nan)
        return loss


def run_steps(
    run_dir: str, poison: str, stage: int, precision: Precision, micro: int, clip: float = 0.0,
    steps: int = 5, limit: int = 3, sigma: float = 0.0, skip_seed: bool = False, refresh: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Train; the state afterwards. `skip_seed`: without poison and without the batches of the bad step."""
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.training.bad_steps import BadSteps, NotFiniteError
    from medvlp.training.callbacks import Callback
    from medvlp.training.engine import Engine
    from medvlp.training.hangs import Watchdog
    from medvlp.training.interrupts import Interrupts
    from medvlp.training.schedule import Schedule
    from medvlp.training.trainer import Trainer

    class Applied(Callback):
        def on_step(self, record: StepRecord) -> None:
            applied.append(record.applied)

    config = Config()
    config.zero.stage, config.precision = stage, precision
    config.train.global_batch, config.train.micro_batch, config.train.gradient_clip = 8, micro, clip
    device = distributed.initialize()
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    method = Poisoned(poison)
    sizes = divide_batch(config, world_size)
    engine = Engine(method, config, sizes, device)
    guard = StepGuard(method, sigma, device)
    metrics: dict[str, float] = {}
    applied: list[bool] = []
    bad = BadSteps(guard, limit, run_dir, metrics.update)
    alerts: list[str] = []
    bad.alert = lambda title, text: alerts.append(f"{title}: {text}")
    seeds = [seed for seed in range(100) if not (skip_seed and seed == BAD_STEP)]
    batches = (
        random_batch(1000 * seed + part, 8 // sizes.accumulation, rank, world_size)
        for seed in seeds
        for part in range(sizes.accumulation)
    )
    schedule = Schedule(np.full(steps - skip_seed, 1e-3), np.zeros(steps, dtype=np.int64))
    trainer = Trainer(
        engine, batches, schedule, 3, [Applied(), bad], guard, Watchdog(run_dir, 1, 1), refresh=refresh
    )  # fmt: skip
    text = ""
    try:
        with Interrupts() as interrupts:
            trainer.train(interrupts)
    except NotFiniteError as error:
        text = str(error)
    weights = {**engine.full_weights(), **{name: b.clone() for name, b in engine.buffers().items()}}
    engine.close()
    found = {"weights": weights, "applied": applied, "metrics": metrics, "text": text, "step": trainer.step}
    return found | {"alerts": alerts}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("poison", "stage", "precision", "micro", "clip"),
    [
        *[("loss", stage, precision, 4, 0.0) for stage in range(4) for precision in ("fp32", "bf16")],
        *[("gradient", stage, "fp32", 2, 1.0) for stage in range(4)],
        ("loss", 0, "bf16", 2, 1.0),
        ("loss", 2, "bf16", 2, 1.0),
        ("detached loss", 0, "fp32", 4, 0.0),
        ("detached loss", 2, "bf16", 4, 0.0),
    ],
)
def test_a_bad_step_leaves_no_trace(
    gloo_pool: Pools, tmp_path: Path, poison: str, stage: int, precision: Precision, micro: int, clip: float
) -> None:
    pool = gloo_pool(2)
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    common = (stage, precision, micro, clip)
    bad = pool.run(run_steps, str(tmp_path / "bad"), poison, *common)
    good = pool.run(run_steps, str(tmp_path / "good"), "none", *common, 5, 3, 0.0, True)
    for found, expected in zip(bad, good, strict=True):
        assert found["applied"] == [True, True, False, True, True]
        assert expected["applied"] == [True] * 4
        assert found["metrics"] == {"train/bad_steps": 1.0}
        assert found["weights"].keys() == expected["weights"].keys()
        for name, value in found["weights"].items():
            assert torch.equal(value, expected["weights"][name]), name
    (line,) = [json.loads(line) for line in (tmp_path / "bad/events.jsonl").read_text().splitlines()]
    kind = "gradient_not_finite" if poison == "gradient" else "loss_not_finite"
    assert (line["kind"], line["step"], line["in_a_row"]) == (kind, 3, 1)
    assert [entry["rank"] for entry in line["ranks"]] == ([0, 1] if poison == "gradient" else [1])
    assert "2000-0002" in line["ranks"][-1]["keys"] or "2000-0004" in line["ranks"][-1]["keys"]
    assert not (tmp_path / "good/events.jsonl").exists()
    reason = "gradient is not finite" if poison == "gradient" else "loss is not finite"
    assert bad[0]["alerts"] == [f"bad step: step 3 was skipped: the {reason}"]  # no sample is named
    assert bad[1]["alerts"] == []


@pytest.mark.dist
@pytest.mark.parametrize("limit", [0, 2])
def test_too_many_in_a_row_stop_all_ranks(gloo_pool: Pools, tmp_path: Path, limit: int) -> None:
    Path(tmp_path, "checkpoints").mkdir()
    Path(tmp_path, "checkpoints/latest").write_text("step-00000002\n")
    results = gloo_pool(2).run(run_steps, str(tmp_path), "for ever", 2, "fp32", 4, 0.0, 20, limit)
    assert results[0]["text"] == results[1]["text"]
    assert [result["step"] for result in results] == [3 + limit] * 2
    text = results[0]["text"]
    assert f"step {3 + limit}: the loss is not finite on rank 1 (loss nan, samples" in text
    assert f"{limit + 1} skipped steps in a row (train.max_bad_steps={limit})" in text
    assert f"The newest checkpoint is {tmp_path}/checkpoints/step-00000002" in text
    assert all(torch.isfinite(value).all() for value in results[0]["weights"].values())


@pytest.mark.dist
def test_a_spike_is_skipped_by_all_ranks_when_asked(
    gloo_pool: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sigma, expected in [("on", 8.0, False), ("off", 0.0, True)]:
        (tmp_path / name).mkdir()
        results = gloo_pool(2).run(spike_after_two_steps, str(tmp_path / name), sigma)
        assert [result["applied"] for result in results] == [[True, True, expected, True, True]] * 2
    (line,) = [json.loads(line) for line in (tmp_path / "on/events.jsonl").read_text().splitlines()]
    assert line["kind"] == "loss_spike"
    assert [entry["rank"] for entry in line["ranks"]] == [0, 1]
    assert line["ranks"][0]["loss"] > 90 > line["ranks"][1]["loss"]


def spike_after_two_steps(run_dir: str, sigma: float, kind: str = "spike") -> dict[str, Any]:
    """Rank 0's loss leaps at the third step; two steps are enough to know a spike here."""
    from medvlp.training import step_guard

    usual, step_guard.WARMUP = step_guard.WARMUP, 2
    try:
        refresh = FirstClusters() if kind == "clusters" else None
        return run_steps(run_dir, kind, 2, "fp32", 4, sigma=sigma, refresh=refresh)
    finally:
        step_guard.WARMUP = usual


class FirstClusters:
    """As the callback of the prototype service: clusters from the third step on."""

    def __init__(self) -> None:
        self.steps = 0

    @property
    def table(self) -> object:
        return self if self.steps >= BAD_STEP else None


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["another loss", "clusters"])
def test_a_leap_to_another_loss_is_no_spike(gloo_pool: Pools, tmp_path: Path, kind: str) -> None:
    results = gloo_pool(2).run(spike_after_two_steps, str(tmp_path), 8.0, kind)
    assert [result["applied"] for result in results] == [[True] * 5] * 2
    assert not (tmp_path / "events.jsonl").exists()


def test_the_running_statistics_are_those_of_accepted_losses() -> None:
    from medvlp.training.step_guard import WARMUP, StepGuard

    guard = StepGuard(torch.nn.Linear(1, 1), 5.0, torch.device("cpu"))
    losses = np.random.default_rng(0).normal(2.0, 0.1, WARMUP)
    for loss in losses:
        assert guard.allowance(torch.tensor(loss)).item() == 1
    assert guard.state_dict()["mean"].item() == pytest.approx(losses.mean())
    assert guard.state_dict()["variance"].item() == pytest.approx(losses.var())
    before = [guard.state_dict()[name].item() for name in ("mean", "variance", "count")]
    assert guard.allowance(torch.tensor(2.9)).isnan()
    assert guard.verdict().spike
    assert guard.allowance(torch.tensor(torch.inf)).isnan()
    assert [guard.state_dict()[name].item() for name in ("mean", "variance", "count")] == before
    assert guard.allowance(torch.tensor(0.1)).item() == 1  # low losses are welcome
    other = StepGuard(torch.nn.Linear(1, 1), 5.0, torch.device("cpu"))
    other.load_state_dict(guard.state_dict())
    assert other.allowance(torch.tensor(9.0)).isnan()
    other.expect("another loss")
    assert other.allowance(torch.tensor(9.0)).item() == 1


def test_statistics_are_those_of_one_loss_over_a_resume_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvlp.training.step_guard.WARMUP", 2)
    device = torch.device("cpu")
    guard = StepGuard(torch.nn.Linear(1, 1), 5.0, device)
    for loss in (1.0, 1.1, 1.0):
        guard.expect("soft matching")
        assert guard.allowance(torch.tensor(loss)).item() == 1
    for variant, taken in (("soft matching", False), ("hungarian matching", True)):
        resumed = StepGuard(torch.nn.Linear(1, 1), 5.0, device)
        resumed.load_state_dict(guard.state_dict())
        resumed.expect(variant)
        assert bool(resumed.allowance(torch.tensor(9.0)).isfinite()) is taken


def test_buffers_of_several_types_are_kept_in_lists_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch copies a mixed list one tensor at a time, a launch for each."""
    kinds: list[set[torch.dtype]] = []
    copy = torch._foreach_copy_

    def watched(to: list[Tensor], of: list[Tensor]) -> None:
        kinds.append({buffer.dtype for buffer in [*to, *of]})
        copy(to, of)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    method = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    guard = StepGuard(method, 0.0, torch.device("cpu"))
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    guard.begin()
    method(torch.randn(4, 2))
    guard.undo()
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.named_buffers())
    assert kinds == [{torch.float32}, {torch.int64}] * 2

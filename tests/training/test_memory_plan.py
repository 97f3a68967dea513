"""The plan of memory against what a real step takes, and what it says of ZeRO stages, ranks and methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType
from typer.testing import CliRunner

from launcher.doctor import checks
from launcher.main import app
from medvlp import config_files, distributed
from medvlp.config import Config, ConfigError
from medvlp.data.batch import Batch
from medvlp.data.batch_sizes import BatchSizes, divide_batch
from medvlp.evaluation import task
from medvlp.methods.base import Method, Progress
from medvlp.methods.registry import build_method, schemas
from medvlp.training import memory_passes, memory_plan, operations
from medvlp.training.memory_plan import GIB, MemoryPlan, plan_memory, refusal
from medvlp.training.operations import example_batch
from tests.distributed_pool import Pools
from tests.methods.small import built, names, small_config
from tests.methods.small_medslip import tokenizer
from tests.training.runs import TINY, Precision

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def allocated_peak(config: Config, rows: int) -> int:
    """Bytes by torch's own book-keeping of the CPU allocator: the most during a real forward and backward."""
    method = build_method(config, tokenizer().vocab_size).train()
    batch = example_batch(config, rows, config.data.max_tokens)
    return recorded_peak(lambda: method(batch, None).loss.backward())


def recorded_peak(run: Callable[[], object]) -> int:
    """The most bytes that the allocator of the CPU has given out while `run` runs, and not got back."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as found:
        run()
    # By address: what an earlier engine of this process gives back meanwhile does not count against it.
    live: dict[int, int] = {}
    held = peak = 0
    for event in sorted(_allocations(found.profiler.kineto_results.experimental_event_tree()), key=_start):
        size = event.typed[1].alloc_size
        if size > 0:
            live[event.typed[1].ptr] = size
            held += size
        else:
            held -= live.pop(event.typed[1].ptr, 0)
        peak = max(peak, held)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.typed[0] == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def _start(event: Any) -> int:
    started: int = event.start_time_ns
    return started


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake passes take seconds; here they are made once for equal networks and batches."""
    monkeypatch.setattr(memory_plan, "measure_passes", _measure_passes)
    monkeypatch.setattr(memory_plan, "count_operations", _count_operations)


@cache
def _remembered() -> dict[str, Any]:
    return {}


def _measure_passes(method: Method, config: Config, share: int, gpu: bool) -> memory_passes.Passes:
    sizes = config.precision, config.data.image_size, config.data.max_tokens, share, gpu
    made = f"{config.method} {config.image} {config.text} {sizes}"
    if made not in _remembered():
        _remembered()[made] = memory_passes.measure_passes(method, config, share, gpu)
    passes: memory_passes.Passes = _remembered()[made]
    return passes


def _count_operations(method: Method, batch: Batch) -> float:
    made = f"{method} {batch.image.shape} {batch.text.input_ids.shape}"
    if made not in _remembered():
        _remembered()[made] = operations.count_operations(method, batch)
    counted: float = _remembered()[made]
    return counted


def alone(micro_batch: int) -> BatchSizes:
    """Of one rank, whose steps are one micro-batch."""
    return BatchSizes(micro_batch, micro_batch, 1, 1)


def wide_config(width: int = 2048) -> Config:
    """A text encoder of two layers, in whose MLPs nearly all memory goes."""
    config = small_config("mgca")
    config.text.options = dict(config.text.options) | {"intermediate_size": width}
    return config


def test_the_demo_takes_what_is_planned() -> None:
    overrides = ["data.root=x", "run.dir=x", "zero.stage=0"]
    config = config_files.load([str(DEMO)], overrides, schemas(), tasks=task.schemas())
    rows = 32
    plan = plan_memory(config, alone(rows), 80 * GIB, tokenizer(), device="cpu")
    assert plan.total(rows) - plan.states == pytest.approx(allocated_peak(config, rows), rel=0.15)
    assert plan.weights == 4 * plan.parameters


@pytest.mark.parametrize(("gpu", "batches"), [(True, 2), (False, 1)])
def test_samples_and_on_a_gpu_the_next_ones_are_planned(
    gpu: bool, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_passes, "_line", lambda *_: memory_passes.Line(0.0, 0.0))
    config = small_config("mgca")
    passes = memory_passes.measure_passes(built(config), config, 1, gpu)
    image = config.data.image_size**2
    assert batches * image < passes.whole.per_sample < batches * (image + 64 * config.data.max_tokens)


@pytest.fixture(scope="module")
def wide_plan() -> MemoryPlan:
    """Of one micro-batch of 32 samples in a step; the line of its passes holds for every other."""
    config = wide_config(8192)
    config.precision, config.zero.stage = "fp32", 0
    return plan_memory(config, alone(32), GIB, tokenizer(), device="cpu")


@pytest.mark.parametrize("rows", [2, 32])
def test_what_the_backward_pass_of_a_wide_mlp_takes_is_planned(wide_plan: MemoryPlan, rows: int) -> None:
    config = wide_config(8192)
    config.precision, config.zero.stage = "fp32", 0
    plan = dataclasses.replace(wide_plan, micro_batch=rows, share=rows)
    planned = plan.total(rows) - plan.states
    assert planned == pytest.approx(allocated_peak(config, rows), rel=0.05)


def test_blocks_that_are_computed_again_are_planned() -> None:
    config = wide_config()
    config.precision, config.zero.stage = "fp32", 0
    config.image.gradient_checkpointing = config.text.gradient_checkpointing = True
    plan = plan_memory(config, alone(32), GIB, tokenizer(), device="cpu")
    assert plan.total(32) - plan.states == pytest.approx(allocated_peak(config, 32), rel=0.15)


def stepped_config(name: str, stage: int, precision: Precision, accumulate: str) -> Config:
    """Steps of 32 samples, four at a time."""
    config = wide_config() if name == "mgca" else small_config(name)
    config.precision, config.zero.stage = precision, stage
    config.train.global_batch, config.train.micro_batch = 32, 4
    config.train.accumulate = "exact" if accumulate == "exact" else "plain"
    # DeepSpeed's bucket, as large for tiny networks, would be all there is; GPUs are planned with it.
    config.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1000}} if stage else {}
    return config


def peak_of_steps(name: str, stage: int, precision: Precision, accumulate: str) -> int:
    """Bytes of everything, from the making of the method to the end of the second step."""
    from medvlp.training.accumulation import exact_passes
    from medvlp.training.engine import Engine
    from medvlp.training.step_guard import StepGuard

    config = stepped_config(name, stage, precision, accumulate)
    sizes, device = divide_batch(config, 1), distributed.initialize()

    def run() -> None:
        method = built(config).train()
        engine, guard = Engine(method, config, sizes, device), StepGuard(method, 0.0, device)
        method.on_progress(Progress(0, 1, 2, 0))
        for _ in range(2):
            guard.begin()
            engine.set_learning_rate(1e-4)
            if engine.exact:
                exact_passes(engine, example_batch(config, 32, config.data.max_tokens), None, guard)
                engine.step()
                continue
            for _ in range(sizes.accumulation):
                engine.backward(engine.forward(example_batch(config, 4, config.data.max_tokens)).loss)
                engine.step()
        engine.close()

    return recorded_peak(run)


@pytest.mark.dist
@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(
    ("name", "stage", "precision", "accumulate"),
    [
        *[("mgca", stage, "fp32", "exact") for stage in range(4)],
        ("mgca", 1, "bf16", "exact"),
        ("mgca", 3, "bf16", "plain"),
        ("medslip", 0, "fp32", "exact"),
        ("prior", 0, "fp32", "exact"),
    ],
)
def test_steps_of_several_micro_batches_take_what_is_planned(
    gloo_pool: Pools, name: str, stage: int, precision: Precision, accumulate: str
) -> None:
    measured = gloo_pool(1).run(peak_of_steps, name, stage, precision, accumulate)[0]
    config = stepped_config(name, stage, precision, accumulate)
    plan = plan_memory(config, divide_batch(config, 1), GIB, tokenizer(), device="cpu")
    assert plan.exact == (accumulate == "exact")
    assert plan.total(4) == pytest.approx(measured, rel=0.15)


def test_what_exact_accumulation_keeps_is_in_the_sum_and_can_refuse_a_run() -> None:
    config = small_config("medslip")  # whose heads and losses outweigh the encoder
    sizes = BatchSizes(4 * 64, 4, 64, 1)
    plan = plan_memory(config, sizes, 80 * GIB, tokenizer())
    assert plan.exact
    assert plan.total(4) >= plan.states + plan.losses
    assert plan.losses > 10 * plan.again(4)
    tight = dataclasses.replace(plan, usable=plan.states + plan.losses / 2)
    assert tight.largest == 0
    reason = refusal(tight)
    assert reason is not None
    assert "losses of the 256 samples" in reason
    config.train.accumulate = "plain"
    plain = plan_memory(config, sizes, tight.usable / 0.95, tokenizer())
    assert plain.fits
    assert 4 <= plain.largest < 256


def test_weights_count_once(wide_plan: MemoryPlan) -> None:
    # products look at weights through views
    assert wide_plan.passes.whole.fixed < wide_plan.weights / 4


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("name", names())
def test_every_method_can_be_planned_for_a_gpu_that_is_not_there(name: str) -> None:
    plan = plan_memory(small_config(name), BatchSizes(32, 4, 1, 8), GIB * 4, tokenizer())
    assert plan.passes.whole.per_sample > 1000
    assert plan.flops > 1000
    assert plan.total(8) > plan.total(4)
    assert plan.fits


@pytest.mark.usefixtures("measured_once")
def test_stages_divide_the_states() -> None:
    config = small_config("mgca")
    config.precision = "bf16"
    plans: list[MemoryPlan] = []
    for stage in range(4):
        config.zero.stage = stage
        plans.append(plan_memory(config, BatchSizes(16, 4, 1, 4), GIB, tokenizer()))
    trained = plans[0].trained
    assert [plan.optimizer / trained for plan in plans] == [12, 3, 3, 3]
    assert [plan.weights / plan.parameters for plan in plans] == [2, 2, 2, 0.5]
    assert [plan.gradients / trained for plan in plans] == [2, 2, 0.5, 0.5]
    assert [plan.accumulated / trained for plan in plans] == [4, 4, 1, 1]
    assert [plan.gathered / plan.parameters for plan in plans] == [0, 0, 0, 2]


@pytest.mark.usefixtures("measured_once")
def test_the_largest_micro_batch_is_the_largest() -> None:
    plan = plan_memory(small_config("mgca"), BatchSizes(8, 4, 1, 2), 2 * GIB, tokenizer())
    assert plan.total(plan.largest) <= plan.usable < plan.total(plan.largest + 1)
    small = dataclasses.replace(plan, usable=plan.weights)
    assert small.largest == 0
    assert not small.fits


def test_gradient_checkpointing_saves_memory() -> None:
    config = small_config("mgca")
    # A backward pass holds one block that is computed again: with two there is next to nothing to save.
    config.text.options = dict(config.text.options) | {"num_hidden_layers": 4}
    plain = plan_memory(config, alone(4), GIB, tokenizer())
    config.image.gradient_checkpointing = config.text.gradient_checkpointing = True
    again = plan_memory(config, alone(4), GIB, tokenizer())
    assert again.passes.whole.per_sample < plain.passes.whole.per_sample


@pytest.mark.usefixtures("measured_once")
def test_the_command(phantom_data: Path) -> None:
    arguments = ["config", *TINY, f"data.root={phantom_data}", "run.dir=x", "--plan"]
    result = CliRunner().invoke(app, [*arguments, "--gpus", "2"])
    assert result.exit_code == 0, result.output
    assert "largest micro-batch" in result.output
    assert "for 4 steps of 16 samples" in result.output
    assert "heads, losses of" not in result.output
    result = CliRunner().invoke(app, [*arguments, "train.micro_batch=2", "--gpus", "1"])
    assert "heads, losses of 16 samples at once" in result.output
    assert "encoders on 2 samples" in result.output
    result = CliRunner().invoke(app, [*arguments, "--gpu-memory", "0.2"])
    assert result.exit_code == 2
    assert "DOES NOT FIT" in result.output


@pytest.mark.usefixtures("measured_once")
def test_submit_refuses_a_run_that_will_not_fit_before_it_is_queued(
    phantom_data: Path, tmp_path: Path
) -> None:
    job = ["submit", *TINY, f"data.root={phantom_data}", f"run.dir={tmp_path / 'run'}", "--dry-run"]
    refused = CliRunner().invoke(app, [*job, "--gpus-per-node", "2", "--gpu-memory", "0.2"])
    assert isinstance(refused.exception, ConfigError)
    assert "of each GPU" in str(refused.exception)
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: {gpus_per_node: 2, gpu_memory: 0.2}\n")
    assert isinstance(CliRunner().invoke(app, [*job, "--cluster", str(site)]).exception, ConfigError)
    fits = CliRunner().invoke(app, [*job, "--cluster", str(site), "--gpu-memory", "40"])
    assert fits.exit_code == 0, fits.exception
    assert fits.output.startswith("#!")
    elsewhere = [
        word if word.startswith("run.dir") else word.replace(str(phantom_data), "/x") for word in job
    ]
    unplanned = CliRunner().invoke(app, [*elsewhere, "--cluster", str(site)])
    assert unplanned.exit_code == 0
    assert "is not planned" in unplanned.output


@pytest.mark.usefixtures("measured_once")
def test_the_doctor_says_whether_a_run_fits(phantom_data: Path) -> None:
    config = config_files.load(
        [], [*TINY, f"data.root={phantom_data}", "run.dir=x"], schemas(), tasks=task.schemas()
    )
    found = checks.check_memory(config, 2, 0.2)
    assert (found.status, "train.micro_batch" in found.detail or "not even one" in found.detail) == (
        "fail",
        True,
    )
    assert checks.check_memory(config, 2, 40).status == "ok"
    config.data.root = "/x"
    assert checks.check_memory(config, 2, 40).status == "warn"
    here = checks.Surroundings(Path(), config=config, gpus=3, gpu_memory=8.0)
    assert here.planned_gpus == (3, 8.0)

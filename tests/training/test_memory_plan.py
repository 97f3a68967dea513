"""The plan of memory against what a real step takes, and what it says of ZeRO stages, ranks and methods."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launcher.doctor import checks
from launcher.main import app
from medvlp import config_files
from medvlp.config import Config, ConfigError
from medvlp.evaluation import task
from medvlp.methods.registry import build_method, schemas
from medvlp.training.memory_plan import GIB, MemoryPlan, plan_memory
from medvlp.training.operations import example_batch
from tests.methods.small import names, small_config
from tests.methods.small_medslip import tokenizer
from tests.training.runs import TINY

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def allocated_peak(config: Config, rows: int) -> int:
    """Bytes by torch's own book-keeping of the CPU allocator: the most during a real forward and backward."""
    method = build_method(config, tokenizer().vocab_size).train()
    batch = example_batch(config, rows, config.data.max_tokens)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as found:
        method(batch, None).loss.backward()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_demo_takes_what_is_planned() -> None:
    config = config_files.load([str(DEMO)], ["data.root=x", "run.dir=x"], schemas(), tasks=task.schemas())
    rows = 32
    plan = plan_memory(config, 1, rows, 80 * GIB, tokenizer(), device="cpu")
    planned = plan.total(rows) - plan.weights - plan.optimizer
    assert planned == pytest.approx(allocated_peak(config, rows), rel=0.15)
    assert plan.weights == 4 * plan.parameters


def test_weights_count_once() -> None:
    config = small_config("mgca")
    config.text.options = dict(config.text.options) | {"intermediate_size": 8192}
    plan = plan_memory(config, 1, 2, GIB, tokenizer(), device="cpu")
    assert plan.fixed < plan.weights / 4  # products look at weights through views


@pytest.mark.parametrize("name", names())
def test_every_method_can_be_planned_for_a_gpu_that_is_not_there(name: str) -> None:
    plan = plan_memory(small_config(name), 8, 4, GIB * 4, tokenizer())
    assert plan.per_sample > 1000
    assert plan.flops > 1000
    assert plan.total(8) > plan.total(4)
    assert plan.fits


def test_stages_divide_the_states() -> None:
    config = small_config("mgca")
    config.precision = "bf16"
    plans: list[MemoryPlan] = []
    for stage in range(4):
        config.zero.stage = stage
        plans.append(plan_memory(config, 4, 4, GIB, tokenizer()))
    trained = plans[0].trained
    assert [plan.optimizer / trained for plan in plans] == [12, 3, 3, 3]
    assert [plan.weights / plan.parameters for plan in plans] == [2, 2, 2, 0.5]
    assert [plan.gradients / trained for plan in plans] == [2, 2, 0.5, 0.5]
    assert [plan.accumulated / trained for plan in plans] == [4, 1, 1, 1]


def test_the_largest_micro_batch_is_the_largest() -> None:
    plan = plan_memory(small_config("mgca"), 2, 4, 2 * GIB, tokenizer())
    assert plan.total(plan.largest) <= plan.usable < plan.total(plan.largest + 1)
    small = dataclasses.replace(plan, usable=plan.weights)
    assert small.largest == 0
    assert not small.fits


def test_gradient_checkpointing_saves_memory() -> None:
    config = small_config("mgca")
    plain = plan_memory(config, 1, 4, GIB, tokenizer())
    config.image.gradient_checkpointing = config.text.gradient_checkpointing = True
    assert plan_memory(config, 1, 4, GIB, tokenizer()).per_sample < plain.per_sample


def test_the_command(phantom_data: Path) -> None:
    arguments = ["config", *TINY, f"data.root={phantom_data}", "run.dir=x", "--plan"]
    result = CliRunner().invoke(app, [*arguments, "--gpus", "2"])
    assert result.exit_code == 0, result.output
    assert "largest micro-batch" in result.output
    assert "for 64 samples" in result.output
    assert "NOT IN THE SUM" not in result.output
    result = CliRunner().invoke(app, [*arguments, "train.micro_batch=2", "--gpus", "1"])
    assert "NOT IN THE SUM" in result.output
    result = CliRunner().invoke(app, [*arguments, "--gpu-memory", "0.2"])
    assert result.exit_code == 2
    assert "DOES NOT FIT" in result.output


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

"""Operations of a step, the peak of a card, and what the metrics make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medvlp.config import PhaseConfig
from medvlp.data.batch import join
from medvlp.methods.registry import build_method
from medvlp.training.operations import count_operations, example_batch, fake_tensors, peak_tflops, step_work
from medvlp.training.schedule import Schedule
from tests.distributed_pool import Pools
from tests.methods.small import small_config
from tests.methods.small_medslip import tokenizer
from tests.training.runs import Overrides, read_metrics, train

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mgca", "place"])  # every method is counted in test_memory_plan
def test_as_many_operations_as_in_a_real_pass_and_no_trace(name: str) -> None:
    config = small_config(name)
    method = build_method(config, tokenizer().vocab_size).train()
    method.prepare(tokenizer())
    batch = example_batch(config, 4, config.data.max_tokens)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    random = torch.get_rng_state()
    counted = count_operations(method, batch)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in method.parameters())
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as real,
    ):
        method(batch, None).loss.backward()
    assert counted == pytest.approx(real.get_total_flops(), rel=1e-6)


def test_what_is_computed_again_does_not_count_and_what_is_frozen_has_no_backward_pass() -> None:
    config = small_config("mgca")
    batch = example_batch(config, 4, config.data.max_tokens)
    plain = count_operations(build_method(config, tokenizer().vocab_size).train(), batch)
    config.image.gradient_checkpointing = config.text.gradient_checkpointing = True
    assert count_operations(build_method(config, tokenizer().vocab_size).train(), batch) == plain
    config = small_config("mgca")
    config.text.frozen = True
    assert count_operations(build_method(config, tokenizer().vocab_size).train(), batch) < 0.9 * plain


def test_a_line_through_two_lengths_meets_the_lengths_between() -> None:
    config = small_config("mgca")
    config.monitor.peak_tflops = 2.0
    method = build_method(config, tokenizer().vocab_size).train()
    work = step_work(method, config, Schedule(np.ones(3), np.zeros(3, dtype=np.int64)), 0, CPU)
    assert work is not None
    assert work.peak == 2e12
    for length in (config.data.max_tokens, config.data.max_tokens * 3 // 4):
        batch = example_batch(config, 6, length)
        assert work.of(batch, 1) == pytest.approx(count_operations(method, batch), rel=0.02)


def test_texts_in_groups_count_as_far_as_they_are_padded() -> None:
    config = small_config("mgca")
    config.monitor.peak_tflops, config.text.length_groups = 2.0, 2
    method = build_method(config, tokenizer().vocab_size).train()
    work = step_work(method, config, Schedule(np.ones(3), np.zeros(3, dtype=np.int64)), 0, CPU)
    assert work is not None
    whole, short = (example_batch(config, 4, length) for length in (24, 12))
    half = join([short, whole])
    assert work.of(half, 1) == pytest.approx(work.of(short, 1) + work.of(whole, 1))
    assert work.of(half, 1) < work.of(join([whole, whole]), 1)


def test_later_phases_have_operations_of_their_own() -> None:
    config = small_config("prior")
    config.optimizer.phases = [PhaseConfig(epochs=1, lr=1e-3) for _ in range(3)]
    config.monitor.peak_tflops = 1.0
    method = build_method(config, tokenizer().vocab_size).train()
    schedule = Schedule(np.ones(3), np.arange(3, dtype=np.int64))
    work = step_work(method, config, schedule, 1, CPU)
    assert work is not None
    assert set(work.lines) == {1, 2}
    batch = example_batch(config, 4, config.data.max_tokens)
    assert work.of(batch, 2) > work.of(batch, 1)


def test_peaks_of_cards() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16", True) == 989
    assert peak_tflops("NVIDIA H100 PCIe", "bf16", True) == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32", True) == 156
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32", False) == 19.5
    assert peak_tflops("NVIDIA A10", "fp16", True) == 125
    assert peak_tflops("Tesla V100-SXM2-32GB", "fp16", True) == 125
    assert peak_tflops("Tesla V100-SXM2-32GB", "fp32", True) == 15.7
    assert peak_tflops("Tesla V100-SXM2-32GB", "bf16", True) is None
    assert peak_tflops("NVIDIA GeForce RTX 9999", "bf16", True) is None


def test_without_a_known_peak_nothing_is_counted() -> None:
    config = small_config("mgca")
    method = build_method(config, tokenizer().vocab_size)
    assert step_work(method, config, Schedule(np.ones(1), np.zeros(1, dtype=np.int64)), 0, CPU) is None


def test_a_network_that_cannot_be_counted_trains_without_mfu(caplog: pytest.LogCaptureFixture) -> None:
    config = small_config("mgca")
    config.monitor.peak_tflops = 1.0
    method = build_method(config, tokenizer().vocab_size)
    encoder: Any = method.image_encoder
    encoder.register_forward_pre_hook(lambda _, given: print(float(given[0].float().mean())))
    drawn = torch.get_rng_state()
    with caplog.at_level("WARNING", logger="medvlp"):
        work = step_work(method, config, Schedule(np.ones(1), np.zeros(1, dtype=np.int64)), 0, CPU)
    assert work is None
    assert "no mfu: the operations of this network cannot be counted" in caplog.text
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.dist
def test_metrics_of_a_run_hold_operations_and_their_share_of_the_peak(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    gloo_pool(2).run(train, overrides("train.steps=2", "monitor.peak_tflops=0.001"))
    for line in read_metrics(tmp_path / "run"):
        assert line["tflop"] > 0
        speed = line["tflop"] / line["step_seconds"] / 2
        assert line["mfu"] == pytest.approx(speed / 0.001, rel=1e-3)
    gloo_pool(2).run(train, overrides("train.steps=3", "monitor.peak_tflops=null"))
    assert "mfu" not in read_metrics(tmp_path / "run")[-1]


def test_torch_is_asked_for_gpus_again_after_fake_tensors() -> None:
    before = torch.cuda.is_available
    with pytest.raises(RuntimeError, match="planned"), fake_tensors():
        raise RuntimeError("planned")
    assert torch.cuda.is_available is before

"""Runs whose encoder blocks and heads are compiled have the losses of those that are not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from medvlp.config import Config, ConfigError
from medvlp.config_combinations import check_combinations
from medvlp.encoders.projection import ProjectionHead
from medvlp.training.regional_compile import compile_regions, regions
from tests.distributed_pool import Pools
from tests.methods.small import built, small_config
from tests.training.runs import Overrides, read_metrics, train

CPU = torch.device("cpu")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def train_counting_graphs(overrides: list[str]) -> int:
    """Train; how many graphs torch has compiled on the way."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # else a pool of processes starts
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    train(overrides)
    return int(counts["unique_graphs"] - before)


@pytest.mark.dist
@pytest.mark.skipif(COMPILER is None, reason="torch.compile for the CPU needs a C++ compiler (g++, or CXX)")
def test_a_compiled_run_has_the_losses_of_another_and_resumes(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    pool = gloo_pool(1)
    # One block of each encoder beside the last one, and the heads.
    smaller = ["image.options={depth: 2}", "train.steps=4", "zero.stage=1"]
    compiled = ["train.compile=true", "checkpoint.every_steps=2", *smaller]
    assert pool.run(train_counting_graphs, overrides(*smaller, "data.pad_multiple=32")) == [0]
    [graphs] = pool.run(train_counting_graphs, overrides(*compiled, run="compiled"))
    assert graphs > 2
    plain, found = (read_metrics(tmp_path / name) for name in ("run", "compiled"))
    for expected, line in zip(plain, found, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    shutil.rmtree(tmp_path / "compiled/checkpoints/step-00000004")
    pool.run(train_counting_graphs, overrides(*compiled, run="compiled"))
    again = read_metrics(tmp_path / "compiled")
    assert [line["loss"] for line in again] == [line["loss"] for line in found]


def test_what_is_compiled() -> None:
    method: Any = built(small_config("mgca"))
    found = list(regions(method))
    assert sum(isinstance(region, ProjectionHead) for region in found) == 4
    for blocks in (method.image_encoder.backbone.blocks, method.text_encoder.model.encoder.layer):
        assert [block in found for block in blocks] == [True] * (len(blocks) - 1) + [False]
    assert not list(regions(timm.create_model("resnet10t")))  # batch norms


def test_a_machine_without_a_compiler_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    method = built(small_config("mgca"))

    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no working C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    with caplog.at_level("WARNING"):
        assert compile_regions(method, CPU) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "train.compile: nothing is compiled, because torch.compile fails here: no working C++ compiler"
    ]
    assert all(module._compiled_call_impl is None for module in method.modules())


def test_stage_three_is_refused() -> None:
    config = Config()
    config.train.compile, config.zero.stage = True, 3
    with pytest.raises(ConfigError, match=r"train\.compile=true needs zero\.stage of 0, 1 or 2"):
        check_combinations(config)

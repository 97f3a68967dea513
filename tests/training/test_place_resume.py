"""PLACE resumes bit for bit: its teacher, its soft matching, and what it draws when it drops patches."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import TINY, train

pytestmark = pytest.mark.dist

PLACE = [
    "method.name=place", "method.embedding=16", "method.head_hidden=32", "method.queries=4",
    "method.query_layers=1", "method.decoder_width=32", "method.decoder_heads=2",
    "method.correlation_target=teacher", "method.teacher_momentum=0.5", "method.patch_drop=0.5",
    "checkpoint.every_steps=2", "optimizer.lr=1e-2",
]  # fmt: skip


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def test_resuming_is_bit_identical(gloo_pool, phantom_data, tmp_path) -> None:
    shared = [option for option in TINY if not option.startswith("method.")]
    options = [*shared, *PLACE, f"data.root={phantom_data}", "zero.stage=3", "precision=bf16"]
    pool, whole, resumed = gloo_pool(2), tmp_path / "whole", tmp_path / "resumed"
    assert pool.run(train, [*options, f"run.dir={whole}"]) == [0, 0]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    assert pool.run(train, [*options, f"run.dir={resumed}"]) == [0, 0]
    teacher = "alignment.correlation.patches.teacher_weight"
    before, expected, found = weights(whole, 2), weights(whole, 4), weights(resumed, 4)
    assert not torch.equal(before[teacher], expected[teacher])
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name

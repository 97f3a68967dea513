"""Every ZeRO stage on two ranks computes what one process computes on the same global batches."""

from pathlib import Path

import pytest

from tests.distributed_pool import GlooPool, Pools
from tests.training.runs import Overrides, read_metrics, train

pytestmark = pytest.mark.dist

NETS = ["test_vit.r160_in1k", "test_resnet.r160_in1k"]


def losses(
    pool: GlooPool, overrides: Overrides, tmp_path: Path, name: str, *more: str
) -> list[tuple[float, float]]:
    given = overrides(*more, run=name)
    if "image.name=test_resnet.r160_in1k" in more:
        given = [word for word in given if not word.startswith("image.options=")]  # those of a ViT
    pool.run(train, given)
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name)]


def largest_difference(
    found: list[tuple[float, float]], expected: list[tuple[float, float]], column: int = 0
) -> float:
    assert len(found) == len(expected) > 0
    return max(abs(a[column] - b[column]) / abs(b[column]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("net", NETS)
def test_fp32_over_eight_steps(gloo_pool: Pools, overrides: Overrides, tmp_path: Path, net: str) -> None:
    options = [f"image.name={net}", "train.steps=8", "optimizer.lr=2e-5"]
    expected = losses(gloo_pool(1), overrides, tmp_path, "one", *options, "zero.stage=0")
    other = losses(gloo_pool(1), overrides, tmp_path, "other", *options, "optimizer.lr=2.1e-5")
    assert largest_difference(other, expected) > 1e-4, "the test would not see a wrong update"
    for stage in range(4):
        found = losses(gloo_pool(2), overrides, tmp_path, f"stage{stage}", *options, f"zero.stage={stage}")
        difference = largest_difference(found, expected)
        print(f"{net} fp32 stage {stage}: largest relative difference {difference:.1e}")
        assert difference < 1e-4
        # Norms of gradients through batch norms of four samples amplify rounding; the losses do not.
        assert largest_difference(found, expected, column=1) < 3e-3


@pytest.mark.parametrize("net", NETS)
def test_bf16(gloo_pool: Pools, overrides: Overrides, tmp_path: Path, net: str) -> None:
    options = [f"image.name={net}", "train.steps=3", "precision=bf16", "optimizer.lr=2e-5"]
    expected = losses(gloo_pool(1), overrides, tmp_path, "one", *options, "zero.stage=0")
    for stage in range(4):
        found = losses(gloo_pool(2), overrides, tmp_path, f"stage{stage}", *options, f"zero.stage={stage}")
        difference = largest_difference(found, expected)
        print(f"{net} bf16 stage {stage}: largest relative difference {difference:.1e}")
        assert difference < 0.02


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accumulation_is_the_same_on_one_and_two_ranks(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path, stage: int
) -> None:
    """Exact: one contrast of sixteen. Plain: two of eight. Whoever computes them."""
    whole = losses(gloo_pool(1), overrides, tmp_path, "whole", f"zero.stage={stage}")
    for kind in ("exact", "plain"):
        options = f"zero.stage={stage}", f"train.accumulate={kind}"
        one = losses(gloo_pool(1), overrides, tmp_path, f"one-{kind}", "train.micro_batch=8", *options)
        two = losses(gloo_pool(2), overrides, tmp_path, f"two-{kind}", "train.micro_batch=4", *options)
        assert largest_difference(two, one) < 1e-4
        assert (largest_difference(whole, one) < 1e-4) == (kind == "exact")


def test_clipping_and_learning_rate_scales_agree_across_stages(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    options = [
        "train.gradient_clip=1",
        "optimizer.image_lr_scale=0",
        "optimizer.name=sgd",
        "optimizer.lr=0.01",
    ]
    expected = losses(gloo_pool(1), overrides, tmp_path, "one", *options, "zero.stage=0")
    for stage in (1, 3):
        found = losses(gloo_pool(2), overrides, tmp_path, f"stage{stage}", *options, f"zero.stage={stage}")
        assert largest_difference(found, expected) < 1e-4

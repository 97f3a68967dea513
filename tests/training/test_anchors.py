"""Texts as anchors of service clusters: embedded alike on all ranks, without a trace in the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.data.text import Tokenizer
from medvlp.methods.registry import build_method
from medvlp.prototypes.anchors import AnchorEncoder
from medvlp.training.engine import Engine
from tests.distributed_pool import Pools
from tests.methods.small_mgca import rows_of, small_batch, small_config
from tests.training.runs import Overrides, read_metrics, train

TEXTS = ["pleural effusion", "pneumothorax on the left"]


def anchored(stage: int, anchors: list[str]) -> Config:
    config = small_config(prototype_source="clusters")
    config.run.dir, config.data.root, config.text.dropout = "", "", 0.3
    config.train.global_batch, config.zero.stage, config.precision = 12, stage, "fp32"
    config.prototypes.anchors = anchors
    return config


def losses_and_anchors(root: str, stage: int, anchors: list[str]) -> tuple[list[float], list[np.ndarray]]:
    """Losses of three steps with dropout, and the anchors between them."""
    device, tokenizer = distributed.initialize(), Tokenizer.load(None, root)
    config = anchored(stage, anchors)
    torch.manual_seed(0)
    method = build_method(config, tokenizer.vocab_size)
    encoder = AnchorEncoder(method, tokenizer, config, device)
    found, losses, rank = [encoder()], [], distributed.rank()
    engine = Engine(method, config, divide_batch(config, distributed.world_size()), device)
    torch.manual_seed(rank)
    engine.objective.train()
    share = 12 // distributed.world_size()
    for step in range(3):
        engine.set_learning_rate(1e-2)
        batch = rows_of(
            small_batch([3 + row % 5 for row in range(12)], seed=step), share * rank, share * (rank + 1)
        )
        loss = engine.forward(batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        found.append(encoder())
        assert all(part.training for part in method.modules())
    engine.close()
    return losses, [each.numpy() for each in found if each is not None]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_they_leave_no_trace(gloo_pool: Pools, phantom_data: Path, stage: int) -> None:
    plain = gloo_pool(2).run(losses_and_anchors, str(phantom_data), stage, [])
    results = gloo_pool(2).run(losses_and_anchors, str(phantom_data), stage, TEXTS)
    assert [losses for losses, _ in results] == [losses for losses, _ in plain]
    assert plain[0][1] == []
    for first, second in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    begun, *later = results[0][1]
    assert begun.shape == (2, 8)
    assert np.abs(begun[0] - begun[1]).max() > 1e-3
    assert np.abs(begun - later[-1]).max() > 1e-4  # they follow the weights


@pytest.mark.dist
def test_a_run_holds_its_first_clusters_there(gloo_pool: Pools, overrides: Overrides, tmp_path: Path) -> None:
    options = [
        "method.prototype_source=clusters", "method.prototypes=6", "prototypes.refresh_steps=2",
        "prototypes.sync=true", "prototypes.anchors=[pleural effusion, pneumothorax]", "zero.stage=3",
        "train.steps=2",
    ]  # fmt: skip
    assert gloo_pool(2).run(train, overrides(*options)) == [0, 0]
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["prototypes/version"] == 1
    free = [*options[:-3], *options[-2:]]
    assert gloo_pool(2).run(train, overrides(*free, run="free")) == [0, 0]
    others = read_metrics(tmp_path / "free")
    assert [line["loss"] for line in lines[:2]] == [line["loss"] for line in others[:2]]
    assert lines[-1]["prototypes/similarity"] != others[-1]["prototypes/similarity"]

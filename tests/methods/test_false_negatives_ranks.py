"""Masks on several ranks: the single-process gradient in every method, and steps without a table between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import OptimizerConfig
from medvlp.data.batch_sizes import BatchSizes
from medvlp.distributed import rank
from medvlp.methods.base import Progress
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.engine import Engine
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small_masked import METHODS, built, labelled_batch, masked_config, masked_method, table_for
from tests.methods.small_mgca import rows_of

pytestmark = pytest.mark.dist

#: Clusters that mask and are prototypes too.
CLUSTERED: dict[str, Any] = {"prototype_source": "clusters", "prototypes": 3}
#: In the combination a part masks for those before it.
KEYS: dict[str, dict[str, Any]] = {"mgca": CLUSTERED, "combination": {"embeds_with": "prior"}}
DROPPED: dict[str, dict[str, Any]] = {
    "mgca": CLUSTERED,
    "combination": {"mgca": MGCAConfig(embedding=8, head_hidden=16, **CLUSTERED)},
}
USABLE = (False, True, False, True, True)


def gradients(ranks: int, name: str, centroids: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    method = masked_method(name, **KEYS.get(name, {})).double()
    method.on_progress(Progress(1, 1, 2))
    table = PrototypeTable.start(torch.from_numpy(centroids))
    return averaged_gradients(method, labelled_batch(name), ranks, table)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_equals_the_single_process_one(gloo_pool: Any, ranks: int, name: str) -> None:
    method = masked_method(name, **KEYS.get(name, {}))
    centroids = table_for(method, labelled_batch(name)).centroids.numpy()
    terms, expected = gradients(1, name, centroids)
    results = gloo_pool(ranks).run(gradients, ranks, name, centroids)
    for term, value in terms.items():
        # Of each rank's own: shares of pairs and tokens, the reports of its other samples.
        if not term.endswith(("observation/excluded", "correlation/shuffled", "report/accuracy")):
            mean = np.mean([own[term] for own, _ in results])
            assert mean == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), term
    assert name == "medslip" or 0 < terms["prototypes/masked"] < 1
    assert_equal_gradients(results, expected)


def train_with_dropped_tables(stage: int, name: str, centroids: np.ndarray) -> list[dict[str, float]]:
    """This rank's terms of five steps of which some have no table."""
    config = masked_config(name, **DROPPED[name])
    config.zero.stage, config.precision = stage, "fp32"
    config.optimizer = OptimizerConfig(lr=1e-3)
    # Everything is sharded, however small.
    config.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    method = built(config)
    engine = Engine(method, config, BatchSizes(8, 4, 1, 2), torch.device("cpu"))
    table = PrototypeTable.start(torch.from_numpy(centroids))
    own = rows_of(labelled_batch(name), rank() * 4, rank() * 4 + 4)
    steps = []
    for step, usable in enumerate(USABLE):
        method.on_progress(Progress(0, step, len(USABLE)))
        engine.set_learning_rate(1e-3)
        terms = engine.forward(own, table if usable else None).named
        engine.backward(terms["loss"])
        engine.step()
        steps.append({term: value.item() for term, value in terms.items()})
    engine.close()
    return steps


@pytest.mark.parametrize("name", ["mgca", "combination"])
def test_steps_without_a_table_stay_in_step(gloo_pool: Any, name: str) -> None:
    """As with `prototypes.stale=drop_loss`; sharded (ZeRO-3) or not, the ranks do the same."""
    table = table_for(masked_method(name, **DROPPED[name]), labelled_batch(name))
    runs = [
        gloo_pool(2).run(train_with_dropped_tables, stage, name, table.centroids.numpy()) for stage in (0, 3)
    ]
    prototype = "loss/prototype" if name == "mgca" else "mgca/loss/prototype"
    for first, second in runs:
        for usable, mine, other in zip(USABLE, first, second, strict=True):
            assert set(mine) == set(other)
            assert (prototype in mine) == ("prototypes/masked" in mine) == usable
            assert np.isfinite([mine["loss"], other["loss"]]).all()
    for plain, sharded in zip(*runs, strict=True):
        np.testing.assert_allclose([x["loss"] for x in sharded], [x["loss"] for x in plain], rtol=1e-4)

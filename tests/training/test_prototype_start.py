"""Prototypes that a later phase is the first to use start from the features of that moment.

That a run resumes bit for bit at the start and after it is in tests/training/test_prior_resume.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvlp import distributed
from medvlp.config import PhaseConfig, PrototypesConfig
from medvlp.data.batch_sizes import divide_batch
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress
from medvlp.methods.registry import build_method
from medvlp.prototypes.initialise import find_prototypes, initialise_prototypes
from medvlp.training.engine import Engine
from medvlp.training.prototype_start import PrototypeStart, late_start
from medvlp.training.schedule import Schedule
from tests.distributed_pool import Pools
from tests.methods.small_mgca import VOCABULARY, rows_of
from tests.methods.small_prior import report_batch, small_prior_config
from tests.training.runs import Overrides, Precision, read_metrics, train
from tests.training.test_prototype_revival import record

KMEANS = PrototypesConfig(init="kmeans", init_samples=12, iterations=5)
#: Two steps in the phase of stage 1, then two in that of stage 2.
SCHEDULE = Schedule(np.full(4, 3e-3), np.array([0, 0, 1, 1]))
BANK = "alignment.objective.bank"


def own_rows(parts: int = 1) -> list[Any]:
    """This rank's share of twelve samples, in so many batches."""
    share = 12 // distributed.world_size() // parts
    first = parts * share * distributed.rank()
    whole = report_batch([[2, 3], [4], [2, 2, 2]] * 4)
    return [rows_of(whole, first + share * part, first + share * (part + 1)) for part in range(parts)]


def start(stage: int, precision: Precision) -> dict[str, Any]:
    """The bank before and after its start, what k-means finds at both moments, and the bank a step later."""
    device = distributed.initialize()
    config = small_prior_config()
    config.run.dir, config.data.root, config.optimizer.phases = "", "", [PhaseConfig(1, 1e-3)] * 3
    config.train.global_batch, config.zero.stage, config.precision = 12, stage, precision
    torch.manual_seed(0)
    method = build_method(config, VOCABULARY)
    assert late_start(method, KMEANS, SCHEDULE)
    assert initialise_prototypes(method, own_rows, KMEANS, seed=3) == []
    engine = Engine(method, config, divide_batch(config, distributed.world_size()), device)
    logged: list[dict[str, float]] = []
    starting = PrototypeStart(engine, KMEANS, 3, SCHEDULE, lambda step: own_rows(2), logged.append)
    marks: list[tuple[str, int]] = []
    starting.alive = lambda *mark: marks.append(mark)
    (user,) = method.prototype_users

    def bank() -> np.ndarray:
        return engine.whole_parameter(f"{BANK}.weight").float().cpu().numpy().copy()

    def clusters() -> Any:
        return find_prototypes(method, user, own_rows(2), KMEANS, 3)

    found: dict[str, Any] = {"first": clusters().clusters.centroids.numpy(), "random": bank()}
    for step in range(1, 4):
        method.train()
        method.on_progress(Progress(0, step - 1, 4, int(SCHEDULE.phases[step - 1])))
        engine.set_learning_rate(3e-3)
        output = engine.forward(*own_rows())
        engine.backward(output.loss)
        engine.step()
        assert ("loss/bank" in output.terms) == (step == 3)
        if step == 2:
            (expected, length) = clusters()
            found |= {"before": bank(), "expected": (length * unit_norm(expected.centroids)).numpy()}
        starting.on_step(record(engine, step))
        found[f"after {step}"] = bank()
    engine.close()
    return found | {"logged": logged, "marks": marks}


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "fp32")])
def test_the_bank_starts_where_it_is_first_used(gloo_pool: Pools, stage: int, precision: Precision) -> None:
    results = gloo_pool(2).run(start, stage, precision)
    for found in results:
        np.testing.assert_allclose(found["after 1"], found["random"], atol=1e-2)
        np.testing.assert_array_equal(found["after 2"], found["expected"])
        assert np.abs(found["after 2"] - found["before"]).max() > 0.1
        directions = found["expected"] / np.linalg.norm(found["expected"], axis=1, keepdims=True)
        assert np.abs(directions - found["first"]).max() > 1e-3, "the features have moved since the beginning"
        assert [list(each) for each in found["logged"]] == [["prototypes/start_similarity"]]
        assert found["marks"] == [("starting prototypes", 2)] * 2, "one for each batch"
        moved = np.abs(found["after 3"] - found["after 2"])
        assert 0 < moved.max() < 0.05, "the optimiser goes on from the started prototypes"
        np.testing.assert_array_equal(found["after 3"], results[0]["after 3"])


@pytest.mark.dist
def test_the_start_depends_neither_on_ranks_nor_on_the_micro_batch(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    """20 samples asked for are two steps of 16, however these are cut."""
    losses = {}
    for ranks, micro in (1, 16), (1, 4), (2, 4):
        name = f"{ranks}x{micro}"
        words = [f"train.micro_batch={micro}", "train.steps=1", "prototypes.init=kmeans"]
        words = overrides(*words, "prototypes.init_samples=20", run=name)
        assert gloo_pool(ranks).run(train, words) == [0] * ranks
        losses[name] = read_metrics(tmp_path / name)[0]["loss/prototype"]
    assert losses == pytest.approx(dict.fromkeys(losses, losses["1x16"]), rel=1e-4)

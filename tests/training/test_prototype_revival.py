"""Revival and movement of learned prototypes under every ZeRO stage, on two ranks.

That a run with revival resumes bit for bit is in tests/training/test_prior_resume.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medvlp import distributed
from medvlp.config import Config, PrototypesConfig
from medvlp.config_files import ConfigError
from medvlp.data.batch_sizes import divide_batch
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress
from medvlp.methods.registry import build_method
from medvlp.prototypes.usage import CountedPrototypes, revived_rows
from medvlp.training.callbacks import StepRecord
from medvlp.training.engine import Engine
from medvlp.training.prototype_revival import PrototypeRevival
from tests.distributed_pool import Pools
from tests.methods.small_mgca import VOCABULARY, rows_of, small_batch, small_config
from tests.methods.small_prior import report_batch, small_prior_config
from tests.training.runs import Precision
from tests.training.tiny import TinyMethod

#: Rows of the bank that nothing is near to at the start.
UNUSED = [1, 4]


def record(engine: Engine, step: int, applied: bool = True) -> StepRecord:
    """A finished step, as a callback sees it."""
    return StepRecord(step, 0, False, applied, True, {}, [], 0.1, 12, 0, 0.0, 0.0, engine)


def directions(bank: CountedPrototypes) -> torch.Tensor:
    """[K, D] prototypes that the next forward pass uses, read by what it does to unit vectors."""
    bank.eval()
    scores: torch.Tensor
    with torch.no_grad():
        if bank.__class__.__name__ == "SentenceBank":
            scores = bank(torch.eye(16), 1.0).scores
        else:
            scores = bank(torch.eye(8))
    bank.train()
    return scores.T.clone()


def start(name: str, stage: int, precision: Precision) -> tuple[Engine, str]:
    """An engine around a small method whose bank has unused rows, and the bank's name."""
    device = distributed.initialize()
    config: Config = small_config() if name == "mgca" else small_prior_config(stage=2)
    config.run.dir, config.data.root = "", ""
    config.train.global_batch, config.zero.stage, config.precision = 12, stage, precision
    torch.manual_seed(0)
    method = build_method(config, VOCABULARY)
    bank_name, bank = next(
        (name, part) for name, part in method.named_modules() if isinstance(part, CountedPrototypes)
    )
    batch, (user,) = global_batch(name), method.prototype_users
    with torch.no_grad():
        found = user.prototype_features(user.prototype_encodings(method, batch), batch)
        features = torch.cat([part.flatten(0, -2) for part in found])
        features = unit_norm(features)
        axes = torch.linalg.svd(features).Vh[:2]
        used = torch.cat([axes, -axes])
        # Of many directions the two that lose by most against these, whatever the feature.
        candidates = unit_norm(torch.randn(5000, features.shape[1]))
        margin = (features @ candidates.T - (features @ used.T).amax(1, keepdim=True)).amax(0)
        unused = candidates[margin.argsort()[:2]]
        placed = torch.stack([used[0], unused[0], used[1], used[2], unused[1], used[3]])
        bank.weight.copy_(bank.weight.norm(dim=1).mean() * placed)
    return Engine(method, config, divide_batch(config, distributed.world_size()), device), bank_name


def global_batch(name: str) -> Any:
    if name == "mgca":
        return small_batch([3 + row % 5 for row in range(12)])
    return report_batch([[2, 3], [4], [2, 2, 2]] * 4)


def train(engine: Engine, name: str, step: int, epoch: int = 5) -> None:
    engine.objective.train()
    engine.objective.on_progress(Progress(epoch, step, 20))
    engine.set_learning_rate(3e-4)
    share = 12 // distributed.world_size()
    first = share * distributed.rank()
    engine.backward(engine.forward(rows_of(global_batch(name), first, first + share)).loss)
    engine.step()


def revive(name: str, stage: int, precision: Precision) -> dict[str, Any]:
    """Train until unused rows are revived; what the model reads and the optimiser holds around that."""
    engine, bank_name = start(name, stage, precision)
    bank, parameter = engine.objective.get_submodule(bank_name), f"{bank_name}.weight"
    logged: list[dict[str, float]] = []
    assert isinstance(bank, CountedPrototypes)
    config = PrototypesConfig(revive_below=0.2, refresh_steps=4)
    revival, other = (PrototypeRevival(engine, config, 3, logged.append) for _ in range(2))
    for step in range(1, 4):
        train(engine, name, step)
        other.on_step(record(engine, step, applied=step != 2))
    revival.load_state_dict(other.state_dict())
    train(engine, name, 4)
    found = {"before": directions(bank)}
    revival.on_step(record(engine, 4))
    found["changed"] = directions(bank)
    found["master"] = engine.whole_parameter(parameter).float()
    tensors, starts = engine.optimizer_state()
    first = starts.get(parameter, 0)  # a rank may hold no part of the bank
    moments = {key.split(":")[0]: value for key, value in tensors.items() if key.endswith(f":{parameter}")}
    found |= {key: value.clone() for key, value in moments.items() if key.startswith("exp_avg")}
    train(engine, name, 5)
    found["after"] = directions(bank)
    engine.close()
    arrays = {key: value.float().numpy() for key, value in found.items()}
    return {"revived": [each["prototypes/revived"] for each in logged], "first": first, **arrays}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "precision", "stage"),
    [
        ("mgca", "fp32", 1),
        ("mgca", "fp32", 3),
        ("prior", "bf16", 0),
        ("prior", "bf16", 2),
        ("prior", "bf16", 3),
    ],
)
def test_unused_rows_start_anew(gloo_pool: Pools, name: str, precision: Precision, stage: int) -> None:
    results = gloo_pool(2).run(revive, name, stage, precision)
    for key in ("before", "changed", "master", "after"):
        np.testing.assert_array_equal(results[0][key], results[1][key])
    held = 0
    for result in results:
        before, changed, width = result["before"], result["changed"], result["before"].shape[1]
        revived = np.flatnonzero((before != changed).any(1))
        assert set(UNUSED) <= set(revived)
        assert result["revived"] == [len(revived)] == [len(set(revived))]
        assert len(revived) < len(before)
        # What is read is what the optimiser goes on from.
        master = result["master"]
        if name == "mgca":
            master = master / np.linalg.norm(master, axis=1, keepdims=True)
            np.testing.assert_allclose(np.linalg.norm(changed, axis=1), 1, atol=1e-6)
            np.testing.assert_allclose(np.linalg.norm(result["after"], axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(changed, master, rtol=1e-2, atol=1e-6 if name == "mgca" else 5e-2)
        # Beside one that was used.
        cosine = changed[UNUSED] @ before.T / np.linalg.norm(changed[UNUSED], axis=1, keepdims=True)
        cosine = (cosine / np.linalg.norm(before, axis=1)).max(1)
        assert (cosine > 0.99).all()
        for key in ("exp_avg", "exp_avg_sq"):
            rows = (result["first"] + np.arange(len(result.get(key, ())))) // width
            held += len(rows)
            new = np.isin(rows, revived)
            assert (result.get(key, np.zeros(0))[new] == 0).all()
            assert (result.get(key, np.ones(1))[~new] != 0).any() or new.all()
        assert (result["after"][revived] != changed[revived]).any()
    assert held == 2 * before.size  # both moments of every element lie on some rank


def move(stage: int) -> list[Any]:
    """Directions at the start, after two steps with frozen prototypes, and after one more without."""
    engine, bank_name = start("mgca", stage, "fp32")
    bank = engine.objective.get_submodule(bank_name)
    assert isinstance(bank, CountedPrototypes)
    found = [directions(bank)]
    for step, epoch in enumerate((0, 0, 1)):
        train(engine, "mgca", step, epoch)
        if step:
            found.append(directions(bank))
    engine.close()
    return [each.numpy() for each in found]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_prototypes_move_only_when_unfrozen(gloo_pool: Pools, stage: int) -> None:
    for begun, frozen, moved in gloo_pool(2).run(move, stage):
        np.testing.assert_array_equal(begun, frozen)
        assert (np.abs(moved - frozen).max(1) > 1e-4).all()
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-6)


def test_the_most_used_lend_their_places() -> None:
    weight = torch.eye(6) * torch.arange(1, 7)[:, None]
    usage = torch.tensor([0.0, 100.0, 40.0, 0.5, 0.0, 30.0])
    rows, values = revived_rows(weight, usage, 0.05, seed=1)
    assert rows.tolist() == [0, 3, 4]
    # 100 is halved twice before 40 has its turn.
    assert values.argmax(1).tolist() == [1, 1, 2]
    torch.testing.assert_close((values[0] - weight[1]).norm(), torch.tensor(0.05 * 2))
    again = revived_rows(weight, usage, 0.05, seed=1)[1]
    assert torch.equal(values, again)
    assert not torch.equal(values, revived_rows(weight, usage, 0.05, seed=2)[1])
    assert len(revived_rows(weight, torch.ones(6), 1.0, seed=1)[0]) == 0


def refused() -> str:
    device = distributed.initialize()
    config = small_config()
    config.run.dir, config.data.root, config.train.global_batch, config.precision = "", "", 12, "fp32"
    engine = Engine(TinyMethod(), config, divide_batch(config, distributed.world_size()), device)
    try:
        PrototypeRevival(engine, PrototypesConfig(revive_below=0.1), 0, lambda metrics: None)
    except ConfigError as error:
        return str(error)
    finally:
        engine.close()
    return ""


@pytest.mark.dist
def test_a_method_without_prototypes_is_refused(gloo_pool: Pools) -> None:
    assert "prototypes.revive_below=0.1" in gloo_pool(2).run(refused)[0]

"""Table, bank and synchronous service."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from medvlp.config import PrototypesConfig
from medvlp.distributed import rank
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.asynchronous import AsynchronousService
from medvlp.prototypes.board import BOARD, DECLINED, Board, new_board
from medvlp.prototypes.synchronous import SynchronousService, build_service
from medvlp.prototypes.table import PrototypeTable
from medvlp.ranks import Ranks
from tests.prototypes.test_kmeans import mixture

CONFIG = PrototypesConfig(refresh_steps=5, bank_rows=64, iterations=5, temperature=0.1)


def filled_service(config: PrototypesConfig = CONFIG, count: int = 4) -> SynchronousService:
    service = SynchronousService(config, count, 8, seed=1)
    rows = mixture(4, 8)
    service.update({"image": rows[:16], "text": rows[16:]}, torch.arange(16), step=1)
    return service


def test_table_assigns_by_cosine() -> None:
    table = PrototypeTable.start(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    rows = unit_norm(torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, 0.5]]))
    assert table.assign(rows).tolist() == [0, 1, 1]
    similarity, clusters = table.nearest(rows, k=5)
    assert clusters.tolist() == [[0, 1], [1, 0], [1, 0]]
    torch.testing.assert_close(similarity[0, 0], rows[0, 0])


@pytest.mark.parametrize(("balance", "expected"), [("none", [0, 1]), ("sinkhorn", [0, 1]), ("bias", [1, 1])])
def test_hard_assignment_knows_the_bias_but_no_temperature_of_a_cluster(balance, expected) -> None:
    state = PrototypeTable.start(torch.eye(2), temperature=0.1, balance=balance).state_dict()
    table = PrototypeTable(
        **{**state, "temperatures": torch.tensor([1.0, 0.01]), "log_bias": torch.tensor([0.0, 7.0])}
    )
    assert table.assign(unit_norm(torch.tensor([[1.0, 0.5], [0.1, 1.0]]))).tolist() == expected


@pytest.mark.parametrize("balance", ["sinkhorn", "bias", "none"])
def test_soft_assignments_are_distributions(balance: str) -> None:
    service = filled_service(dataclasses.replace(CONFIG, balance=balance))
    service.refresh(5)
    rows = mixture(4, 8, seed=3).requires_grad_()
    codes = service.assign(rows)
    torch.testing.assert_close(codes.sum(1), torch.ones(len(rows)))
    assert not codes.requires_grad


def test_bias_evens_out_uneven_clusters() -> None:
    rows = torch.cat([mixture(1, 90, spread=0.3, seed=1), mixture(1, 10, spread=0.3, seed=2)])
    usage = {}
    for balance in ("none", "bias"):
        config = dataclasses.replace(CONFIG, balance=balance, bank_rows=200, temperature=0.3)
        service = SynchronousService(config, 2, 8, seed=0)
        service.update({"image": rows}, torch.arange(100), step=1)
        service.refresh(5)
        usage[balance] = service.assign(rows).mean(0).max()
    assert usage["bias"] < usage["none"] - 0.05


def test_fingerprint_follows_every_part() -> None:
    table = PrototypeTable.start(torch.eye(3))
    assert table.fingerprint == PrototypeTable.start(torch.eye(3)).fingerprint
    assert table.fingerprint == PrototypeTable.from_state_dict(table.state_dict()).fingerprint
    for change in (
        {"version": 1},
        {"temperature": 0.2},
        {"balance": "none"},
        {"counts": torch.ones(3)},
        {"log_bias": torch.ones(3)},
        {"centroids": torch.eye(3).flip(0)},
    ):
        assert PrototypeTable(**{**table.state_dict(), **change}).fingerprint != table.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": 2 * torch.eye(3)}, "unit"),
        ({"counts": torch.ones(2)}, "counts"),
        ({"balance": "even"}, "balance"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_table_refuses_nonsense(change: dict, message: str) -> None:
    state = PrototypeTable.start(torch.eye(3)).state_dict()
    with pytest.raises(ValueError, match=message):
        PrototypeTable(**{**state, **change})


def test_refresh_counts_versions_and_reports() -> None:
    service = filled_service()
    assert [step for step in range(12) if service.refresh_due(step)] == [5, 10]
    metrics = service.refresh(5)
    assert metrics["prototypes/version"] == 1
    assert metrics["prototypes/rows"] == 32
    assert metrics["prototypes/similarity"] > 0.9
    assert metrics["prototypes/perplexity"] == pytest.approx(1.0, abs=0.05)
    assert metrics["prototypes/dead"] == 0
    first = service.table
    service.refresh(5)
    assert service.table.version == 2
    assert (first.centroids * service.table.centroids).sum(1).min() > 0.99


def test_blend_moves_centroids_part_of_the_way() -> None:
    service = filled_service(dataclasses.replace(CONFIG, blend=0.1))
    service.refresh(5)
    before = service.table.centroids
    service.update({"image": mixture(4, 16, seed=9)}, torch.arange(64), step=2)
    service.refresh(5)
    assert (before * service.table.centroids).sum(1).min() > 0.9


def test_too_few_embeddings_leave_the_table_alone() -> None:
    service = filled_service(count=40)
    metrics = service.refresh(5)
    assert (metrics["prototypes/version"], metrics["prototypes/put_off"]) == (0, 1)
    assert service.table is None
    with pytest.raises(RuntimeError, match="refresh_steps"):
        service.assign(mixture(2, 2))


def test_resumed_service_goes_on_identically() -> None:
    service = filled_service()
    service.refresh(5)
    other = SynchronousService(CONFIG, 4, 8, seed=1)
    other.load_state_dict(service.state_dict())
    for each in (service, other):
        each.update({"image": mixture(4, 4, seed=5)}, torch.arange(16), step=3)
        each.refresh(5)
    assert service.table.fingerprint == other.table.fingerprint
    elsewhere = SynchronousService(CONFIG, 4, 8, seed=1)
    elsewhere.load_state_dict({"table": service.state_dict()["table"]})
    assert len(elsewhere.rows.ring) == 0
    assert elsewhere.table.fingerprint == service.table.fingerprint


def refresh_own_rows(rows: np.ndarray, ranks: int) -> tuple[str, np.ndarray]:
    service = SynchronousService(CONFIG, 4, 8, seed=1)
    own = torch.from_numpy(rows).chunk(ranks)[rank()]
    first = rank() * len(own) if ranks > 1 else 0
    service.update({"image": own}, torch.arange(first, first + len(own)), step=1)
    service.refresh(5)
    return service.table.fingerprint, service.assign(own).numpy()


@pytest.mark.dist
def test_all_ranks_hold_the_same_table(gloo_pool) -> None:
    rows = mixture(4, 8, spread=0.3).numpy()
    _, alone = refresh_own_rows(rows, 1)
    results = gloo_pool(2).run(refresh_own_rows, rows, 2)
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(np.concatenate([codes for _, codes in results]), alone, atol=1e-5)


def test_the_kind_of_service_follows_from_config_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, path = new_board()
    monkeypatch.setenv(BOARD, path)
    service = build_service(CONFIG, (4, 8), 0, Ranks("none"), "cpu")
    assert isinstance(service, SynchronousService)
    assert Board(path).state == DECLINED  # a worker that a launcher may have started is not needed
    os.close(descriptor)
    descriptor, path = new_board()
    monkeypatch.setenv(BOARD, path)
    service = build_service(CONFIG, (4, 8), 0, Ranks("none"), "cuda")
    assert isinstance(service, AsynchronousService)
    assert service.supervisor is None  # the launcher's
    service.close()
    os.close(descriptor)


def test_a_table_of_one_kind_goes_on_in_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, path = new_board()
    monkeypatch.setenv(BOARD, path)
    inline = filled_service()
    inline.refresh(5)
    behind = AsynchronousService(CONFIG, 4, 8, seed=1)
    behind.load_state_dict(inline.state_dict())
    again = SynchronousService(CONFIG, 4, 8, seed=1)
    again.load_state_dict(behind.state_dict())
    assert inline.table.fingerprint == behind.table.fingerprint == again.table.fingerprint
    os.close(descriptor)


def test_rows_without_a_direction_are_left_out() -> None:
    service = filled_service()
    rows = mixture(4, 8)
    rows[:3] = float("nan")
    service.update({"image": rows}, torch.arange(32), step=2)
    metrics = service.refresh(5)
    assert service.rows.ring.dropped == 3
    assert metrics["prototypes/rows"] == 32 + 29
    assert service.table.centroids.isfinite().all()

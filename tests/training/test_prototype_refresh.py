"""Tables of the prototype service as a method gets them in training."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from medvlp.prototypes.table import PrototypeTable
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, train

pytestmark = pytest.mark.dist

#: Version of a table -> a bias of its clusters.
Biases = dict[int, Tensor]

#: A run with a new table after each step, whose clusters decide which samples are no negatives.
WORDS = [
    "prototypes.false_negatives=mask", "prototypes.false_negatives_by=clusters", "prototypes.clusters=8",
    "prototypes.balance=bias", "prototypes.refresh_steps=1",
]  # fmt: skip


def biases(overrides: list[str]) -> tuple[int, Biases, Biases]:
    """Of a whole run on this rank: exit code, the bias of each table itself, and the one it assigned by."""
    assign, own, taken = PrototypeTable.assign, Biases(), Biases()

    def watched(table: PrototypeTable, embeddings: Tensor) -> Tensor:
        own[table.version] = table.log_bias.clone()
        taken[table.version] = table._bias(embeddings).clone()
        return assign(table, embeddings)

    with mock.patch.object(PrototypeTable, "assign", watched):
        return train(overrides), own, taken


@pytest.mark.parametrize("source", ["learned", "clusters"])
def test_a_bias_that_nothing_moves_is_that_of_each_table(
    gloo_pool: Pools, overrides: Overrides, source: str
) -> None:
    [(code, own, taken)] = gloo_pool(1).run(biases, overrides(*WORDS, f"method.prototype_source={source}"))
    assert code == 0
    assert sorted(own) == [1, 2, 3]
    assert not torch.equal(own[1], own[3])
    if source == "learned":
        assert all(torch.equal(taken[version], own[version]) for version in own)
    else:  # soft assignments move it
        assert torch.equal(taken[1], own[1])
        assert not any(
            torch.equal(taken[version], bias) for version in (2, 3) for bias in (own[version], own[1])
        )

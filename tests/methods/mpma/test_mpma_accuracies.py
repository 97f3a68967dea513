"""MPMA finds accuracies only in steps whose metrics somebody reads."""

from __future__ import annotations

import pytest
import torch

from medvlp.losses.contrastive import accuracies_read
from tests.methods.small_mgca import small_batch
from tests.methods.small_mpma import small_mpma


@pytest.mark.parametrize("memory", [256.0, 0.001])
def test_accuracies_are_found_only_where_they_are_read(memory: float) -> None:
    model, batch = small_mpma(loss_memory=memory), small_batch([3, 5, 2, 4])
    read = model(batch).named
    with accuracies_read(False):
        unread = model(batch).named
    assert set(read) - set(unread) == {"report/accuracy", "retrieval/top1", "retrieval/top5"}
    assert torch.equal(read["loss"], unread["loss"])

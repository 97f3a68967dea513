"""The running averages of MPMA's global heads, which evaluation normalises by."""

from __future__ import annotations

import torch

from medvlp.encoders.batch_norm import GlobalBatchNorm
from medvlp.methods.base import Progress
from tests.methods.small_mgca import small_batch
from tests.methods.small_mpma import small_mpma


@torch.no_grad()
def test_running_averages_are_those_of_whole_pairs() -> None:
    """Masked steps leave them as they are; every `calibration_steps`-th moves them, by whole pairs."""
    model = small_mpma(calibration_steps=4)
    batch = small_batch([3, 7, 4, 5, 2, 6])
    norms = {name: part for name, part in model.named_modules() if isinstance(part, GlobalBatchNorm)}
    start = {name: part.running_mean.clone() for name, part in norms.items()}
    model.on_progress(Progress(0, 0, 400))
    model(batch)
    assert all(torch.equal(part.running_mean, start[name]) for name, part in norms.items())
    model.on_progress(Progress(0, 3, 400))
    model(batch)
    head, summary = model.alignment.image_head, model.image_encoder.eval()(batch.image).pooled
    expected = head.linear1(summary)
    torch.testing.assert_close(head.norm1.running_mean, expected.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head.norm1.running_var, expected.var(0), rtol=1e-2, atol=1e-4)
    model.on_progress(Progress(0, 7, 400))
    model(small_batch([3, 7, 4, 5, 2, 6], seed=1))
    moved = head.norm1.running_mean.clone()
    assert not torch.allclose(moved, expected.mean(0), rtol=1e-3)
    model.on_progress(Progress(0, 9, 10))  # the last step of a run
    model(batch)
    torch.testing.assert_close(head.norm1.running_mean, moved + (expected.mean(0) - moved) / 3)
    assert all(part.training for part in model.train().modules())

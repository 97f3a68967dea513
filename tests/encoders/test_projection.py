"""Projection heads against the published code, and their masked statistics."""

from __future__ import annotations

import torch

from medvlp.encoders.projection import ProjectionHead
from tests.golden_files import Golden, every

NAMES = {"linear1": "head.0", "norm1": "head.1", "linear2": "head.3", "norm2": "head.4"}


def load(golden: Golden, kind: str) -> ProjectionHead:
    def array(name: str) -> torch.Tensor:
        return golden(f"param_{kind}/{name}")

    hidden, width = array("head.0.weight").shape[:2]
    head = ProjectionHead(width, hidden, array("head.3.weight").shape[0])
    state = {}
    for name, value in head.state_dict().items():
        module, rest = name.split(".")
        # A published 1x1 convolution has one more axis than our linear layer.
        state[name] = array(f"{NAMES[module]}.{rest}").reshape(value.shape)
    head.load_state_dict(state)
    return head


@every("mgca_heads_*.npz")
def test_matches_the_published_heads(golden: Golden) -> None:
    for kind in ("global", "local"):
        head = load(golden, kind)
        inputs = golden(f"in_{kind}")
        torch.testing.assert_close(head(inputs), golden(f"out_{kind}_train"), rtol=1e-5, atol=2e-6)
        for name in ("norm1", "norm2"):
            for statistic in ("running_mean", "running_var"):
                moved = getattr(getattr(head, name), statistic)
                expected = golden(f"after_{kind}/{NAMES[name]}.{statistic}")
                torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
        head.eval()
        torch.testing.assert_close(head(inputs), golden(f"out_{kind}_eval"), rtol=1e-5, atol=2e-6)


def test_masked_tokens_change_nothing_for_the_others() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(6, 12, 4)
    tokens = torch.randn(3, 5, 6)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    short = head(tokens[:, :3], mask[:, :3])
    longer = head(tokens, mask)
    torch.testing.assert_close(longer[:, :3], short)
    different = head(torch.where(mask[..., None], tokens, 100.0), mask)
    torch.testing.assert_close(different[:, :3], short)
    assert not torch.allclose(head(tokens)[:, :3], short)


def test_torch_normalises_rows_and_not_tokens_in_the_middle(monkeypatch) -> None:
    """On a transposed view torch's kernels copy all tokens, each way."""
    shapes, kernel = [], torch.nn.functional.batch_norm
    monkeypatch.setattr(
        torch.nn.functional,
        "batch_norm",
        lambda rows, *rest: shapes.append(rows.shape) or kernel(rows, *rest),
    )
    head = ProjectionHead(6, 12, 4)
    tokens = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    assert head(tokens).shape == (3, 5, 4)
    assert shapes == [(15, 12), (15, 4)]

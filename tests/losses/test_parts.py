"""Losses made in parts: the values and gradients of the whole, in the memory of a part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medvlp import distributed
from medvlp.losses.contrastive import ranked_contrast
from medvlp.losses.normalise import unit_norm
from medvlp.losses.parts import mean_in_parts, parts_of
from medvlp.methods.base import Progress
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.place.losses import Sentences, observation_terms
from medvlp.training.memory_passes import LiveBytes
from tests.losses.emulated_ranks import Ranks
from tests.methods.small import built, names, small_batch, small_config

MIB = 2**20


@given(rows=st.integers(1, 300), width=st.integers(1, 5000), memory=st.floats(0.001, 2))
def test_parts_cover_all_rows_and_keep_to_the_memory(rows: int, width: int, memory: float) -> None:
    parts = parts_of(rows, width, memory)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    largest = max(part.stop - part.start for part in parts)
    assert largest == 1 or 4 * width * largest <= memory * MIB


@given(rows=st.integers(1, 40), per_part=st.integers(1, 40))
def test_a_short_last_part_counts_by_its_rows(rows: int, per_part: int) -> None:
    values = torch.arange(rows, dtype=torch.float64).square()
    starts: list[int] = []

    def mean(start: int, part: Tensor, nothing: None) -> tuple[Tensor, ...]:
        starts.append(start)
        return (part.mean(),)

    (first,) = mean_in_parts(mean, (values, None), width=1, memory=per_part * 4 / MIB)
    torch.testing.assert_close(first, values.mean())
    assert starts == [part.start for part in parts_of(rows, 1, per_part * 4 / MIB)]


def step(name: str, memory: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    method = built(small_config(name, loss_memory=memory)).double()
    method.on_progress(Progress(1, 1, 4))
    torch.manual_seed(1)
    output = method(small_batch())
    output.loss.backward()
    gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in output.named.items()}, gradients


@pytest.mark.parametrize("name", names())
def test_parts_change_no_term_and_no_gradient_of_any_method(name: str) -> None:
    terms, gradients = step(name, 256.0)
    found_terms, found = step(name, 0.001)
    torch.testing.assert_close(found_terms, terms, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert found.keys() == gradients.keys()
    largest = max(value.abs().max().item() for value in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6 * largest, msg=key)


def peak(function: Callable[[], Tensor]) -> tuple[int, float]:
    """Bytes that forward and backward pass hold at most, and the loss."""
    with LiveBytes() as live:
        loss = function()
        loss.backward()  # type: ignore[no-untyped-call]
    return int(live.peak), loss.item()


def observations(memory: float) -> Tensor:
    """PLACE's contrast of 16 sentences of each of 16 reports."""
    torch.manual_seed(0)
    seen, said = (unit_norm(torch.randn(16, 16, 8, requires_grad=True)) for _ in range(2))
    sentences = Sentences(said, torch.ones(16, 16, dtype=torch.bool), torch.arange(256).view(16, 16))
    config = PLACEConfig(loss_memory=memory)
    return observation_terms(seen, sentences, True, config)["loss/observation"]


def contrast(memory: float) -> Tensor:
    """One direction of 256 rows of this rank against all."""
    torch.manual_seed(0)
    rows = unit_norm(torch.randn(256, 8, requires_grad=True))
    return ranked_contrast(rows, distributed.gather_with_gradient(rows), 0.1, memory=memory)[0]


def test_thousands_of_rows_have_the_gradient_of_exact_arithmetic() -> None:
    """A rank with the batch of a step to itself; 256 parts of 16 rows."""
    torch.manual_seed(0)
    rows, others = (unit_norm(torch.randn(4096, 8)).requires_grad_() for _ in range(2))
    loss, *accuracies = ranked_contrast(rows, others, 0.07, memory=16 * 4096 * 4 / MIB)
    loss.backward()
    exact = [value.detach().double().requires_grad_() for value in (rows, others)]
    expected, *expected_accuracies = ranked_contrast(exact[0], exact[1], 0.07, memory=1000.0)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(accuracies, expected_accuracies)
    for value, reference in zip((rows, others), exact, strict=True):
        assert value.grad is not None
        assert reference.grad is not None
        largest = reference.grad.abs().max().item()
        torch.testing.assert_close(value.grad.double(), reference.grad, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("ranks", [8, 32])
@pytest.mark.parametrize("loss", [observations, contrast])
def test_memory_does_not_grow_with_the_ranks(loss: Callable[[float], Tensor], ranks: int) -> None:
    """256 anchors against 256 candidates of each rank: a matrix has 2 or 8 MiB, a part a quarter of one."""
    with Ranks(ranks):
        whole, expected = peak(lambda: loss(1000.0))
        parts, found = peak(lambda: loss(0.25))
    matrix = 4 * 256 * 256 * ranks
    print(f"{loss.__name__}, {ranks} ranks: {whole / MIB:.1f} MiB whole, {parts / MIB:.1f} MiB in parts")
    assert found == pytest.approx(expected, rel=1e-6)
    assert whole > 3 * matrix
    # A dozen matrices of a part, and the candidates with their gradients and sums, of 8 numbers each.
    assert parts < 12 * 0.25 * MIB + 40 * 4 * 256 * ranks * 8

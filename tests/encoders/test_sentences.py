"""Sentence means against a loop, and their corners."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.data.batch import Text
from medvlp.encoders.words import sentence_means


def text_of(sentence_index: torch.Tensor) -> Text:
    """A text of which only the sentences matter."""
    return Text(*[torch.zeros_like(sentence_index)] * 3, sentence_index)


@settings(max_examples=25)
@given(
    index=st.lists(st.lists(st.integers(-1, 5), min_size=7, max_size=7), min_size=1, max_size=3),
    sentences=st.integers(1, 7),
)
def test_equals_a_loop(index: list[list[int]], sentences: int) -> None:
    numbers = torch.tensor(index)
    hidden = torch.randn(*numbers.shape, 4, generator=torch.Generator().manual_seed(0))
    means, valid = sentence_means(hidden, text_of(numbers), sentences)
    assert means.shape == (len(index), sentences, 4)
    for sample in range(len(index)):
        for sentence in range(sentences):
            tokens = [hidden[sample, i] for i in range(7) if index[sample][i] == sentence]
            assert valid[sample, sentence] == bool(tokens)
            expected = torch.stack(tokens).mean(0) if tokens else torch.zeros(4)
            torch.testing.assert_close(means[sample, sentence], expected)


def test_gradient_reaches_only_tokens_of_kept_sentences() -> None:
    hidden = torch.randn(1, 5, 2, requires_grad=True)
    means, _ = sentence_means(hidden, text_of(torch.tensor([[-1, 0, 0, 2, -1]])), 2)
    means.sum().backward()
    expected = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])[None, :, None].expand(1, 5, 2)
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_do_not_overflow_or_round(dtype: torch.dtype) -> None:
    hidden = torch.full((1, 600, 1), 200.0, dtype=dtype)
    means, _ = sentence_means(hidden, text_of(torch.zeros(1, 600, dtype=torch.long)), 1)
    assert means.dtype == dtype
    assert means.item() == 200.0

"""Shuffled sentences: a permutation of whole sentences, different by epoch, equal wherever it is drawn."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.data.dataset import shuffle_sentences
from medvlp.data.text import TokenRows
from medvlp.data.transforms import SampleRandom


def make_rows(reports: list[list[int]]) -> TokenRows:
    """Report r has sentences of the given numbers of tokens; every token id occurs once."""
    lengths = [sum(words) for words in reports]
    numbers = [np.repeat(np.arange(len(words)), words) for words in reports]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenRows(np.arange(sum(lengths)), np.concatenate([np.zeros(0, int), *numbers]), offsets)


def sentences_of(rows: TokenRows, report: int) -> list[tuple[int, ...]]:
    tokens = slice(rows.offsets[report], rows.offsets[report + 1])
    ids, numbers = rows.ids[tokens], rows.sentences[tokens]
    assert (np.diff(numbers) >= 0).all()
    return [tuple(ids[numbers == number].tolist()) for number in np.unique(numbers)]


@settings(max_examples=25)
@given(
    reports=st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_sentences_stay_whole_and_none_is_lost(reports: list[list[int]], seed: int) -> None:
    rows = make_rows(reports)
    selection = np.arange(len(reports))[::-1].astype(np.int64)
    shuffled = shuffle_sentences(rows, selection, SampleRandom(seed, 0).words)
    for place, report in enumerate(selection.tolist()):
        assert sorted(sentences_of(shuffled, place)) == sentences_of(rows, report)


def test_the_order_depends_on_seed_epoch_and_sample_alone() -> None:
    rows = make_rows([[2, 1, 3, 1, 2, 1]] * 40)
    every = np.arange(40, dtype=np.int64)
    first = shuffle_sentences(rows, every, SampleRandom(3, 0).words)
    alone = shuffle_sentences(rows, every[7:8], SampleRandom(3, 0).words)
    assert sentences_of(alone, 0) == sentences_of(first, 7)
    next_epoch = shuffle_sentences(rows, every, SampleRandom(3, 1).words)
    assert (first.ids != next_epoch.ids).any()
    opening = [sentences_of(first, report)[0][0] % 10 for report in range(40)]
    assert len(set(opening)) == 6

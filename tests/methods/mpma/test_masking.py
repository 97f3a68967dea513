"""Masks: exact shares, whole words, the same wherever they are drawn."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.data.batch import Text
from medvlp.methods.mpma.masking import (
    draw_patches,
    draw_words,
    is_word,
    most_scored,
    sample_noise,
    scored_positions,
)

WORD = 1 << 64


def finalise(value: int) -> int:
    """SplitMix64's output function, as in its paper."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % WORD
    return value ^ (value >> 31)


def stream(start: int, count: int) -> list[int]:
    return [finalise((start + (place + 1) * 0x9E3779B97F4A7C15) % WORD) for place in range(count)]


def slow_noise(sample: int, count: int, seed: int, step: int, number: int) -> list[int]:
    key = 0
    for part in (seed, step, number):
        key = finalise((key + 0x9E3779B97F4A7C15 + part) % WORD)
    return stream(finalise((sample + key) % WORD), count)


def report(words: list[int], length: int) -> Text:
    """One report whose word i has words[i] pieces, with [CLS], [SEP] and padding."""
    index = [0, *(number + 1 for number, pieces in enumerate(words) for _ in range(pieces))]
    index.append(index[-1] + 1)
    sentence = [-1] + [0] * sum(words) + [-1]
    padding = [-1] * (length - len(index))
    mask = [1] * len(index) + [0] * len(padding)
    rows = [[7] * length, mask, index + padding, sentence + padding]
    return Text(*(torch.tensor([row]) for row in rows))


def test_noise_is_splitmix() -> None:
    assert stream(0, 1) == [0xE220A8397B1DCDAF]  # the published first output of seed 0
    samples = [0, 1, 2**40]
    noise = sample_noise(torch.tensor(samples), 5, seed=3, step=1000, stream=1)
    for row, sample in zip(noise.tolist(), samples, strict=True):
        assert [value % WORD for value in row] == slow_noise(sample, 5, 3, 1000, 1)


def test_noise_depends_on_everything_but_the_batch() -> None:
    samples = torch.arange(50)
    noise = sample_noise(samples, 40, 1, 2, 0)
    assert torch.equal(sample_noise(samples[7:9], 20, 1, 2, 0), noise[7:9, :20])
    others = [sample_noise(samples, 40, *parts) for parts in ((2, 2, 0), (1, 3, 0), (1, 2, 1))]
    values = torch.cat([each.flatten() for each in (noise, *others)])
    assert len(values.unique()) == 4 * 50 * 40


def test_patches_are_hidden_evenly() -> None:
    hidden = torch.zeros(16)
    for step in range(40):
        mask = draw_patches(sample_noise(torch.arange(100), 16, 0, step, 0), 0.75)
        hidden += torch.bincount(mask.hidden.flatten(), minlength=16)
    share = hidden / 4000
    # Four standard deviations of a share of 0.75 among 4000.
    assert (share - 0.75).abs().max() < 4 * math.sqrt(0.75 * 0.25 / 4000)


@settings(max_examples=25)
@given(patches=st.integers(1, 60), ratio=st.floats(0, 0.99))
def test_share_of_patches_is_exact(patches: int, ratio: float) -> None:
    mask = draw_patches(sample_noise(torch.arange(3), patches, 0, 0, 0), ratio)
    assert mask.visible.shape[1] == max(1, round(patches * (1 - ratio)))
    for visible, hidden in zip(mask.visible.tolist(), mask.hidden.tolist(), strict=True):
        assert sorted(visible + hidden) == list(range(patches))
        assert visible == sorted(visible)
        assert hidden == sorted(hidden)


@settings(max_examples=25)
@given(
    words=st.lists(st.integers(1, 3), max_size=12),
    ratio=st.floats(0, 1),
    extra=st.integers(0, 4),
    step=st.integers(0, 2**40),
)
def test_whole_words_are_hidden_in_the_exact_share(
    words: list[int], ratio: float, extra: int, step: int
) -> None:
    text = report(words, sum(words) + 2 + extra)
    noise = sample_noise(torch.tensor([5]), text.input_ids.shape[1], 0, step, 1)
    hidden = draw_words(text, noise, ratio)[0].tolist()
    states: dict[int, set[bool]] = {}
    for place, word in enumerate(text.word_index[0].tolist()):
        states.setdefault(word, set()).add(hidden[place])
    assert all(len(state) == 1 for state in states.values()), "a word is hidden in part"
    count = sum(state == {True} for state in states.values())
    number = len(words)
    wanted = max(math.floor(number * ratio + 0.5), int(ratio > 0))
    assert count == max(0, min(wanted, number - 1)), "one word stays visible"
    special = [place for place in range(len(hidden)) if text.sentence_index[0, place] < 0]
    assert not any(hidden[place] for place in special)


def test_mask_does_not_depend_on_padding_or_neighbours() -> None:
    short, long = report([1, 2, 1, 1, 3], 10), report([1, 2, 1, 1, 3], 16)
    masks = [
        draw_words(text, sample_noise(torch.tensor([9]), text.input_ids.shape[1], 0, 4, 1), 0.5)
        for text in (short, long)
    ]
    assert torch.equal(masks[0], masks[1][:, :10])
    assert masks[0].any()


def test_words_are_hidden_evenly() -> None:
    text = report([1] * 8, 12)
    batch = Text(*(value.expand(2000, -1) for value in text.tensors().values()))
    hidden = draw_words(batch, sample_noise(torch.arange(2000), 12, 0, 0, 1), 0.5).float().mean(0)
    assert (hidden[1:9] - 0.5).abs().max() < 4 * math.sqrt(0.25 / 2000)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_nothing_but_padding(ratio: float) -> None:
    text = Text(*(torch.full((2, 5), value) for value in (0, 0, -1, -1)))
    assert not is_word(text).any()
    assert not draw_words(text, sample_noise(torch.arange(2), 5, 0, 0, 1), ratio).any()


@settings(max_examples=40)
@given(
    words=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    ratio=st.floats(0.05, 0.9),
    padding=st.integers(0, 60),
)
def test_scored_positions_are_the_hidden_ones_whatever_the_padding(
    words: list[int], ratio: float, padding: int
) -> None:
    found = []
    for extra in (0, padding):
        text = report(words, sum(words) + 2 + extra)
        hidden = draw_words(text, sample_noise(torch.tensor([5]), text.input_ids.shape[1], 0, 3, 1), ratio)
        places, scored = scored_positions(text, hidden, ratio)
        assert len(set(places.tolist())) == len(places)
        found.append(sorted(places[scored].tolist()))
        everything = hidden[0].nonzero()[:, 0].tolist()
        most = int(sum(words) * ratio) + sum(words) // 8 + 8
        assert found[-1] == everything[:most]
    assert found[0] == found[1]


def test_the_vocabulary_is_asked_at_few_positions() -> None:
    text = report([1] * 126, 128)
    places, _ = scored_positions(text, draw_words(text, torch.arange(128)[None], 0.5), 0.5)
    assert places.shape == (64 + 16 + 8,)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 1.0])
def test_short_reports_are_asked_at_fewer_positions_than_long_ones(ratio: float) -> None:
    reports = [report([1] * words, 128) for words in (126, 14, 30)]
    columns = zip(*(one.tensors().values() for one in reports), strict=True)
    unknown = Text(*(torch.cat(rows) for rows in columns))
    known = dataclasses.replace(unknown, lengths=(128, 16, 32))
    hidden = draw_words(unknown, sample_noise(torch.arange(3), 128, 0, 3, 1), ratio)
    (all_places, all_scored), (places, scored) = (
        scored_positions(t, hidden, ratio) for t in (unknown, known)
    )
    assert len(all_places) == 3 * most_scored(128, ratio)
    assert len(places) == sum(most_scored(length, ratio) for length in (128, 16, 32))
    assert torch.equal(places[scored], all_places[all_scored])
    assert torch.equal(places[scored], hidden.flatten().nonzero()[:, 0])

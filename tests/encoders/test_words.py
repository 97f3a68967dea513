"""Word pieces to words: the published aggregation with its quirks, and the sound one."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.data.batch import Text
from medvlp.encoders.words import aggregate_words
from tests.golden_files import Golden, every


def text_of(pieces: list[list[str]]) -> Text:
    """A `Text` from word pieces, assembled one token at a time as the definition in `Text` says."""
    shape = (len(pieces), len(pieces[0]))
    words, sentences = np.full(shape, -1), np.full(shape, -1)
    for row, tokens in enumerate(pieces):
        word = -1
        for column, token in enumerate(tokens):
            if token == "[PAD]":
                continue
            word += not token.startswith("##")
            words[row, column] = word
            sentences[row, column] = -1 if token in ("[CLS]", "[SEP]") else 0
    words_tensor, sentences_tensor = torch.from_numpy(words), torch.from_numpy(sentences)
    return Text((words_tensor >= 0).long(), (words_tensor >= 0).long(), words_tensor, sentences_tensor)


@every("mgca_aggregate_*.npz")
def test_matches_the_published_aggregation(golden: Golden) -> None:
    vocabulary = golden.text("in_vocab")
    pieces = [[vocabulary[i] for i in row] for row in golden("in_ids").tolist()]
    words = aggregate_words(
        golden("in_emb")[:, 0],
        golden("in_cls_attention_full"),
        text_of(pieces),
        separator_word=True,
        shift_attention=True,
        drop_last_word=True,
    )
    torch.testing.assert_close(words.report, golden("out_report_feat"))
    torch.testing.assert_close(words.features, golden("out_word_feat"))
    torch.testing.assert_close(words.attention, golden("out_word_attn"))
    assert torch.equal(words.valid, ~golden("out_pad_mask"))


def test_sound_aggregation() -> None:
    text = text_of(
        [["[CLS]", "small", "eff", "##usion", "[SEP]"], ["[CLS]", "clear", "[SEP]", "[PAD]", "[PAD]"]]
    )
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25], [0.5, 0.3, 0.2, 0.0, 0.0]])
    words = aggregate_words(hidden, attention, text)
    assert words.features[..., 0].tolist() == [[1, 5, 0, 0], [6, 0, 0, 0]]
    torch.testing.assert_close(words.attention, torch.tensor([[0.2, 0.45, 0, 0], [0.3, 0, 0, 0]]))
    assert words.valid.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert words.report[:, 0].tolist() == [0, 5]


def test_separator_and_full_length() -> None:
    text = text_of([["[CLS]", "no", "eff", "##usion", "[SEP]"], ["[CLS]", "no", "[SEP]", "[PAD]", "[PAD]"]])
    hidden = torch.ones(2, 5, 1)
    attention = torch.full((2, 5), 0.2)
    kept = aggregate_words(hidden, attention, text, separator_word=True)
    assert kept.valid.sum(1).tolist() == [3, 2]
    lost = aggregate_words(hidden, attention, text, separator_word=True, drop_last_word=True)
    assert lost.valid.sum(1).tolist() == [1, 2]


def by_loop(hidden: np.ndarray, index: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    output = np.zeros((hidden.shape[0], hidden.shape[1] - 1, hidden.shape[2]))
    for row in range(hidden.shape[0]):
        for token in range(hidden.shape[1]):
            if index[row, token] > 0 and sentences[row, token] >= 0:
                output[row, index[row, token] - 1] += hidden[row, token]
    return output


@settings(max_examples=30)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 2**20))
def test_equals_a_loop_over_tokens(lengths: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    pieces = []
    for length in lengths:
        body = ["word" if i == 0 or generator.random() < 0.6 else "##piece" for i in range(length)]
        pieces.append(["[CLS]", *body, "[SEP]", *["[PAD]"] * (12 - length)])
    text = text_of(pieces)
    hidden = generator.normal(size=(len(lengths), 14, 3))
    words = aggregate_words(torch.from_numpy(hidden), torch.ones(len(lengths), 14), text)
    expected = by_loop(hidden, text.word_index.numpy(), text.sentence_index.numpy())
    np.testing.assert_allclose(words.features.numpy(), expected, atol=1e-12)
    assert (words.valid == (words.features != 0).any(-1)).all()

"""Tokenisation against the tokenizer itself, and word and sentence indices against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config_files import ConfigError
from medvlp.data.batch import Text
from medvlp.data.text import Tokenizer

REPORTS = [
    ["No pleural effusion.", "Heart size is normal."],
    ["Right-sided pneumothoraces, 2.5 cm."],
    [],
    ["Unremarkable [SEP] cardiomediastinal silhouette.", "XXXX.", "Stable since prior exam."],
]


def plain_word_index(tokens: list[str]) -> list[int]:
    """Words by the rule of the contract, token by token."""
    index: list[int] = []
    for position, token in enumerate(tokens):
        if token == "[PAD]":
            index.append(-1)
        elif position == 0:
            index.append(0)
        else:
            index.append(index[-1] + (not token.startswith("##") or position == 1))
    return index


def tokens_of(tokenizer: Tokenizer, row: torch.Tensor) -> list[str]:
    return [str(tokenizer._backend.id_to_token(number)) for number in row.tolist()]


def check_against_loops(tokenizer: Tokenizer, reports: list[list[str]], text: Text, max_tokens: int) -> None:
    longest = 0
    for row, sentences in enumerate(reports):
        ids, numbers = [], []
        for number, sentence in enumerate(sentences):
            pieces = tokenizer._backend.encode(sentence, add_special_tokens=False).ids
            ids += pieces
            numbers += [number] * len(pieces)
        ids, numbers = ids[: max_tokens - 2], numbers[: max_tokens - 2]
        longest = max(longest, len(ids) + 2)
        padding = text.input_ids.shape[1] - len(ids) - 2
        expected = [tokenizer.cls_id, *ids, tokenizer.sep_id] + [tokenizer.pad_id] * padding
        assert text.input_ids[row].tolist() == expected
        assert text.attention_mask[row].tolist() == [1] * (len(ids) + 2) + [0] * padding
        assert text.sentence_index[row].tolist() == [-1, *numbers, -1] + [-1] * padding
        words = plain_word_index(tokens_of(tokenizer, text.input_ids[row]))
        assert text.word_index[row].tolist() == words
    assert text.input_ids.shape[1] == longest


@pytest.mark.parametrize("max_tokens", [3, 8, 112])
def test_text_equals_the_token_by_token_reference(tokenizer: Tokenizer, max_tokens: int) -> None:
    text = tokenizer.tokenize(REPORTS, max_tokens)
    check_against_loops(tokenizer, REPORTS, text, max_tokens)
    assert all(part.dtype == torch.int64 for part in text.tensors().values())


@settings(max_examples=50)
@given(
    st.lists(
        st.lists(st.text("abceffusion .,-3é中#", min_size=1).map(str.strip).filter(bool), max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(3, 20),
)
def test_any_text_equals_the_reference(
    tokenizer: Tokenizer, reports: list[list[str]], max_tokens: int
) -> None:
    check_against_loops(tokenizer, reports, tokenizer.tokenize(reports, max_tokens), max_tokens)


def test_pad_to_max_only_adds_padding(tokenizer: Tokenizer) -> None:
    short, padded = tokenizer.tokenize(REPORTS, 60), tokenizer.tokenize(REPORTS, 60, pad_to_max=True)
    width = short.input_ids.shape[1]
    assert padded.input_ids.shape == (4, 60)
    for name, fill in (("input_ids", tokenizer.pad_id), ("attention_mask", 0), ("word_index", -1)):
        assert torch.equal(getattr(padded, name)[:, :width], getattr(short, name))
        assert (getattr(padded, name)[:, width:] == fill).all()


def test_lengths_say_how_far_each_text_has_to_be_padded(tokenizer: Tokenizer) -> None:
    rows, chosen = tokenizer.encode(REPORTS), np.arange(4)
    text = tokenizer.assemble(rows, chosen, 60)
    assert text.lengths == tuple(text.attention_mask.sum(1).tolist())
    rounded = tokenizer.assemble(rows, chosen, 60, multiple=8)
    assert rounded.lengths == tuple(min(60, -(-length // 8) * 8) for length in text.lengths)
    assert tokenizer.assemble(rows, chosen, 60, pad_to_max=True).lengths == (60,) * 4
    assert text.rows(1, 3).lengths == text.lengths[1:3]
    assert text.padded(60).lengths == text.lengths


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), count=st.integers(1, 14))
def test_groups_hold_every_text_and_no_more_than_they_need(lengths: list[int], count: int) -> None:
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    groups = Text(ids, ids, ids, ids, tuple(lengths)).groups(count)
    assert len(groups) == min(count, len(lengths))
    sizes = [size for size, _ in groups]
    assert sum(sizes) == len(lengths)
    assert max(sizes) - min(sizes) <= 1
    ends = np.cumsum(sizes) - 1
    assert [width for _, width in groups] == np.sort(lengths)[ends].tolist()


def test_no_reports_and_too_few_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokenize([], 10).input_ids.shape == (0, 2)
    with pytest.raises(ValueError, match="max_tokens must be at least 3"):
        tokenizer.tokenize(REPORTS, 2)


def test_special_tokens_in_a_report_are_text(tokenizer: Tokenizer) -> None:
    text = tokenizer.tokenize([["see [SEP] and [PAD]"]], 50)
    assert (text.input_ids == tokenizer.sep_id).sum() == 1
    assert (text.input_ids == tokenizer.pad_id).sum() == 0


def test_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer", root="unused")
    assert (
        loaded.fingerprint
        == tokenizer.fingerprint
        == Tokenizer.load(None, tmp_path / "tokenizer").fingerprint
    )
    assert loaded.vocab_size == tokenizer.vocab_size
    assert torch.equal(loaded.tokenize(REPORTS, 40).input_ids, tokenizer.tokenize(REPORTS, 40).input_ids)


def test_byte_level_tokenizer_has_words_and_sentences(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["no effusion is seen", "heart normal"], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(None, tmp_path)
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id) == (0, 1, 2)
    text = tokenizer.tokenize([["no edema seen", "heart big"]], 60)
    words = text.word_index[0].tolist()
    assert words[0] == 0
    assert max(words) == 6  # five words and [SEP]
    by_word = dict(zip(words, text.sentence_index[0].tolist(), strict=True))
    assert [by_word[word] for word in range(7)] == [-1, 0, 0, 0, 1, 1, -1]


def test_real_bert_vocabularies(shared: Path) -> None:
    for name in ("bert-base-uncased", "covibert-50k-uncased"):
        tokenizer = Tokenizer.load(shared / "data" / "tokenizers" / name, root="unused")
        check_against_loops(tokenizer, REPORTS, tokenizer.tokenize(REPORTS, 112), 112)


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(None, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="not a tokenizer file"):
        Tokenizer.load(None, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: folder .*nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere", root="unused")
    unmarked = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "[SEP]": 1, "[PAD]": 2}))
    with pytest.raises(ConfigError, match="marks no word starts"):
        Tokenizer(unmarked)
    with pytest.raises(ConfigError, match=r"no token \[SEP\]"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordPiece({"[CLS]": 0, "[PAD]": 1})))


def test_continuation_marks_pieces_only(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer._backend.get_vocab()
    expected = np.zeros(tokenizer.vocab_size, dtype=bool)
    expected[[number for token, number in vocabulary.items() if token.startswith("##")]] = True
    np.testing.assert_array_equal(tokenizer.continuation, expected)
    assert expected.any()
    assert not expected.all()

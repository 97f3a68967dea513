"""The trained tokenizer: the same vocabulary in every process, and what BERT models expect."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shards.errors import DataError
from shards.tokenizer import SPECIAL_TOKENS, count_words, load_tokenizer, tokenizer_bytes, train_wordpiece

TRAIN = """
import random, hashlib
from shards.tokenizer import count_words, tokenizer_bytes, train_wordpiece
generator = random.Random(0)
words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(1500)]
texts = [" ".join(generator.choices(words, k=20)) for _ in range(300)]
counts = count_words([(str(i // 3), text) for i, text in enumerate(texts)], 2)
print(hashlib.sha256(tokenizer_bytes(train_wordpiece(counts, 1000, 2))).hexdigest())
"""


def trained(texts: list[str], size: int, min_patients: int = 1) -> Tokenizer:
    """A tokenizer of the texts, each of another patient."""
    reports = [(str(number), text) for number, text in enumerate(texts)]
    return train_wordpiece(count_words(reports, min_patients), size, min_patients)


def pieces(tokenizer: Tokenizer) -> set[str]:
    """The pieces longer than a character, without their mark."""
    found = {piece.removeprefix("##") for piece in tokenizer.get_vocab() if piece not in SPECIAL_TOKENS}
    return {piece for piece in found if len(piece) > 1}


def test_training_gives_the_same_bytes_in_every_process(repository: Path) -> None:
    # Random texts are full of ties; the library alone numbers them anew in every process.
    hashes = {
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            cwd=repository,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(hashes) == 1


def test_tokenizer_is_bert_like_and_lossless_on_its_own_text() -> None:
    texts = ["The lungs are clear.", "No pleural EFFUSION or pneumothorax.", "Naïve: 2.5 cm"]
    tokenizer = trained(texts, 200)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    encoding = tokenizer.encode("Clear PLEURAL naive")
    assert encoding.tokens[0] == "[CLS]"
    assert encoding.tokens[-1] == "[SEP]"
    assert tokenizer.decode(encoding.ids) == "clear pleural naive"
    assert "[UNK]" not in tokenizer.encode("lungs pneumothorax").tokens
    assert tokenizer.get_vocab_size() <= 200


def test_vocabulary_is_bounded_and_frequent_words_are_whole() -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=6)) for _ in range(400)]
    tokenizer = trained([*(["effusion effusion"] * 50), " ".join(words)], 120)
    assert tokenizer.get_vocab_size() == 120
    assert tokenizer.encode("effusion").tokens[1:-1] == ["effusion"]


COMMON = "no effusion is seen"


def test_a_word_of_few_patients_is_in_the_vocabulary_neither_whole_nor_in_pieces() -> None:
    texts = [COMMON] * 30
    texts[:2] = [f"{COMMON} by Zyxwvut-Quetzal {number}" for number in range(2)]
    tokenizer = trained(texts, 1000, min_patients=20)
    assert all(any(piece in word for word in COMMON.split()) for piece in pieces(tokenizer))
    assert tokenizer.encode(COMMON).tokens[1:-1] == COMMON.split()
    name = tokenizer.encode("Zyxwvut").tokens[1:-1]
    assert "[UNK]" not in name
    assert max(len(piece.removeprefix("##")) for piece in name) == 1


def test_words_are_counted_by_patient_not_by_report() -> None:
    reports = [(f"patient {number // 25}", COMMON) for number in range(100)]
    counts = count_words(reports, 20)
    assert (counts.patients, counts.holders["effusion"], counts.occurrences["effusion"]) == (4, 4, 100)
    assert not pieces(train_wordpiece(counts, 1000, 5))
    assert "effusion" in pieces(train_wordpiece(counts, 1000, 4))


WORDS = st.sampled_from(["clear", "clearing", "lung", "lungs", "anna", "hannah", "x", "2.5", "Café"])


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.lists(WORDS, max_size=6).map(" ".join)), max_size=30),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_every_piece_is_part_of_a_word_that_enough_patients_share(
    reports: list[tuple[str, str]], least: int, order: random.Random
) -> None:
    tokenizer = train_wordpiece(count_words(reports, least), 300, least)
    holders: dict[str, set[str]] = {}
    for patient, text in reports:
        for word in text.lower().replace("é", "e").replace(".", " ").split():
            holders.setdefault(word, set()).add(patient)
    shared = {word for word, held in holders.items() if len(held) >= least}
    assert all(any(piece in word for word in shared) for piece in pieces(tokenizer))
    order.shuffle(reports)
    again = train_wordpiece(count_words(reports, least), 300, least)
    assert tokenizer_bytes(again) == tokenizer_bytes(tokenizer)


def test_load_from_folder_of_either_form(tmp_path: Path) -> None:
    expected = trained(["clear lungs"] * 3, 100)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_bytes(expected))
    assert load_tokenizer(str(tmp_path)).get_vocab() == expected.get_vocab()
    words = tmp_path / "words"
    words.mkdir()
    vocabulary = sorted(expected.get_vocab().items(), key=lambda item: item[1])
    (words / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary))
    assert load_tokenizer(str(words)).encode("clear lungs").ids == expected.encode("clear lungs").ids


def test_missing_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has neither"):
        load_tokenizer(str(tmp_path))

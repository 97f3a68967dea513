"""The trained tokenizer: the same vocabulary in every process, and what BERT models expect."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_bytes, train_wordpiece

TRAIN = """
import random, hashlib
from shards.tokenizer import tokenizer_bytes, train_wordpiece
generator = random.Random(0)
words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(1500)]
texts = [" ".join(generator.choices(words, k=20)) for _ in range(300)]
print(hashlib.sha256(tokenizer_bytes(train_wordpiece(texts, 1000))).hexdigest())
"""


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
    tokenizer = train_wordpiece(texts, 200)
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
    tokenizer = train_wordpiece([*(["effusion effusion"] * 50), " ".join(words)], 120)
    assert tokenizer.get_vocab_size() == 120
    assert tokenizer.encode("effusion").tokens[1:-1] == ["effusion"]


def test_load_from_folder_of_either_form(tmp_path: Path) -> None:
    trained = train_wordpiece(["clear lungs"] * 3, 100)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_bytes(trained))
    assert load_tokenizer(str(tmp_path)).get_vocab() == trained.get_vocab()
    words = tmp_path / "words"
    words.mkdir()
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    (words / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary))
    assert load_tokenizer(str(words)).encode("clear lungs").ids == trained.encode("clear lungs").ids


def test_missing_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has neither"):
        load_tokenizer(str(tmp_path))

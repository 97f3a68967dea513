"""The tokenizer of a dataset: WordPiece trained on its own text, or an existing one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shards.errors import DataError
from shards.format import TOKENIZER_NAME

#: Ids 0 to 4, in this order.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_MAX_ALPHABET = 1000
_MIN_PAIR_COUNT = 2
_CONTINUATION = "##"


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a lower-case BERT WordPiece tokenizer; `texts` is iterated twice.

    The same texts always give the same vocabulary. The library's trainer alone does not: it numbers the
    pieces "##a", "##b", ... in the random order of a hash map, and breaks ties by those numbers. Naming them
    beforehand, in sorted order, fixes the numbers.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts = Counter(character for text in texts for character in normalizer.normalize_str(text))
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet = sorted([character for character in frequent if not character.isspace()][:_MAX_ALPHABET])
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_PAIR_COUNT,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL_TOKENS, *(_CONTINUATION + character for character in alphabet)],
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return _bert_tokenizer(learner.get_vocab(with_added_tokens=True))


def load_tokenizer(name: str) -> Tokenizer:
    """Read a tokenizer from a folder (`tokenizer.json` or `vocab.txt`) or by its name on the hub.

    Raises:
        DataError: there is none, or the hub cannot be reached.
    """
    folder = Path(name)
    try:
        if (folder / TOKENIZER_NAME).is_file():
            return Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        if (folder / "vocab.txt").is_file():
            return _bert_tokenizer(models.WordPiece.read_file(str(folder / "vocab.txt")))
        if folder.exists():
            raise DataError(f"tokenizer folder {folder} has neither {TOKENIZER_NAME} nor vocab.txt")
        return Tokenizer.from_pretrained(name)
    except DataError:
        raise
    except Exception as error:  # the library raises bare exceptions from Rust
        raise DataError(f"cannot load tokenizer {name!r} from a folder or the hub: {error}") from error


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """The bytes of `tokenizer.json`."""
    return (tokenizer.to_str(pretty=True) + "\n").encode()


def _bert_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return tokenizer

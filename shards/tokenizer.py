"""The tokenizer of a dataset: WordPiece trained on its own text, or an existing one."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shards.errors import DataError
from shards.format import TOKENIZER_NAME

#: Ids 0 to 4, in this order.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: Patients whose reports must hold a word before it may enter a vocabulary.
MIN_PATIENTS = 20

_MAX_ALPHABET = 1000
_MIN_PAIR_COUNT = 2
_CONTINUATION = "##"
_LINE_WORDS = 1000
_NORMALIZER = normalizers.BertNormalizer(lowercase=True)
_PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()


@dataclass(frozen=True)
class WordCounts:
    """The words of a set of reports, as the tokenizer cuts them: lower case, punctuation apart.

    Attributes:
        patients: number of patients.
        occurrences: word -> how often it occurs.
        holders: word -> number of patients with a report that holds it; counted no further than a limit.
    """

    patients: int
    occurrences: Mapping[str, int]
    holders: Mapping[str, int]

    def shared(self, min_patients: int) -> dict[str, int]:
        """Occurrences of the words that at least `min_patients` patients' reports hold, sorted by word."""
        words = sorted(word for word, held in self.holders.items() if held >= min_patients)
        return {word: self.occurrences[word] for word in words}


def count_words(reports: Iterable[tuple[str, str]], limit: int) -> WordCounts:
    """Count the words of (patient, text) pairs.

    Args:
        reports: any number a patient, in any order; the result does not depend on it.
        limit: number of patients of a word up to which is counted; bounds the memory.
    """
    numbers: dict[str, int] = {}
    occurrences: Counter[str] = Counter()
    holders: dict[str, set[int]] = {}
    full: set[str] = set()
    for patient, text in reports:
        number = numbers.setdefault(patient, len(numbers))
        words = [word for word, _ in _PRE_TOKENIZER.pre_tokenize_str(_NORMALIZER.normalize_str(text))]
        occurrences.update(words)
        for word in set(words) - full:
            held = holders.setdefault(word, set())
            held.add(number)
            if len(held) >= limit:
                full.add(word)
                del holders[word]
    counted = {word: len(held) for word, held in holders.items()} | dict.fromkeys(full, limit)
    return WordCounts(len(numbers), occurrences, counted)


def train_wordpiece(counts: WordCounts, vocab_size: int, min_patients: int) -> Tokenizer:
    """Train a lower-case BERT WordPiece tokenizer on the words that enough patients share.

    No other word takes part: a piece longer than a character is part of a shared word, so that a rare name
    is in the vocabulary neither whole nor in telling pieces, and is spelled by characters and common pieces.
    Single characters are those of all words, the 1,000 most frequent.

    The same reports always give the same vocabulary. The library's trainer alone does not: it numbers the
    pieces "##a", "##b", ... in the random order of a hash map, and breaks ties by those numbers. Naming them
    beforehand, in sorted order, fixes the numbers.
    """
    characters: Counter[str] = Counter()
    for word, occurrences in counts.occurrences.items():
        for character in word:
            characters[character] += occurrences
    frequent = sorted(characters, key=lambda character: (-characters[character], character))
    alphabet = sorted(frequent[:_MAX_ALPHABET])
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_PAIR_COUNT,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL_TOKENS, *(_CONTINUATION + character for character in alphabet)],
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    learner.train_from_iterator(_lines(counts.shared(min_patients)), trainer)
    return _bert_tokenizer(learner.get_vocab(with_added_tokens=True))


def _lines(words: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it occurs: the trainer takes no counts."""
    for word, occurrences in words.items():
        whole, rest = divmod(occurrences, _LINE_WORDS)
        line = f"{word} "
        for _ in range(whole):
            yield line * _LINE_WORDS
        yield line * rest


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
    tokenizer.normalizer = _NORMALIZER
    tokenizer.pre_tokenizer = _PRE_TOKENIZER
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return tokenizer

"""Tokenizers, and the vectorised assembly of stored token ids into `Text`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch
import xxhash
from numpy.typing import NDArray

from medvlp.config_files import ConfigError
from medvlp.data.batch import Text
from medvlp.hub import hub_reason, quiet_hub
from shards.errors import DataError
from shards.format import INDEX_NAME, TOKENIZER_NAME, Index, hash_bytes, is_remote, locate
from shards.remote import read_remote
from shards.strict_json import JsonError, read_limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SpecialTokens = tuple[str, str, str]

#: Names of the tokens that open, close and pad a text, where nothing else says them: BERT's, then RoBERTa's.
_SPECIAL_TOKENS: tuple[SpecialTokens, ...] = (("[CLS]", "[SEP]", "[PAD]"), ("<s>", "</s>", "<pad>"))

#: Names of the token that hides a word: BERT's, RoBERTa's.
_MASK_TOKENS = ("[MASK]", "<mask>")

#: Sentences of a report that are told apart; what follows counts as part of the last one.
_LAST_SENTENCE = (1 << 15) - 1
#: Largest `tokenizer.json`, in bytes.
_TOKENIZER_LIMIT = 1 << 26


@dataclass(frozen=True)
class TokenRows:
    """Token ids of many reports without special tokens, one after the other.

    Attributes:
        ids: int [T] token ids.
        sentences: int [T] sentence of each token in its report, from 0.
        offsets: int64 [N + 1]; report i is tokens offsets[i] .. offsets[i + 1] - 1.
    """

    ids: NDArray[np.integer]
    sentences: NDArray[np.integer]
    offsets: NDArray[np.int64]


class Tokenizer:
    """A fast tokenizer with its special tokens and what `Text` needs to know of its vocabulary.

    Attributes:
        vocab_size: number of rows an embedding table needs.
        fingerprint: hash of everything that decides which ids a text gets.
        continuation: bool [vocab_size], true for pieces that continue the word before them.
        special: names of the tokens that open, close and pad a text.
        cls_id, sep_id, pad_id: their ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens | None = None) -> None:
        """Wrap `backend`; `special` names the tokens that open, close and pad a report (default: BERT's or
        RoBERTa's, whichever the vocabulary has).

        Raises:
            ConfigError: a special token is not in the vocabulary.
        """
        if special is None:
            known = (names for names in _SPECIAL_TOKENS if backend.token_to_id(names[0]) is not None)
            special = next(known, _SPECIAL_TOKENS[0])
        backend.no_padding()
        backend.no_truncation()
        # A report that happens to contain "[SEP]" is text like any other.
        backend.encode_special_tokens = True
        ids = [backend.token_to_id(token) for token in special]
        if None in ids:
            missing = [token for token, number in zip(special, ids, strict=True) if number is None]
            raise ConfigError(
                f"the tokenizer has no token {', '.join(missing)}; its vocabulary cannot be used"
            )
        self._backend = backend
        self.special = special
        self.cls_id, self.sep_id, self.pad_id = (int(number) for number in ids if number is not None)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        # Every id up to the largest gets a row of the embedding table, whether a token has it or not.
        if self.vocab_size > 2 * len(vocabulary) + 1000:
            raise ConfigError(
                f"the tokenizer has {len(vocabulary)} tokens with ids up to {self.vocab_size - 1}; its "
                "vocabulary cannot be used"
            )
        self.continuation = _continuation(backend, vocabulary, self.vocab_size, special)
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([backend.to_str(), special]).encode())

    @classmethod
    def load(cls, spec: str | Path | None, root: str | Path) -> Tokenizer:
        """Load the tokenizer of a run.

        Args:
            spec: folder or hub name (anything `transformers.AutoTokenizer` takes); None: the dataset's own.
            root: dataset folder or URL prefix that holds `tokenizer.json` (used when `spec` is None).

        Raises:
            ConfigError: nothing usable there.
            DataError: the dataset has no index, or its tokenizer cannot be downloaded or contradicts it.
        """
        return cls._load_dataset(root) if spec is None else cls._load_pretrained(str(spec))

    @classmethod
    def _load_dataset(cls, root: str | Path) -> Tokenizer:
        where = locate(root, TOKENIZER_NAME)
        # A run folder has the file without an index; the reader refuses data that have none.
        described = is_remote(root) or Path(root, INDEX_NAME).exists()
        expected = Index.load(root).tokenizer if described else None
        try:
            read = read_remote if is_remote(root) else read_limited
            data = read(where, _TOKENIZER_LIMIT)
        except (OSError, JsonError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"cannot read {where} ({reason}); name another tokenizer with data.tokenizer=..."
            ) from error
        if described and hash_bytes(data) != expected:
            raise DataError(
                f"{where} differs from its hash in index.json and would give texts other ids than the "
                "dataset's own tokenizer; bring the file back, or name another with data.tokenizer=..."
            )
        return cls.from_json(data, where)

    @classmethod
    def from_json(cls, data: bytes, where: str, special: SpecialTokens | None = None) -> Tokenizer:
        """The tokenizer in the bytes of a `tokenizer.json`; `where` names it in errors, `special` as above.

        Raises:
            ConfigError: they are no tokenizer, or one without the special tokens.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the Rust side raises bare Exception for every malformed file
            raise ConfigError(f"{where} is not a tokenizer file: {error}") from error
        return cls(backend, special)

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary; None: it has no such token."""
        number: int | None = self._backend.token_to_id(token)
        return number

    def to_json(self) -> bytes:
        """The bytes of a `tokenizer.json`; with `special`, `from_json` makes an equal tokenizer of them."""
        return self._backend.to_str().encode()

    @property
    def content(self) -> str:
        """Hash of `to_json`, in the form the index of a dataset has it."""
        return hash_bytes(self.to_json())

    @classmethod
    def _load_pretrained(cls, spec: str) -> Tokenizer:
        import transformers  # takes seconds to import, and most runs use the dataset's own tokenizer

        if not Path(spec).exists() and (Path(spec).is_absolute() or spec.startswith(".")):
            raise ConfigError(f"data.tokenizer: folder {spec} does not exist")
        try:
            with quiet_hub():
                pretrained = transformers.AutoTokenizer.from_pretrained(
                    spec, use_fast=True, trust_remote_code=False
                )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"data.tokenizer: cannot load {spec!r}: {hub_reason(error)}") from error
        if not getattr(pretrained, "is_fast", False):
            raise ConfigError(f"data.tokenizer: {spec!r} has no fast (Rust) tokenizer")
        special = (
            pretrained.cls_token or pretrained.bos_token,
            pretrained.sep_token or pretrained.eos_token,
            pretrained.pad_token or pretrained.eos_token,
        )
        if None in special:
            raise ConfigError(f"data.tokenizer: {spec!r} names no token that opens, closes or pads a text")
        return cls(pretrained.backend_tokenizer, special)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer to `folder`, from where `Tokenizer.load(folder, ...)` reads an equal one."""
        import transformers

        cls_token, sep_token, pad_token = self.special
        transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=self._backend, cls_token=cls_token, sep_token=sep_token, pad_token=pad_token
        ).save_pretrained(str(folder))

    def to_transformers(self, max_tokens: int) -> PreTrainedTokenizerFast:
        """A transformers tokenizer that gives a text the ids `tokenize` gives it.

        It opens and closes texts with this tokenizer's special tokens, cuts at `max_tokens` with
        `truncation=True`, and takes names of special tokens inside a text for ordinary words.
        """
        import transformers

        opening, closing, padding = self.special
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[opening, "$A", closing],
            pair=[opening, "$A", closing, "$B:1", f"{closing}:1"],
            special_tokens=[(opening, self.cls_id), (closing, self.sep_id)],
        )
        named = {"cls_token": opening, "sep_token": closing, "pad_token": padding}
        unknown = getattr(backend.model, "unk_token", None)
        if unknown is not None:
            named["unk_token"] = unknown
        mask = next((name for name in _MASK_TOKENS if backend.token_to_id(name) is not None), None)
        if mask is not None:
            named["mask_token"] = mask
        return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend,
            model_max_length=max_tokens,
            model_input_names=["input_ids", "attention_mask"],
            split_special_tokens=True,
            **named,
        )

    def encode(self, reports: Sequence[Sequence[str]]) -> TokenRows:
        """Token ids of reports given as lists of sentences, whole and without special tokens.

        The sentences of a report are joined by one space, so the ids are those of the joined text.
        """
        texts = [" ".join(sentences) for sentences in reports]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        ids, numbers, lengths = [], [], np.zeros(len(texts), dtype=np.int64)
        for row, (sentences, encoding) in enumerate(zip(reports, encodings, strict=True)):
            lengths[row] = len(encoding.ids)
            ids.append(np.asarray(encoding.ids, dtype=np.int32))
            starts = np.cumsum([0] + [len(sentence) + 1 for sentence in sentences[:-1]])
            # A byte-level piece may begin with the space before its sentence: its last character decides.
            last = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1] - 1
            numbers.append(np.minimum(np.searchsorted(starts, last, side="right") - 1, _LAST_SENTENCE))
        empty = np.zeros(0, dtype=np.int32)
        return TokenRows(
            ids=np.concatenate([empty, *ids]),
            sentences=np.concatenate([empty, *numbers]).astype(np.int16),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with the names of special tokens among them; marks may stand apart."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def tokenize(self, reports: Sequence[Sequence[str]], max_tokens: int, pad_to_max: bool = False) -> Text:
        """Tokenise reports (lists of sentences) into `Text`; longer ones are cut, `[SEP]` is kept."""
        return self.assemble(self.encode(reports), np.arange(len(reports)), max_tokens, pad_to_max)

    def assemble(
        self,
        rows: TokenRows,
        selection: NDArray[np.int64],
        max_tokens: int,
        pad_to_max: bool = False,
        multiple: int = 1,
    ) -> Text:
        """Lay out stored reports as `Text`: `[CLS]`, at most `max_tokens - 2` tokens, `[SEP]`, padding.

        Args:
            rows: stored reports.
            selection: [B] which reports.
            max_tokens: longest row, with `[CLS]` and `[SEP]`; at least 3.
            pad_to_max: make every row `max_tokens` long instead of as long as the longest one.
            multiple: make rows a multiple of so many tokens long, or `max_tokens`.

        Raises:
            ValueError: `max_tokens` below 3.
        """
        if max_tokens < 3:
            raise ValueError(
                f"data.max_tokens must be at least 3 ([CLS], one token, [SEP]), not {max_tokens}"
            )
        starts = rows.offsets[selection]
        lengths = np.minimum(rows.offsets[selection + 1] - starts, max_tokens - 2)[:, None]
        needed = np.minimum(-(-(lengths[:, 0] + 2) // multiple) * multiple, max_tokens)
        if pad_to_max:
            needed[:] = max_tokens
        width = max_tokens if pad_to_max else int(needed.max(initial=2))
        column = np.arange(width)[None]
        body = (column >= 1) & (column <= lengths)
        source = (starts[:, None] + column - 1)[body]
        ids = np.full((len(selection), width), self.pad_id, dtype=np.int64)
        ids[:, 0] = self.cls_id
        ids[body] = rows.ids[source]
        separator = column == lengths + 1
        ids[separator] = self.sep_id
        sentence = np.full(ids.shape, -1, dtype=np.int64)
        sentence[body] = rows.sentences[source]
        # The first token of a report opens a word whatever piece it is.
        opens_word = (body & (~self.continuation[ids] | (column == 1))) | separator
        mask = column <= lengths + 1
        word = np.where(mask, np.cumsum(opens_word, axis=1), -1)
        return Text(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            word_index=torch.from_numpy(word),
            sentence_index=torch.from_numpy(sentence),
            lengths=tuple(needed.tolist()),
        )


def _continuation(
    backend: tokenizers.Tokenizer, vocabulary: dict[str, int], size: int, special: SpecialTokens
) -> NDArray[np.bool_]:
    """Which pieces continue a word: "##x" of WordPiece, pieces without the word mark of BPE and Unigram."""
    model = backend.model
    if isinstance(model, tokenizers.models.WordPiece):
        prefix, marked_continues = model.continuing_subword_prefix, True
    else:
        marks = [mark for mark in ("Ġ", "▁") if any(token.startswith(mark) for token in vocabulary)]
        if not marks:
            raise ConfigError(
                f"a {type(model).__name__} tokenizer that marks no word starts (Ġ or ▁) has no word index"
            )
        prefix, marked_continues = marks[0], False
    continuation = np.zeros(size, dtype=bool)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token, number in vocabulary.items():
        continuation[number] = token.startswith(prefix) == marked_continues
        if token in special or token in added:
            continuation[number] = False
    return continuation

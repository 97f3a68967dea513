"""Report generation: vocabularies of words or word pieces, and the objective that a decoder learns by."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medvlp.data.batch import Batch
from medvlp.data.questions import text_code
from medvlp.data.text import Tokenizer
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.heads.report_decoder import ReportDecoder
from medvlp.methods.base import Method, StepOutput
from medvlp.prototypes.table import PrototypeTable

Clean = Callable[[str], list[str]]
#: Bytes of a word of a predicted report, with its space, in the mean; nothing written by people comes near.
_WORD_BYTES = 32


class ReportVocabulary(abc.ABC):
    """Words by number.

    Attributes:
        size: number of words. pad, bos, eos: three different numbers.
    """

    size: int
    pad: int
    bos: int
    eos: int

    @abc.abstractmethod
    def targets(self, batch: Batch, most: int) -> Tensor:
        """[B, T] int64: the reports of a batch, each followed by `eos`, then `pad`; T is at most `most`.

        What is longer is cut and has no `eos`: nothing is taught to end there.
        """

    @abc.abstractmethod
    def text(self, numbers: Sequence[int]) -> str:
        """The words of a report joined by spaces, up to `eos`; words that are not in it are "<unk>"."""


class WordVocabulary(ReportVocabulary):
    """The words that reports of enough patients share.

    Args:
        words: sorted. field: batch field with the codes of the reports' words.
    """

    pad, bos, eos = 0, 1, 2
    UNKNOWN, _FIRST = 3, 4

    def __init__(self, words: Sequence[str], field: str) -> None:
        codes = np.array([text_code(word) for word in words], dtype=np.int64)
        order = np.argsort(codes)
        self.words, self.field = [words[i] for i in order], field
        self._codes = torch.from_numpy(codes[order])
        self.size = self._FIRST + len(words)

    def targets(self, batch: Batch, most: int) -> Tensor:
        """See `ReportVocabulary`."""
        codes = batch.fields[self.field]
        known = self._codes = self._codes.to(codes.device)  # stays there: a copy waits for the device
        place = torch.searchsorted(known, codes).clamp(max=max(len(known) - 1, 0))
        found = known[place] == codes if len(known) else torch.zeros_like(codes, dtype=torch.bool)
        numbers = torch.where(found, place + self._FIRST, self.UNKNOWN)
        lengths = (codes != 0).sum(dim=1, keepdim=True)
        column = torch.arange(codes.shape[1] + 1, device=codes.device)
        numbers = F.pad(numbers, (0, 1)).where(column < lengths, self.pad)
        return numbers.where(column != lengths, self.eos)[:, :most]

    def text(self, numbers: Sequence[int]) -> str:
        """See `ReportVocabulary`."""
        ended = list(numbers).index(self.eos) if self.eos in numbers else len(numbers)
        kept = [number for number in numbers[:ended] if number >= self.UNKNOWN]
        return " ".join(
            "<unk>" if number == self.UNKNOWN else self.words[number - self._FIRST] for number in kept
        )


class PieceVocabulary(ReportVocabulary):
    """The word pieces of the run's tokenizer; reports are those of `Batch.text`.

    Args:
        tokenizer: of the run. clean: makes scored words of what it gives back.
    """

    def __init__(self, tokenizer: Tokenizer, clean: Clean) -> None:
        self.pad, self.bos, self.eos = tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id
        self.size, self.tokenizer, self.clean = tokenizer.vocab_size, tokenizer, clean

    def targets(self, batch: Batch, most: int) -> Tensor:
        """See `ReportVocabulary`. A report that `data.max_tokens` cuts ends there, so that has to be longer
        than `most` (`tasks.report.Report.protocol`)."""
        ids = batch.text.input_ids[:, 1:]
        return ids.masked_fill(batch.text.attention_mask[:, 1:] == 0, self.pad)[:, :most]

    def text(self, numbers: Sequence[int]) -> str:
        """See `ReportVocabulary`."""
        ended = list(numbers).index(self.eos) if self.eos in numbers else len(numbers)
        return " ".join(self.clean(self.tokenizer.decode(list(numbers[:ended]))))


class ReportObjective(SupervisedObjective):
    """Teaches a decoder to write the report of an image.

    The loss is the cross-entropy of all words, summed and divided by B times the mean number of words of a
    training report: the mean over ranks and micro-batches is the loss of the whole batch, however long their
    reports are.

    Args:
        method: gives the patch tokens. decoder: writes. vocabulary: of the reports.
        mean_words: of a training report, with what ends it.
    """

    head: ReportDecoder

    def __init__(
        self, method: Method, decoder: ReportDecoder, vocabulary: ReportVocabulary, mean_words: float
    ) -> None:
        super().__init__(method, decoder)
        self.vocabulary, self.mean_words = vocabulary, mean_words

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        """The loss, and "word_accuracy": how many words are the most probable after the true ones."""
        targets = self.vocabulary.targets(batch, self.head.max_words)
        first = torch.full_like(targets[:, :1], self.vocabulary.bos)
        before = torch.cat([first, targets[:, :-1]], dim=1)
        logits = self.head(self._patches(batch.image), before).logits.float()
        losses = F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=self.vocabulary.pad, reduction="sum"
        )
        right = ((logits.argmax(dim=2) == targets) & (targets != self.vocabulary.pad)).sum()
        scale = len(targets) * self.mean_words
        return StepOutput(losses / scale, {"word_accuracy": right / scale})

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """Texts as UTF-8 [B, K], padded with 0: "text", what is written; "reduced", the report as the
        vocabulary and `max_words` leave it.
        """
        written = self.head.write(self._patches(batch.image))
        targets = self.vocabulary.targets(batch, self.head.max_words)
        return {"text": self._bytes(written), "reduced": self._bytes(targets)}

    def write(self, image: Tensor) -> list[str]:
        """The reports of images [B, 1, H, W]."""
        return [self.vocabulary.text(row) for row in self.head.write(self._patches(image)).tolist()]

    def _patches(self, image: Tensor) -> Tensor:
        features = self.method.image_encoder(image)  # type: ignore[operator]
        return features.local.to(next(self.head.parameters()).dtype)  # type: ignore[no-any-return]

    def _bytes(self, numbers: Tensor) -> Tensor:
        longest = self.head.max_words * _WORD_BYTES
        result = torch.zeros(len(numbers), longest, dtype=torch.uint8)
        for row, of in zip(result, numbers.tolist(), strict=True):
            text = self.vocabulary.text(of).encode()
            if len(text) > longest:
                raise ValueError(f"a report of {len(text)} bytes, more than {_WORD_BYTES} a word")
            row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else row[:0]
        return result.to(numbers.device)


def shared_words(reports: Sequence[Sequence[str]], patients: Sequence[str], least: int) -> list[str]:
    """The words in reports of at least `least` patients, sorted: a rarer one may tell who a patient is."""
    holders: dict[str, set[str]] = {}
    for words, patient in zip(reports, patients, strict=True):
        for word in set(words):
            holders.setdefault(word, set()).add(patient)
    return sorted(word for word, found in holders.items() if len(found) >= least)


def patch_shape(method: Method, image_size: int) -> tuple[int, int]:
    """Number and width of the patch tokens that the image encoder gives."""
    encoder: Any = method.image_encoder
    encoder.eval()
    with torch.no_grad():
        local = encoder(torch.zeros((1, 1, image_size, image_size), dtype=torch.uint8)).local
    return local.shape[1], local.shape[2]


def texts_of(rows: NDArray[np.uint8]) -> list[str]:
    """The texts of [N, K] bytes of `ReportObjective.predict`."""
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]

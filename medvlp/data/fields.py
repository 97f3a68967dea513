"""Batch fields that only some methods and tasks need: how each is read, and how a view of the image moves it.

A field is asked for by its name and stands in `Batch.fields` under it. One more field is one more class here,
registered by its name; loaders, datasets and batches do not change.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp.config import DataConfig, TransformConfig
from medvlp.config_files import ConfigError
from medvlp.data.batch import Text
from medvlp.data.questions import asked, normalised, text_code
from medvlp.data.report import r2gen_words, report_text, scored_words
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.data.transforms import View
from shards.entities.matrix import mirrored
from shards.errors import DataError, UnavailableError
from shards.reader import ShardReader

logger = logging.getLogger(__name__)

_BUILD_AGAIN = "build the dataset again with medvlp shards build"


class Field(ABC):
    """One named field of a split.

    Args:
        reader: the shards. split: which split. store: what is known about its samples.
        tokenizer: of texts. config: the `data` section.
    """

    name: ClassVar[str]
    #: Whether it says where in the image something lies.
    placed: ClassVar[bool] = False
    #: Whether `Batch.counts` says how many things `read` gave for each sample.
    counted: ClassVar[bool] = False

    def __init__(
        self, reader: ShardReader, split: str, store: SampleStore, tokenizer: Tokenizer, config: DataConfig
    ) -> None:
        self.reader, self.split, self.store = reader, split, store
        self.tokenizer, self.config = tokenizer, config

    @abstractmethod
    def missing(self) -> str | None:
        """Why nothing can be learned from this field of this split, with the remedy; None: something can."""

    @abstractmethod
    def read(self, position: int, view: View, config: TransformConfig) -> Any:
        """The field of one sample, as it is seen.

        Args:
            position: in the split.
            view: what of the stored image the sample shows.
            config: how a view moves what is no place in the image.

        Raises:
            DataError: it cannot be read, or contradicts the dataset, so that the sample is corrupt; names
                shard and key.
        """

    @abstractmethod
    def join(self, samples: Sequence[Any]) -> Tensor:
        """[B, ...] of what `read` gave for each sample of a batch."""

    def _lacking(self, holds: Callable[[int], Any], reason: str) -> str | None:
        """`reason` where no sample holds something; they are asked one by one, for it may be rare.

        Samples that cannot be read are passed over: training counts them.
        """
        unreadable = set(self.store.unreadable.tolist())
        fault = ""
        for position in range(len(self.store)):
            if position in unreadable:
                continue
            try:
                if holds(position):
                    return None
            except UnavailableError:
                raise
            except DataError as error:
                fault = f" (not all of them can be read: {error})"
        return reason + fault


class Entities(Field):
    """[B, 51, 75] int8, anatomies x observations of `shards.entities.vocabulary`.

    1 is present, 0 absent, -1 not mentioned (or uncertain). Sides change places with the image unless
    `data.transform.flip_entities` says "keep".
    """

    name = "entities"

    def missing(self) -> str | None:
        """See `Field`."""
        if len(self.store.entities.cells):
            return None
        return "no sample has an entity (present or absent); annotate the dataset with medvlp shards annotate"

    def read(self, position: int, view: View, config: TransformConfig) -> tuple[int, bool]:
        """See `Field`; where it is stored, and whether its sides change places."""
        return position, view.flipped and config.flip_entities == "swap"

    def join(self, samples: Sequence[tuple[int, bool]]) -> Tensor:
        """See `Field`."""
        matrices = self.store.entities.matrices(np.array([row for row, _ in samples], dtype=np.int64))
        swapped = np.array([swaps for _, swaps in samples], dtype=bool)
        matrices[swapped] = mirrored(matrices[swapped])
        return torch.from_numpy(matrices)


class Boxes(Field):
    """[B, M, 5] float32: label, left, top, right, bottom of the boxes of each sample.

    The label is its number among the dataset's label names; the rest are pixels of the view. M is the largest
    number of the batch; a row without a box holds label -1 and zeros. Boxes are cut at the border of the
    view; what lies outside is left out.
    """

    name = "boxes"
    placed = True

    def missing(self) -> str | None:
        """See `Field`."""
        return self._lacking(lambda i: self.reader.metadata(self.split, i)["boxes"], "no sample has a box")

    def read(self, position: int, view: View, config: TransformConfig) -> NDArray[np.float32]:
        """See `Field`."""
        names = self.reader.index.label_names
        stored = self.reader.metadata(self.split, position)["boxes"]
        if not {box["label"] for box in stored} <= set(names):
            shard, _ = self.reader.locate(self.split, position)
            key = self.reader.key(self.split, position)
            raise DataError(f"{shard.file}: sample {key}: a box of a label that is no label of the dataset")
        return _in_view([(names.index(box["label"]), box) for box in stored], view)[0]

    def join(self, samples: Sequence[NDArray[np.float32]]) -> Tensor:
        """See `Field`."""
        return _padded(samples, 5)


class Phrases(Field):
    """[B, M, 6] float32: number, left, top, right, bottom, label of the boxes of each sample's phrases.

    The number counts the phrases of the sample's metadata from 0; the label is -1 where a box bears none of
    the dataset's label names; the rest is as in `Boxes`.
    """

    name = "phrases"
    placed = True

    def missing(self) -> str | None:
        """See `Field`."""
        return self._lacking(
            lambda i: any(item["boxes"] for item in self.reader.metadata(self.split, i)["phrases"]),
            "no sample has a phrase with a box",
        )

    def read(self, position: int, view: View, config: TransformConfig) -> NDArray[np.float32]:
        """See `Field`."""
        known = {name: number for number, name in enumerate(self.reader.index.label_names)}
        phrases = self.reader.metadata(self.split, position)["phrases"]
        boxes = [(number, box) for number, phrase in enumerate(phrases) for box in phrase["boxes"]]
        found, seen = _in_view(boxes, view)
        labels = np.array([known.get(box["label"], -1) for _, box in boxes], dtype=np.float32)
        return np.concatenate([found, labels[seen, None]], axis=1)

    def join(self, samples: Sequence[NDArray[np.float32]]) -> Tensor:
        """See `Field`."""
        return _padded(samples, 6)


def _in_view(
    boxes: Sequence[tuple[int, dict[str, Any]]], view: View
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """[m, 5] number, left, top, right, bottom (pixels of the view) of the boxes in it, and which they are."""
    numbers = np.array([number for number, _ in boxes], dtype=np.float64)
    x, y, width, height = (
        np.array([box[key] for _, box in boxes], dtype=np.float64) for key in ("x", "y", "width", "height")
    )
    (left, right), (top, bottom) = view.horizontal(x, x + width), view.vertical(y, y + height)
    left, top = np.clip(left, 0, view.size), np.clip(top, 0, view.size)
    right, bottom = np.clip(right, 0, view.size), np.clip(bottom, 0, view.size)
    seen = (right > left) & (bottom > top)
    return np.stack([numbers, left, top, right, bottom], axis=1)[seen].astype(np.float32), seen


def _padded(boxes: Sequence[NDArray[np.float32]], columns: int) -> Tensor:
    """[B, M, columns] of B lists of boxes; rows without one hold -1 and zeros."""
    result = torch.zeros(len(boxes), max([len(found) for found in boxes], default=0), columns)
    result[:, :, 0] = -1
    for row, found in zip(result, boxes, strict=True):
        row[: len(found)] = torch.from_numpy(found)
    return result


class Masks(Field):
    """[B, L, S, S] uint8: the masks of the L label names, as the view of S x S pixels shows them.

    1 is inside, 0 outside, 255 everywhere where the sample has no mask of the finding (nothing is known).
    A pixel of the view holds the pixel of the stored mask that lies under its middle.
    """

    name = "masks"
    placed = True
    UNKNOWN = 255

    def __init__(
        self, reader: ShardReader, split: str, store: SampleStore, tokenizer: Tokenizer, config: DataConfig
    ) -> None:
        super().__init__(reader, split, store, tokenizer, config)
        if reader.index.version == 1:
            logger.warning(
                "%s is of format version 1: where findings overlap, its masks show one of them, and a "
                "finding without a mask is not known to be absent; %s",
                reader.root,
                _BUILD_AGAIN,
            )

    def missing(self) -> str | None:
        """See `Field`."""
        reason = "no sample has a mask"
        if self.reader.index.version == 1:
            reason = f"no sample has a mask, and format version 1 has none of tables; {_BUILD_AGAIN}"
        return self._lacking(lambda i: self.reader.masks(self.split, i), reason)

    def read(self, position: int, view: View, config: TransformConfig) -> NDArray[np.uint8]:
        """See `Field`."""
        names = self.reader.index.label_names
        found = np.full((len(names), view.size, view.size), self.UNKNOWN, dtype=np.uint8)
        across, down = view.stored_columns(), view.stored_rows()
        for name, mask in self.reader.masks(self.split, position).items():
            found[names.index(name)] = mask[down[:, None], across]
        return found

    def join(self, samples: Sequence[NDArray[np.uint8]]) -> Tensor:
        """See `Field`."""
        if not samples:
            return torch.zeros((0, len(self.reader.index.label_names), 0, 0), dtype=torch.uint8)
        return torch.from_numpy(np.stack(samples))


class Questions(Field):
    """[B, Q, 4, L] int64: input_ids, attention_mask, word_index and sentence_index of the samples' questions.

    Those of `medvlp.data.questions.asked`, in their order, cut at `TOKENS`; `question_text` makes texts of
    them. Q is the largest number of the batch; where a sample has fewer, all tokens are padding.
    """

    name = "questions"
    #: Longest question with its special tokens; M3AE cuts at 32.
    TOKENS = 32
    #: Most questions of a sample.
    MOST = 64

    def missing(self) -> str | None:
        """See `Field`."""
        return self._lacking(
            lambda i: asked(self.reader.metadata(self.split, i)), "no sample has a question in English"
        )

    def read(self, position: int, view: View, config: TransformConfig) -> Tensor:
        """See `Field`."""
        return self._encoded([item["question"] for item in self.asked(position)])

    def join(self, samples: Sequence[Tensor]) -> Tensor:
        """See `Field`."""
        return _rows_of(samples, self._encoded([]))

    def asked(self, position: int) -> list[dict[str, str]]:
        """The questions of a sample.

        Raises:
            DataError: they are more than `MOST`.
        """
        found = asked(self.reader.metadata(self.split, position))
        if len(found) > self.MOST:
            shard, _ = self.reader.locate(self.split, position)
            key = self.reader.key(self.split, position)
            raise DataError(
                f"{shard.file}: sample {key}: {len(found)} questions, more than the {self.MOST} that are read"
            )
        return found

    def _encoded(self, questions: Sequence[str]) -> Tensor:
        """[n, 4, TOKENS]."""
        text = self.tokenizer.tokenize([[question] for question in questions], self.TOKENS, pad_to_max=True)
        return torch.stack([text.input_ids, text.attention_mask, text.word_index, text.sentence_index], dim=1)


class Answers(Questions):
    """[B, Q] int64: `text_code` of the normalised answers to the field "questions"; 0: there is none."""

    name = "answers"
    counted = True

    def read(self, position: int, view: View, config: TransformConfig) -> Tensor:
        """See `Field`."""
        return _codes(normalised(item["answer"]) for item in self.asked(position))

    def join(self, samples: Sequence[Tensor]) -> Tensor:
        """See `Field`."""
        return _rows_of(samples, _codes([]))


class ReportWords(Field):
    """[B, W] int64: `text_code` of each word of the reports as generated ones are scored by; 0: no more.

    Whoever has a vocabulary finds its words by their codes; the loader has none.
    """

    name = "report_words"

    @staticmethod
    def words(text: str) -> list[str]:
        """The words of a report."""
        return scored_words(text)

    def missing(self) -> str | None:
        """See `Field`."""
        if self.store.has_text().any():
            return None
        return f"no sample has text in data.sections={list(self.config.sections)}"

    def read(self, position: int, view: View, config: TransformConfig) -> Tensor:
        """See `Field`."""
        return _codes(self.words(report_text(self.reader.metadata(self.split, position), self.config)))

    def join(self, samples: Sequence[Tensor]) -> Tensor:
        """See `Field`."""
        return _rows_of(samples, _codes([]))


class R2GenWords(ReportWords):
    """As `ReportWords`, by R2Gen's cleaning."""

    name = "r2gen_words"

    @staticmethod
    def words(text: str) -> list[str]:
        """See `ReportWords`."""
        return r2gen_words(text)


def _codes(texts: Iterable[str]) -> Tensor:
    return torch.tensor([text_code(text) for text in texts], dtype=torch.int64)


def _rows_of(rows: Sequence[Tensor], nothing: Tensor) -> Tensor:
    """[B, M, ...] of B tensors [m, ...]; the rest is zeros. `nothing` has the shape without rows."""
    width = max([len(row) for row in rows], default=0)
    result = torch.zeros(len(rows), width, *nothing.shape[1:], dtype=nothing.dtype)
    for to, row in zip(result, rows, strict=True):
        to[: len(row)] = row
    return result


def question_text(questions: Tensor) -> Text:
    """Texts of the field "questions", [n, 4, L]."""
    ids, mask, words, sentences = questions.unbind(dim=1)
    return Text(ids, mask, words, sentences)


#: Every field by its name.
FIELDS: dict[str, type[Field]] = {
    field.name: field
    for field in (Entities, Boxes, Phrases, Masks, Questions, Answers, ReportWords, R2GenWords)
}


def open_fields(
    names: Iterable[str],
    reader: ShardReader,
    split: str,
    store: SampleStore,
    tokenizer: Tokenizer,
    config: DataConfig,
) -> dict[str, Field]:
    """The named fields of a split, in alphabetical order.

    Raises:
        ConfigError: there is no such field.
    """
    unknown = sorted(set(names) - set(FIELDS))
    if unknown:
        raise ConfigError(f"no batch field is named {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    return {name: FIELDS[name](reader, split, store, tokenizer, config) for name in sorted(set(names))}

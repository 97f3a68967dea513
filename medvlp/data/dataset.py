"""Map-style datasets whose item is a whole micro-batch: read, decode, crop, look up token ids."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from medvlp.config import DataConfig
from medvlp.data.augment import draws as augmentation_draws
from medvlp.data.augment import reduction
from medvlp.data.batch import Batch, Text
from medvlp.data.fields import Field
from medvlp.data.order import Positions
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer, TokenRows
from medvlp.data.transforms import (
    DRAWS,
    SampleRandom,
    View,
    evaluation_crop,
    evaluation_view,
    training_view,
)
from medvlp.data.views import Reduced
from shards.errors import DataError, UnavailableError
from shards.images import decode_image
from shards.reader import ShardReader

#: Other samples tried in place of a corrupt one before the run stops.
REPLACEMENTS = 8
#: Random words of a sample that its augmentation and its replacements use.
USED = DRAWS + REPLACEMENTS


class ImageReportDataset(Dataset[Batch]):
    """What training and evaluation share: decoding, and batches from the sample store.

    Args:
        reader: the shards.
        split: which split.
        store: its token ids, labels and keys.
        tokenizer: the tokenizer the ids came from.
        config: image size, transform, longest report.
        fields: what to fill `Batch.fields` with.
    """

    def __init__(
        self,
        reader: ShardReader,
        split: str,
        store: SampleStore,
        tokenizer: Tokenizer,
        config: DataConfig,
        fields: Mapping[str, Field],
    ) -> None:
        self.reader = reader
        self.split = split
        self.store = store
        self.tokenizer = tokenizer
        self.config = config
        self.fields = fields
        self._unreadable = frozenset(store.unreadable.tolist())
        side = reader.index.image_size
        # One buffer for all: it saves an allocation a sample and refuses images larger than the index says.
        self._pixels = np.empty((side, side, 1), dtype=np.uint8)

    def decode(self, position: int) -> NDArray[np.uint8]:
        """Stored pixels [H, W] of a sample; valid until the next call.

        Raises:
            DataError: the sample cannot be read or decoded; names shard and key.
        """
        return self.decode_reduced(position, None)[0]

    def decode_reduced(
        self, position: int, by: Callable[[tuple[int, int]], int] | None
    ) -> tuple[NDArray[np.uint8], Reduced | None]:
        """As `decode`, of a JPEG each side divided by what `by` says of the stored [H, W] (1, 2, 4 or 8).

        A factor of the discrete cosine transform, which computes the smaller image at once.
        """
        if position in self._unreadable:
            raise self._fault(position, "its metadata cannot be read")
        data = self.reader.image(self.split, position)
        try:
            if not data.startswith(b"\xff\xd8"):
                return decode_image(data), None
            least, reduced = {}, None
            if by is not None:
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                if max(height, width) <= len(self._pixels) and (factor := by((height, width))) > 1:
                    reduced = Reduced((height, width), factor)
                    least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "GRAY", buffer=self._pixels, **least)
            return pixels[:, :, 0], reduced
        except (DataError, ValueError) as error:
            raise self._fault(position, f"its image cannot be decoded ({error})") from error

    def _fault(self, position: int, reason: str) -> DataError:
        shard, _ = self.reader.locate(self.split, position)
        (key,) = self.store.keys(np.array([position]))
        return DataError(f"{shard.file}: sample {key}: {reason}")

    def _known(self, position: int, view: View) -> dict[str, Any]:
        """What the fields hold of a sample; a DataError makes it a corrupt one."""
        return {
            name: field.read(position, view, self.config.transform) for name, field in self.fields.items()
        }

    def _text(self, tokens: TokenRows, rows: Positions) -> Text:
        multiple = self.config.pad_multiple or 1
        return self.tokenizer.assemble(tokens, rows, self.config.max_tokens, self.config.pad_to_max, multiple)

    def _batch(
        self,
        images: NDArray[np.uint8],
        rows: Positions,
        known: Sequence[Mapping[str, Any]],
        text: Text,
        faults: list[str],
        skipped: int,
    ) -> Batch:
        return Batch(
            image=torch.from_numpy(images)[:, None],
            text=text,
            sample=torch.from_numpy(rows),
            labels=torch.from_numpy(self.store.labels[rows]),
            keys=self.store.keys(rows),
            skipped=skipped,
            faults=faults,
            fields={
                name: field.join([sample[name] for sample in known]) for name, field in self.fields.items()
            },
            study=torch.from_numpy(self.store.studies[rows]),
            counts={
                name: tuple(len(sample[name]) for sample in known)
                for name, field in self.fields.items()
                if field.counted
            },
        )


class TrainingDataset(ImageReportDataset):
    """Augmented micro-batches; a corrupt sample is replaced by one drawn from (seed, epoch, sample)."""

    def __init__(
        self,
        reader: ShardReader,
        split: str,
        store: SampleStore,
        tokenizer: Tokenizer,
        config: DataConfig,
        fields: Mapping[str, Field],
        seed: int,
        trainable: Positions,
    ) -> None:
        """As `ImageReportDataset`; `seed` is that of the run, replacements come from `trainable`."""
        super().__init__(reader, split, store, tokenizer, config, fields)
        self.seed = seed
        self._trainable = trainable

    def __getitem__(self, request: tuple[int, Positions]) -> Batch:
        """The micro-batch of (epoch, positions).

        Raises:
            DataError: a sample and all its replacements are corrupt.
        """
        epoch, positions = request
        random = SampleRandom(self.seed, epoch)
        size, transform = self.config.image_size, self.config.transform
        count = augmentation_draws(transform)
        wilder = SampleRandom(self.seed, epoch, stream=1)
        images = np.empty((len(positions), size, size), dtype=np.uint8)
        rows = positions.copy()
        known: list[Mapping[str, Any]] = []
        faults: list[str] = []
        for row, position in enumerate(positions.tolist()):
            for candidate in self._candidates(random, position):
                draws = random.uniform(candidate, DRAWS)
                # A stream of its own, so that these changes leave the draws of all else as they are.
                more = wilder.uniform(candidate, count) if count else None
                by = None
                if transform.reduced_decoding:
                    by = partial(reduction, size=size, config=transform, uniform=more)
                try:
                    pixels, reduced = self.decode_reduced(candidate, by)
                    images[row], view = training_view(pixels, size, transform, draws, more, reduced)
                    known.append(self._known(candidate, view))
                except UnavailableError:
                    raise
                except DataError as error:
                    faults.append(str(error))
                    continue
                rows[row] = candidate
                break
            else:
                raise DataError(f"{REPLACEMENTS + 1} corrupt samples in a row, the last: {faults[-1]}")
        if self.config.shuffle_sentences:
            tokens = shuffle_sentences(
                self.store.rows, rows, lambda sample, count: random.words(sample, USED + count)[USED:]
            )
            text = self._text(tokens, np.arange(len(rows)))
        else:
            text = self._text(self.store.rows, rows)
        return self._batch(images, rows, known, text, faults, int((rows != positions).sum()))

    def _candidates(self, random: SampleRandom, position: int) -> Iterator[int]:
        """The sample itself, then its replacements in this epoch."""
        yield position
        words = random.words(position, USED)[DRAWS:]
        yield from self._trainable[words % np.uint64(len(self._trainable))].tolist()


class EvaluationDataset(ImageReportDataset):
    """Batches without randomness; corrupt samples are left out, so a batch can be smaller or empty."""

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        """The batch of these positions."""
        size, crop = self.config.image_size, evaluation_crop(self.config.transform)
        images = np.empty((len(positions), size, size), dtype=np.uint8)
        kept: list[int] = []
        known: list[Mapping[str, Any]] = []
        faults: list[str] = []
        for position in positions:
            try:
                pixels = self.decode(position)
                images[len(kept)], view = evaluation_view(pixels, size, crop)
                known.append(self._known(position, view))
            except UnavailableError:
                raise
            except DataError as error:
                faults.append(str(error))
                continue
            kept.append(position)
        rows = np.array(kept, dtype=np.int64)
        text = self._text(self.store.rows, rows)
        return self._batch(images[: len(kept)], rows, known, text, faults, len(faults))


def shuffle_sentences(
    rows: TokenRows, selection: NDArray[np.int64], draw: Callable[[int, int], NDArray[np.uint64]]
) -> TokenRows:
    """The selected reports with their sentences in an order of chance; tokens keep theirs inside a sentence.

    Reports are shuffled whole, so that cutting them afterwards drops other sentences each time.
    With a byte-level tokenizer the space before a sentence travels with it.

    Args:
        rows: stored reports.
        selection: [B] which reports.
        draw: (report, n) -> [n] uniform 64-bit words of this report.

    Returns:
        The B reports, sentences renumbered from 0 in their new order.
    """
    ids, sentences, lengths = [], [], []
    for report in selection.tolist():
        tokens = slice(rows.offsets[report], rows.offsets[report + 1])
        numbers = np.asarray(rows.sentences[tokens])
        count = int(numbers.max(initial=-1)) + 1
        place = np.argsort(np.argsort(draw(report, count), kind="stable"), kind="stable")[numbers]
        order = np.argsort(place, kind="stable")
        ids.append(np.asarray(rows.ids[tokens])[order])
        sentences.append(place[order])
        lengths.append(len(numbers))
    nothing = np.zeros(0, dtype=np.int64)
    return TokenRows(
        np.concatenate([nothing, *ids]),
        np.concatenate([nothing, *sentences]),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
    )

"""What one training step receives: images, token ids and what is known about the samples."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class _TensorRecord:
    """Moves every tensor of a dataclass, those in dicts too; other attributes are kept as they are."""

    def _map(self, function: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Self:
        """The record with `function` of every tensor, or of what else of a `kind` stands in place of one."""
        changes: dict[str, object] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, kind):
                changes[item.name] = function(value)
            elif isinstance(value, dict):
                changes[item.name] = {
                    name: function(of) if isinstance(of, kind) else of for name, of in value.items()
                }
            elif isinstance(value, _TensorRecord):
                changes[item.name] = value._map(function, kind)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Return the record with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the record in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor, made on another CUDA stream, until `stream` has read it."""
        self._map(lambda tensor: tensor.record_stream(stream))

    def rows(self, start: int, stop: int) -> Self:
        """Samples start to stop - 1 of every tensor (views)."""
        return self._map(lambda values: values[start:stop], (Tensor, tuple))


@dataclass
class Text(_TensorRecord):
    """Tokenised reports (or prompts), padded on the right.

    Attributes:
        input_ids: [B, L] int64, `[CLS]` first, `[SEP]` last, then `[PAD]`.
        attention_mask: [B, L] int64, 1 on tokens, 0 on padding.
        word_index: [B, L] int64; `[CLS]` is word 0, pieces "##x" share the index of their word,
            `[SEP]` is a word of its own, padding is -1.
        sentence_index: [B, L] int64; sentence of each token counted from 0; `[CLS]`, `[SEP]` and
            padding are -1.
        lengths: B positions that each text needs, a multiple of `data.pad_multiple`: known on the host, so
            that nothing has to wait for the device to tell them; None: only `attention_mask` says them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    word_index: Tensor
    sentence_index: Tensor
    lengths: tuple[int, ...] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def groups(self, count: int) -> list[tuple[int, int]]:
        """Cut the texts, sorted by length, into `count` parts (or as many as texts), equal up to one text.

        Returns:
            the number of texts of each part, and the positions that its longest needs. Texts whose lengths
            the host does not know are one part.
        """
        rows, width = self.input_ids.shape
        if self.lengths is None or min(count, rows) < 2:
            return [(rows, width)]
        parts = np.array_split(np.sort(self.lengths), min(count, rows))
        return [(len(part), int(part[-1])) for part in parts]

    def padded(self, length: int) -> Self:
        """The same texts, `length` tokens long (on the CPU, where they come from)."""
        more = length - self.input_ids.shape[1]
        if not more:
            return self
        # Texts of full length show no padding token; which one stands there, no attention reads.
        shown = self.input_ids[self.attention_mask == 0]
        padding = int(shown[0]) if len(shown) else 0
        return type(self)(
            F.pad(self.input_ids, (0, more), value=padding),
            F.pad(self.attention_mask, (0, more), value=0),
            F.pad(self.word_index, (0, more), value=-1),
            F.pad(self.sentence_index, (0, more), value=-1),
            self.lengths,
        )


@dataclass
class Batch(_TensorRecord):
    """One micro-batch on one rank.

    Attributes:
        image: [B, 1, H, W] uint8; normalised on the device by the image encoder.
        text: the tokenised reports.
        sample: [B] int64, position of each sample in the index of its split (0 .. samples-1).
        labels: [B, C] float32 in the order of the index's label names: 1, 0, -1 (uncertain), NaN (unknown).
        keys: the B sample keys (for messages; never text).
        skipped: corrupt samples that were replaced (training) or left out (evaluation) in this batch.
        faults: what was wrong with them, one message each, naming shard and key.
        fields: what the loader was asked for beside these, by name (`medvlp.data.fields`).
        study: [B] int64, equal for samples of one study (images with one report): the position of the first
            of them in the split; None: not known, and every sample counts as a study of its own.
        counts: how many things each sample holds of those fields that say so (`Field.counted`), known on the
            host, so that nothing has to wait for the device to tell it.
    """

    image: Tensor
    text: Text
    sample: Tensor
    labels: Tensor
    keys: list[str]
    skipped: int = 0
    faults: list[str] = field(default_factory=list)
    fields: dict[str, Tensor] = field(default_factory=dict)
    study: Tensor | None = None
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Self:
        """Samples start to stop - 1, with texts as long as before."""
        return dataclasses.replace(super().rows(start, stop), keys=self.keys[start:stop])


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the samples of several with the same fields, with texts of one length.

    Raises:
        ValueError: only some of them know studies, or a field has a value of another shape in each.
    """
    length = max(batch.text.input_ids.shape[1] for batch in batches)
    texts = [batch.text.padded(length) for batch in batches]
    lengths = [text.lengths for text in texts]
    studies = [batch.study for batch in batches if batch.study is not None]
    if len(studies) not in (0, len(batches)):
        raise ValueError("batches with and without studies make no single one")
    for name in batches[0].fields:
        if len({batch.fields[name].shape[1:] for batch in batches}) > 1:
            raise ValueError(f"the field {name} has another shape in each micro-batch")
    return Batch(
        image=torch.cat([batch.image for batch in batches]),
        text=Text(
            **{name: torch.cat([text.tensors()[name] for text in texts]) for name in texts[0].tensors()},
            lengths=None if None in lengths else tuple(number for known in lengths for number in known or ()),
        ),
        sample=torch.cat([batch.sample for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        keys=[key for batch in batches for key in batch.keys],
        skipped=sum(batch.skipped for batch in batches),
        faults=[fault for batch in batches for fault in batch.faults],
        fields={name: torch.cat([batch.fields[name] for batch in batches]) for name in batches[0].fields},
        study=torch.cat(studies) if studies else None,
        counts={
            name: tuple(number for batch in batches for number in batch.counts[name])
            for name in batches[0].counts
        },
    )

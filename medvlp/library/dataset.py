"""A dataset of shards for notebooks: samples by number, as a torch dataset, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp.config import DataConfig
from medvlp.data.cache import open_reader
from shards.errors import DataError, UsageError
from shards.images import decode_image

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import Dataset as TorchDataset


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it.

    Attributes:
        key: of the sample. image: [S, S] uint8, as it is stored.
        report: its sections, joined. labels: name -> 1, 0, -1 (uncertain) or None (unknown).
        metadata: everything that is stored (boxes, phrases, questions, licence, ...).
    """

    key: str
    image: NDArray[np.uint8]
    report: str
    labels: dict[str, int | None]
    metadata: dict[str, Any]


class Dataset:
    """The samples of one split of a dataset, or of all; made by `medvlp.open_dataset`.

    Attributes:
        splits: names of the dataset's splits. label_names: its findings.
        fingerprint: equal ones mean equal samples in equal order. arguments: what it was built from and how.

    >>> dataset.splits
    ['train', 'valid', 'test']
    >>> dataset[0].image.shape
    (32, 32)
    """

    def __init__(self, root: str | Path, split: str | None = None) -> None:
        """See `medvlp.open_dataset`."""
        self._reader = open_reader(DataConfig(root=str(root)))
        index = self._reader.index
        self.splits, self.label_names = list(index.splits), list(index.label_names)
        self.fingerprint, self.arguments = index.fingerprint, dict(index.arguments)
        if split is not None:
            index.split_shards(split)
        self._chosen = self.splits if split is None else [split]

    def __len__(self) -> int:
        """Number of samples.

        >>> len(dataset) == sum(len(medvlp.open_dataset(folder, split)) for split in dataset.splits)
        True
        """
        return sum(self._reader.sample_count(split) for split in self._chosen)

    def __getitem__(self, number: int) -> Sample:
        """Sample by number, negative ones from the end.

        Raises:
            IndexError: there are not so many.
            DataError: the sample is damaged.
        """
        split, place = self._place(number)
        key, image, metadata = self._reader.read(split, place)
        try:
            pixels = decode_image(image)
        except DataError as error:
            raise DataError(f"sample {key}: {error}") from error
        labels = {name: metadata["labels"].get(name) for name in self.label_names}
        return Sample(key, pixels, _report(metadata), labels, metadata)

    def __iter__(self) -> Iterator[Sample]:
        """All samples in order."""
        return (self[number] for number in range(len(self)))

    def to_torch(self) -> TorchDataset[tuple[Tensor, Tensor, str]]:
        """As a map-style torch dataset: image [1, S, S] uint8, labels [C] float32 (NaN: unknown), report.

        >>> image, labels, report = dataset.to_torch()[0]
        >>> image.dtype, tuple(image.shape), len(labels) == len(dataset.label_names)
        (torch.uint8, (1, 32, 32), True)
        """
        return _Torch(self)

    def to_pandas(self) -> pd.DataFrame:
        """A row for each sample: split, key, patient, study, view, report, and a column for each label.

        Images are not in it: `dataset[i].image`. Reads the metadata of every sample.

        >>> dataset.to_pandas().shape[0] == len(dataset)
        True
        """
        import pandas as pd

        rows = []
        for split in self._chosen:
            for place in range(self._reader.sample_count(split)):
                metadata = self._reader.metadata(split, place)
                facts = {name: metadata.get(name) for name in ("patient_id", "study_id", "view")}
                labels = {name: metadata["labels"].get(name) for name in self.label_names}
                key = self._reader.key(split, place)
                rows.append({"split": split, "key": key, **facts, "report": _report(metadata), **labels})
        return pd.DataFrame(rows)

    def _place(self, number: int) -> tuple[str, int]:
        if not isinstance(number, int | np.integer):
            raise UsageError(f"dataset[{number!r}]: give the number of one sample")
        place = int(number) + (len(self) if number < 0 else 0)
        for split in self._chosen:
            count = self._reader.sample_count(split)
            if 0 <= place < count:
                return split, place
            place -= count if place >= 0 else 0
        raise IndexError(f"sample {number} of {len(self)}")


class _Torch(torch.utils.data.Dataset[tuple[Tensor, Tensor, str]]):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, str]:
        sample = self.dataset[number]
        values = [float("nan") if value is None else float(value) for value in sample.labels.values()]
        return torch.from_numpy(sample.image)[None], torch.tensor(values), sample.report


def _report(metadata: dict[str, Any]) -> str:
    return "\n".join(text for text in metadata["sections"].values() if text)

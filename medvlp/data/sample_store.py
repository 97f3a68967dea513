"""What is known about the samples of a split but their images: computed once, then mapped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medvlp.config import DataConfig
from medvlp.data.cache import cache_folder
from medvlp.data.report import report_sentences
from medvlp.data.rules import RULES, excluding_rule
from medvlp.data.text import Tokenizer, TokenRows
from shards.atomic import atomic_write, remove_leftovers
from shards.entities import matrix
from shards.entities.matrix import NOT_MENTIONED, SHAPE, Triple, matrix_cells
from shards.errors import DataError, UnavailableError
from shards.format import TOOL_VERSION, is_remote
from shards.reader import ShardReader

logger = logging.getLogger(__name__)

#: Raise when the stored arrays or the way to compute them change.
_VERSION = 5
#: Samples held at once; each may have `METADATA_LIMIT` bytes.
_CHUNK = 512


class SampleStore:
    """Token ids, labels, entities and keys of a split, in one safetensors file that is mapped, not read.

    Attributes:
        path: the file.
        rows: token ids and sentence numbers of all reports.
        labels: float32 [N, C] in the order of the index's label names: 1, 0, -1, NaN (unknown).
        entities: the anatomy-observation matrices of all samples.
        unreadable: int64, positions of samples whose metadata could not be read; they have no text.
        studies: int64 [N], position of the first sample of the same study in the split (ids of studies may be
            numbers of a patient's visits); an unreadable sample is a study of its own.
        excluded: uint8 [N], which rule of `medvlp.data.rules` keeps a sample from being trained on; 0: none.
    """

    def __init__(self, path: Path) -> None:
        """Map the store at `path`.

        Raises:
            DataError: the file is damaged.
        """
        self.path = path
        try:
            # Tensors of the torch framework are views of the mapped file; those of numpy would be copies.
            with safe_open(path, framework="pt") as file:
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
                stated = (file.metadata() or {}).get("checksum")
            _check_arrays(arrays)
            self.rows = TokenRows(arrays["ids"], arrays["sentences"], arrays["offsets"])
            self.labels: NDArray[np.float32] = arrays["labels"]
            self.entities = EntityRows(arrays["entity_cells"], arrays["entity_offsets"])
            self.unreadable: NDArray[np.int64] = arrays["unreadable"]
            self.studies: NDArray[np.int64] = arrays["studies"]
            self.excluded: NDArray[np.uint8] = arrays["excluded"]
            self._keys: NDArray[np.uint8] = arrays["keys"]
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: damaged sample store ({error}); delete it and start again") from error
        self._stated_checksum = stated

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> Path:
        """Only the path travels to a worker; the worker maps the same pages."""
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]

    def check(self, samples: int, labels: int, vocab_size: int) -> None:
        """Read all of it once: nobody else does before it is used, and a changed value looks like any other.

        Args:
            samples: of the split.
            labels: label names of the dataset.
            vocab_size: of the tokenizer.

        Raises:
            DataError: changed since it was written, or not of such a split and tokenizer.
        """
        arrays = {
            "ids": self.rows.ids, "sentences": self.rows.sentences, "offsets": self.rows.offsets,
            "labels": self.labels, "entity_cells": self.entities.cells,
            "entity_offsets": self.entities.offsets, "unreadable": self.unreadable, "keys": self._keys,
            "studies": self.studies, "excluded": self.excluded,
        }  # fmt: skip
        problem = None
        if self.labels.shape != (samples, labels):
            problem = f"labels {self.labels.shape}, not {(samples, labels)}"
        elif checksum(arrays) != self._stated_checksum:
            problem = "its checksum differs"
        else:
            problem = _value_problem(arrays, vocab_size)
        if problem:
            raise DataError(f"{self.path}: damaged sample store ({problem}); delete it and start again")

    def keys(self, selection: NDArray[np.int64]) -> list[str]:
        """Keys of the selected samples."""
        return [row.tobytes().rstrip(b"\0").decode() for row in self._keys[selection]]

    def trainable(self) -> NDArray[np.bool_]:
        """bool [N]: samples that pass the rules, and unreadable ones (counted when training meets them)."""
        trainable: NDArray[np.bool_] = self.excluded == 0
        return trainable

    def has_text(self) -> NDArray[np.bool_]:
        """bool [N]: samples with text, whatever the rules of training say."""
        return np.diff(self.rows.offsets) > 0

    @classmethod
    def open_or_build(
        cls, reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer
    ) -> SampleStore:
        """Open the store of a split, computing it first where it does not exist yet.

        It lies in `tokens/` of the dataset folder if that can be written, else of `data.cache_dir`. One
        process computes it while the others of the node wait for the file lock; the file appears complete or
        not at all. A store with unreadable samples is computed again once one of them can be read.

        Raises:
            DataError: no place to write, or more than `data.max_bad_fraction` of the samples unreadable.
        """
        name = f"{split}-{_store_hash(reader, split, config, tokenizer)}.safetensors"
        folders = [cache_folder(config) / "tokens"]
        if not is_remote(reader.root):
            folders.insert(0, Path(reader.root) / "tokens")
        for folder in folders:
            if (store := _open_current(folder / name, reader, split, tokenizer)) is not None:
                break
        else:
            folder = _first_writable(folders)
            with FileLock(folder / f".{name}.lock"):
                store = _open_current(folder / name, reader, split, tokenizer)
                if store is None:
                    remove_leftovers(folder, name)
                    atomic_write(folder / name, _build(reader, split, config, tokenizer))
                    store = cls(folder / name)
        _check_share(reader, split, config, store.unreadable)
        return store


def _check_share(
    reader: ShardReader, split: str, config: DataConfig, unreadable: Sequence[int] | NDArray[np.int64]
) -> None:
    """Stop when more samples are unreadable than `data.max_bad_fraction` allows."""
    bad, count = len(unreadable), reader.sample_count(split)
    if bad > config.max_bad_fraction * count:
        first = reader.locate(split, int(unreadable[0]))[0].file
        raise DataError(
            f"{reader.root}: {bad} of {count} samples of split {split!r} cannot be read (the first in "
            f"{first}), more than data.max_bad_fraction={config.max_bad_fraction} allows; "
            "run medvlp shards verify"
        )


def _store_hash(reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer) -> str:
    parts: list[Any] = [
        _VERSION,
        matrix.VERSION,
        TOOL_VERSION,
        tokenizer.fingerprint,
        list(config.sections),
        config.cleaning,
        sorted(config.views),
        config.min_sentences,
        config.min_tokens,
    ]
    parts += [reader.index.fingerprint, reader.index.label_names, split]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts).encode())


def _open_current(path: Path, reader: ShardReader, split: str, tokenizer: Tokenizer) -> SampleStore | None:
    """The store at `path`, or None where it is missing, damaged or older than a repair of the shards."""
    if not path.is_file():
        return None
    try:
        store = SampleStore(path)
        store.check(reader.sample_count(split), len(reader.index.label_names), tokenizer.vocab_size)
    except DataError as error:
        logger.warning("%s; computing it again", error)
        return None
    # Of a remote dataset each could bring a shard, which is as the index says whenever it comes.
    tried = store.unreadable[:1] if is_remote(reader.root) else store.unreadable
    return None if any(_metadata(reader, split, i) is not None for i in tried.tolist()) else store


def _first_writable(folders: list[Path]) -> Path:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise DataError(f"cannot write token ids to {' or '.join(map(str, folders))}; set data.cache_dir")


def _metadata(reader: ShardReader, split: str, i: int) -> dict[str, Any] | None:
    try:
        return reader.metadata(split, i)
    except UnavailableError:  # not this sample's fault
        raise
    except DataError:
        return None


def _chunks(
    reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer
) -> Iterator[tuple[TokenRows, list[dict[str, Any] | None], list[int]]]:
    """Tokenised chunks of the split, their metadata (None: unreadable), the rules that exclude them."""
    count = reader.sample_count(split)
    for start in range(0, count, _CHUNK):
        metadata = [_metadata(reader, split, i) for i in range(start, min(start + _CHUNK, count))]
        reports = [
            report_sentences(sample["sections"], config.sections, config.cleaning) if sample else []
            for sample in metadata
        ]
        excluded = [
            0 if sample is None else excluding_rule(sample["view"], report, config)
            for sample, report in zip(metadata, reports, strict=True)
        ]
        yield tokenizer.encode(reports), metadata, excluded
        logger.info("tokenised %d of %d reports of split %s", start + len(metadata), count, split)


def _build(reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer) -> bytes:
    """The bytes of the store."""
    count = reader.sample_count(split)
    names = reader.index.label_names
    ids, sentences, lengths = [], [], []
    # Grows with what was read: how many samples there are is so far only claimed by the index.
    labels: list[NDArray[np.float32]] = []
    entities: list[list[Triple]] = []
    unreadable: list[int] = []
    first: dict[tuple[str, str], int] = {}
    studies: list[int] = []
    excluded: list[int] = []
    position = 0
    for rows, metadata, rules in _chunks(reader, split, config, tokenizer):
        excluded += rules
        ids.append(rows.ids)
        sentences.append(rows.sentences)
        lengths.append(np.diff(rows.offsets))
        for sample in metadata:
            entities.append(sample["entities"] if sample else [])
            if sample is None:
                unreadable.append(position)
            studies.append(position if sample is None else first.setdefault(_study(sample), position))
            values = [sample["labels"].get(name) if sample else None for name in names]
            labels.append(np.array([np.nan if value is None else value for value in values], np.float32))
            position += 1
        _check_share(reader, split, config, unreadable)
    packed = EntityRows.pack(entities)
    keys = np.array([reader.key(split, i).encode() for i in range(count)], dtype=np.bytes_)
    arrays = {
        "ids": np.concatenate(ids),
        "sentences": np.concatenate(sentences),
        "offsets": np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        "labels": np.stack(labels),
        "entity_cells": packed.cells,
        "entity_offsets": packed.offsets,
        "unreadable": np.array(unreadable, dtype=np.int64),
        "keys": keys.view(np.uint8).reshape(count, keys.itemsize),
        "studies": np.array(studies, dtype=np.int64),
        "excluded": np.array(excluded, dtype=np.uint8),
    }
    origin = {"split": split, "tokenizer": tokenizer.fingerprint, "dataset": reader.index.fingerprint}
    return save(arrays, metadata={**origin, "checksum": checksum(arrays)})


def _study(sample: Mapping[str, Any]) -> tuple[str, str]:
    return sample["patient_id"], sample["study_id"]


#: Array of a store -> its type and dimensions.
_ARRAYS: dict[str, tuple[str, int]] = {
    "ids": ("int32", 1), "sentences": ("int16", 1), "offsets": ("int64", 1), "labels": ("float32", 2),
    "entity_cells": ("int16", 1), "entity_offsets": ("int64", 1), "unreadable": ("int64", 1),
    "keys": ("uint8", 2), "studies": ("int64", 1), "excluded": ("uint8", 1),
}  # fmt: skip


def _check_arrays(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuse what is no store; looks at no value but the last offsets."""
    found = {name: (array.dtype.name, array.ndim) for name, array in arrays.items()}
    if found != _ARRAYS:
        raise ValueError("its arrays are others")
    samples = len(arrays["labels"])
    if any(len(arrays[name]) != samples + 1 for name in ("offsets", "entity_offsets")):
        raise ValueError("its arrays have different lengths")
    if any(len(arrays[name]) != samples for name in ("keys", "studies", "excluded")):
        raise ValueError("its arrays have different lengths")
    if len(arrays["ids"]) != len(arrays["sentences"]):
        raise ValueError("its arrays have different lengths")


def _value_problem(arrays: Mapping[str, NDArray[Any]], vocab_size: int) -> str | None:
    """What no store of ours holds, or None; the checksum of a stranger's store says nothing."""
    samples = len(arrays["labels"])
    for name, items in (("offsets", "ids"), ("entity_offsets", "entity_cells")):
        offsets = arrays[name]
        if offsets[0] != 0 or offsets[-1] != len(arrays[items]) or (np.diff(offsets) < 0).any():
            return f"{name} do not fit {items}"
    limits = {
        "ids": vocab_size, "sentences": 1 << 15, "unreadable": samples,
        "entity_cells": 2 * matrix.SHAPE[0] * matrix.SHAPE[1], "studies": samples, "excluded": len(RULES),
    }  # fmt: skip
    for name, limit in limits.items():
        array = arrays[name]
        if array.size and not (array.min() >= 0 and array.max() < limit):
            return f"{name} out of range"
    studies = arrays["studies"]
    if (studies[studies] != studies).any() or (studies > np.arange(samples)).any():
        return "studies that do not begin with their first sample"
    labels = arrays["labels"]
    if not (np.isnan(labels) | np.isin(labels, (1, 0, -1))).all():
        return "labels out of range"
    if arrays["keys"].size and arrays["keys"].max() > 0x7F:
        return "keys that are not plain names"
    return None


def checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """xxh3-128 over names, types, shapes and values, as the store's header states it."""
    digest = xxhash.xxh3_128()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class EntityRows:
    """Mentioned cells of many samples, one sample after the other.

    Attributes:
        cells: int16 [E]; 2 * (75 * anatomy + observation) + value, with value 1 present or 0 absent.
        offsets: int64 [N + 1]; sample i has cells offsets[i] .. offsets[i + 1] - 1.
    """

    cells: NDArray[np.int16]
    offsets: NDArray[np.int64]

    @classmethod
    def pack(cls, samples: Iterable[Sequence[Triple]]) -> EntityRows:
        """Pack the entities of samples as `<key>.json` holds them."""
        rows = [[2 * cell + value for cell, value in matrix_cells(sample).items()] for sample in samples]
        return cls(
            cells=np.array([code for row in rows for code in row], dtype=np.int16),
            offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        )

    def matrices(self, selection: NDArray[np.int64]) -> NDArray[np.int8]:
        """Matrices [B, 51, 75] int8 of the selected samples: 1 present, 0 absent, -1 not mentioned."""
        starts = self.offsets[selection]
        lengths = self.offsets[selection + 1] - starts
        sample = np.repeat(np.arange(len(selection)), lengths)
        first = np.cumsum(lengths) - lengths
        codes = self.cells[np.arange(len(sample)) + np.repeat(starts - first, lengths)].astype(np.int64)
        matrices = np.full((len(selection), SHAPE[0] * SHAPE[1]), NOT_MENTIONED, dtype=np.int8)
        matrices[sample, codes // 2] = codes % 2
        return matrices.reshape(-1, *SHAPE)

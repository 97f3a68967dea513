"""Token ids, labels, entities and keys of a split: computed once, kept beside the shards, then mapped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
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
from medvlp.data.entities import EntityRows
from medvlp.data.report import report_sentences
from medvlp.data.text import Tokenizer, TokenRows
from shards.atomic import atomic_write, remove_leftovers
from shards.entities import matrix
from shards.entities.matrix import Triple
from shards.errors import DataError
from shards.format import TOOL_VERSION, is_remote
from shards.reader import ShardReader

logger = logging.getLogger(__name__)

#: Raise when the stored arrays or the way to compute them change.
_VERSION = 2
_CHUNK = 2048


class TokenStore:
    """Everything of a split but its images, in one safetensors file that is mapped, not read.

    Attributes:
        path: the file.
        rows: token ids and sentence numbers of all reports.
        labels: float32 [N, C] in the order of the index's label names: 1, 0, -1, NaN (unknown).
        entities: the anatomy-observation matrices of all samples.
        unreadable: int64, positions of samples whose metadata could not be read; they have no text.
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
            self.rows = TokenRows(arrays["ids"], arrays["sentences"], arrays["offsets"])
            self.labels: NDArray[np.float32] = arrays["labels"]
            self.entities = EntityRows(arrays["entity_cells"], arrays["entity_offsets"])
            self.unreadable: NDArray[np.int64] = arrays["unreadable"]
            self._keys: NDArray[np.uint8] = arrays["keys"]
        except (SafetensorError, OSError, KeyError) as error:
            raise DataError(f"{path}: damaged token store ({error}); delete it and start again") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> Path:
        """Only the path travels to a worker; the worker maps the same pages."""
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]

    def keys(self, selection: NDArray[np.int64]) -> list[str]:
        """Keys of the selected samples."""
        return [row.tobytes().rstrip(b"\0").decode() for row in self._keys[selection]]

    def trainable(self) -> NDArray[np.bool_]:
        """bool [N]: samples with text, and unreadable ones (they are counted when training meets them)."""
        trainable = np.diff(self.rows.offsets) > 0
        trainable[self.unreadable] = True
        return trainable

    @classmethod
    def open_or_build(
        cls, reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer
    ) -> TokenStore:
        """Open the store of a split, computing it first where it does not exist yet.

        It lies in `tokens/` of the dataset folder if that can be written, else of `data.cache_dir`. One
        process computes it while the others of the node wait for the file lock; the file appears complete or
        not at all. A store with unreadable samples is computed again once the first of them can be read.

        Raises:
            DataError: no place to write, or more than `data.max_bad_fraction` of the samples unreadable.
        """
        name = f"{split}-{_store_hash(reader, split, config, tokenizer)}.safetensors"
        folders = [cache_folder(config) / "tokens"]
        if not is_remote(reader.root):
            folders.insert(0, Path(reader.root) / "tokens")
        for folder in folders:
            if (store := _open_current(folder / name, reader, split)) is not None:
                break
        else:
            folder = _first_writable(folders)
            with FileLock(folder / f".{name}.lock"):
                store = _open_current(folder / name, reader, split)
                if store is None:
                    remove_leftovers(folder, name)
                    atomic_write(folder / name, _build(reader, split, config, tokenizer))
                    store = cls(folder / name)
        bad = len(store.unreadable)
        if bad > config.max_bad_fraction * len(store):
            first = reader.locate(split, int(store.unreadable[0]))[0].file
            raise DataError(
                f"{reader.root}: {bad} of {len(store)} samples of split {split!r} cannot be read (the first "
                f"in {first}), more than data.max_bad_fraction={config.max_bad_fraction} allows; "
                "run medvlp shards verify"
            )
        return store


def _store_hash(reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer) -> str:
    parts: list[Any] = [
        _VERSION,
        matrix.VERSION,
        TOOL_VERSION,
        tokenizer.fingerprint,
        list(config.sections),
        config.cleaning,
    ]
    parts += [reader.index.fingerprint, reader.index.label_names, split]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts).encode())


def _open_current(path: Path, reader: ShardReader, split: str) -> TokenStore | None:
    """The store at `path`, or None where it is missing, damaged or older than a repair of the shards."""
    if not path.is_file():
        return None
    try:
        store = TokenStore(path)
    except DataError as error:
        logger.warning("%s; computing it again", error)
        return None
    if len(store.unreadable) and _metadata(reader, split, int(store.unreadable[0])) is not None:
        return None
    return store


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
    except DataError:
        return None


def _chunks(
    reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer
) -> Iterator[tuple[TokenRows, list[dict[str, Any] | None]]]:
    """Tokenised chunks of the split with their metadata; None for what cannot be read."""
    count = reader.sample_count(split)
    for start in range(0, count, _CHUNK):
        metadata = [_metadata(reader, split, i) for i in range(start, min(start + _CHUNK, count))]
        reports = [
            report_sentences(sample["sections"], config.sections, config.cleaning) if sample else []
            for sample in metadata
        ]
        yield tokenizer.encode(reports), metadata
        logger.info("tokenised %d of %d reports of split %s", start + len(metadata), count, split)


def _build(reader: ShardReader, split: str, config: DataConfig, tokenizer: Tokenizer) -> bytes:
    """The bytes of the store."""
    count = reader.sample_count(split)
    names = reader.index.label_names
    ids, sentences, lengths = [], [], []
    labels = np.full((count, len(names)), np.nan, dtype=np.float32)
    entities: list[list[Triple]] = []
    unreadable = []
    position = 0
    for rows, metadata in _chunks(reader, split, config, tokenizer):
        ids.append(rows.ids)
        sentences.append(rows.sentences)
        lengths.append(np.diff(rows.offsets))
        for sample in metadata:
            entities.append(sample["entities"] if sample else [])
            if sample is None:
                unreadable.append(position)
            else:
                values = [sample["labels"].get(name) for name in names]
                labels[position] = [np.nan if value is None else value for value in values]
            position += 1
    packed = EntityRows.pack(entities)
    keys = np.array([reader.key(split, i).encode() for i in range(count)], dtype=np.bytes_)
    return save(
        {
            "ids": np.concatenate(ids),
            "sentences": np.concatenate(sentences),
            "offsets": np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
            "labels": labels,
            "entity_cells": packed.cells,
            "entity_offsets": packed.offsets,
            "unreadable": np.array(unreadable, dtype=np.int64),
            "keys": keys.view(np.uint8).reshape(count, keys.itemsize),
        },
        metadata={"split": split, "tokenizer": tokenizer.fingerprint, "dataset": reader.index.fingerprint},
    )

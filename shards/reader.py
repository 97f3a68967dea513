"""Random access to the samples of a local dataset: one `pread` each, nothing shared with other readers."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.format import IMAGE_EXTENSIONS, MASK_EXTENSION, METADATA_EXTENSION, Index, Shard, is_remote
from shards.shard_index import ShardIndex

_MAX_OPEN_FILES = 64


class ShardReader:
    """Reads samples by their position in a split.

    Files are opened when first needed and read with `pread`, so a forked worker may use the parent's
    reader and a pickled one opens its own files. Use one reader per thread.

    Args:
        root: dataset folder, or a URL prefix together with `fetch`.
        fetch: gives the local path of a dataset file by its name, bringing it here first if need be;
            default: the file in `root`.

    Raises:
        DataError: the dataset has no readable index, or `root` is remote and there is no `fetch`.
    """

    def __init__(self, root: str | Path, fetch: Callable[[str], Path] | None = None) -> None:
        self._open_files: OrderedDict[str, int] = OrderedDict()
        if fetch is None and is_remote(root):
            raise DataError(f"{root} is remote: its shards need a local cache to be read from")
        self.root = root
        self.index = Index.load(root)
        self._fetch = fetch or Path(root).__truediv__
        self._shards = {split: self.index.split_shards(split) for split in self.index.splits}
        self._ends = {
            split: list(itertools.accumulate(shard.samples for shard in shards))
            for split, shards in self._shards.items()
        }
        self._shard_indexes: dict[str, ShardIndex] = {}

    def sample_count(self, split: str) -> int:
        """Number of samples in `split`."""
        return sum(shard.samples for shard in self.index.split_shards(split))

    def locate(self, split: str, i: int) -> tuple[Shard, int]:
        """Shard of sample `i` of `split`, and the sample's position in it.

        Raises:
            IndexError: `i` is not in 0..samples-1.
            DataError: the dataset has no such split.
        """
        if split not in self._ends:
            self.index.split_shards(split)
        ends = self._ends[split]
        if not 0 <= i < (ends[-1] if ends else 0):
            raise IndexError(f"sample {i} of split {split!r} with {ends[-1] if ends else 0} samples")
        number = bisect.bisect_right(ends, i)
        return self._shards[split][number], i - (ends[number - 1] if number else 0)

    def key(self, split: str, i: int) -> str:
        """Key of sample `i`."""
        shard, row = self.locate(split, i)
        return self._shard_index(shard).keys[row]

    def read(self, split: str, i: int) -> tuple[str, bytes, dict[str, Any]]:
        """Key, image file bytes and metadata of sample `i`, in one `pread`.

        Raises:
            DataError: the shard is missing, truncated or damaged; names shard and key.
        """
        shard, key, members = self._members(split, i)
        image = _image_extension(shard, key, members)
        contents = self._pread(shard, key, members, [image, METADATA_EXTENSION])
        return key, contents[image], _parse(contents[METADATA_EXTENSION], shard, key)

    def image(self, split: str, i: int) -> bytes:
        """Image file bytes of sample `i` alone, for training, which needs no metadata; errors as `read`."""
        shard, key, members = self._members(split, i)
        extension = _image_extension(shard, key, members)
        return self._pread(shard, key, members, [extension])[extension]

    def metadata(self, split: str, i: int) -> dict[str, Any]:
        """The parsed `<key>.json` of sample `i`; errors as `read`."""
        shard, key, members = self._members(split, i)
        contents = self._pread(shard, key, members, [METADATA_EXTENSION])
        return _parse(contents[METADATA_EXTENSION], shard, key)

    def mask(self, split: str, i: int) -> bytes | None:
        """The mask PNG of sample `i`, or None where it has none; errors as `read`."""
        shard, key, members = self._members(split, i)
        if MASK_EXTENSION not in members:
            return None
        return self._pread(shard, key, members, [MASK_EXTENSION])[MASK_EXTENSION]

    def close(self) -> None:
        """Close all files; they open again when needed."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open files: a descriptor means nothing in another process."""
        return self.__dict__ | {"_open_files": OrderedDict()}

    def _members(self, split: str, i: int) -> tuple[Shard, str, dict[str, tuple[int, int]]]:
        shard, row = self.locate(split, i)
        shard_index = self._shard_index(shard)
        return shard, shard_index.keys[row], shard_index.members(row)

    def _shard_index(self, shard: Shard) -> ShardIndex:
        if shard.file not in self._shard_indexes:
            path = self._fetch(shard.index_file)
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read shard index {path}: {error.strerror}") from error
            shard_index = ShardIndex.from_bytes(data, str(path))
            if len(shard_index.keys) != shard.samples:
                raise DataError(
                    f"{path} lists {len(shard_index.keys)} samples, the dataset's index {shard.samples}; "
                    "run `medvlp shards verify`"
                )
            self._shard_indexes[shard.file] = shard_index
        return self._shard_indexes[shard.file]

    def _pread(
        self, shard: Shard, key: str, members: dict[str, tuple[int, int]], extensions: list[str]
    ) -> dict[str, bytes]:
        """Contents of some members of a sample; they lie beside each other, so one read brings them all."""
        missing = [extension for extension in extensions if extension not in members]
        if missing:
            raise DataError(f"{shard.file}: sample {key} has no member .{missing[0]}")
        spans = {extension: members[extension] for extension in extensions}
        start = min(offset for offset, _ in spans.values())
        end = max(offset + size for offset, size in spans.values())
        try:
            data = os.pread(self._descriptor(shard.file), end - start, start)
        except OSError as error:
            raise DataError(f"{shard.file}: cannot read sample {key}: {error.strerror}") from error
        if len(data) < end - start:
            raise DataError(f"{shard.file}: truncated before the end of sample {key}; rebuild the dataset")
        return {
            extension: data[offset - start : offset - start + size]
            for extension, (offset, size) in spans.items()
        }

    def _descriptor(self, file: str) -> int:
        if file in self._open_files:
            self._open_files.move_to_end(file)
            return self._open_files[file]
        if len(self._open_files) >= _MAX_OPEN_FILES:
            os.close(self._open_files.popitem(last=False)[1])
        self._open_files[file] = os.open(self._fetch(file), os.O_RDONLY | os.O_CLOEXEC)
        return self._open_files[file]


def _image_extension(shard: Shard, key: str, members: dict[str, tuple[int, int]]) -> str:
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return extension
    raise DataError(f"{shard.file}: sample {key} has no image")


def _parse(data: bytes, shard: Shard, key: str) -> dict[str, Any]:
    try:
        metadata = json.loads(data)
    except ValueError:
        metadata = None  # the decoder's error is not passed on: it holds report text
    if not isinstance(metadata, dict):
        raise DataError(f"{shard.file}: metadata of sample {key} is damaged")
    return metadata

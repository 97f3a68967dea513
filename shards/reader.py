"""Random access to the samples of a local dataset: one `pread` each, nothing shared with other readers."""

from __future__ import annotations

import bisect
import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, UnavailableError
from shards.format import (
    FORMAT_VERSION,
    IMAGE_EXTENSIONS,
    IMAGE_LIMIT,
    METADATA_EXTENSION,
    Index,
    Shard,
    hash_bytes,
    is_remote,
)
from shards.masks import read_masks
from shards.metadata import METADATA_LIMIT, parse_metadata
from shards.shard_index import SHARD_INDEX_LIMIT, ShardIndex, map_shard_index
from shards.strict_json import JsonError, open_regular, read_limited

_MAX_OPEN_FILES = 64
#: The same where files come through a cache: what that deletes takes room on disk as long as it is open.
_MAX_FETCHED_FILES = 8
#: What may lie between members of a sample that are read together, in bytes: another member, their headers.
_GAPS = 2 * IMAGE_LIMIT


class ShardReader:
    """Reads samples by their position in a split.

    Files are opened when first needed and read with `pread`, so a forked worker may use the parent's
    reader and a pickled one opens its own files. Use one reader per thread.

    Args:
        root: dataset folder, or a URL prefix together with `fetch`.
        fetch: gives the local path of a dataset file by its name, bringing it here first if need be;
            default: the file in `root`.
        index: of the dataset, where it has been read already.

    Raises:
        DataError: the dataset has no readable index or one that contradicts itself, or `root` is remote
            and there is no `fetch`.
    """

    def __init__(
        self, root: str | Path, fetch: Callable[[str], Path] | None = None, index: Index | None = None
    ) -> None:
        self._open_files: OrderedDict[str, int] = OrderedDict()
        if fetch is None and is_remote(root):
            raise DataError(f"{root} is remote: its shards need a local cache to be read from")
        self.root = root
        self.index = index or Index.load(root)
        if problems := self.index.contradictions():
            raise DataError(f"{root}: index.json contradicts itself: {problems[0]}; rebuild the dataset")
        self._fetch = fetch or Path(root).__truediv__
        self._most_open = _MAX_OPEN_FILES if fetch is None else _MAX_FETCHED_FILES
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
            UnavailableError: the shard is missing or cannot be read now.
            DataError: it is truncated or damaged, or its disk is; names shard and key.
        """
        shard, key, members = self._members(split, i)
        image = _image_extension(shard, key, members)
        contents = self._pread(shard, key, members, [image, METADATA_EXTENSION])
        return key, contents[image], self._parse(contents[METADATA_EXTENSION], shard, key)

    def image(self, split: str, i: int) -> bytes:
        """Image file bytes of sample `i` alone, for training, which needs no metadata; errors as `read`."""
        shard, key, members = self._members(split, i)
        extension = _image_extension(shard, key, members)
        return self._pread(shard, key, members, [extension])[extension]

    def metadata(self, split: str, i: int) -> dict[str, Any]:
        """The parsed `<key>.json` of sample `i`; errors as `read`."""
        shard, key, members = self._members(split, i)
        contents = self._pread(shard, key, members, [METADATA_EXTENSION])
        return self._parse(contents[METADATA_EXTENSION], shard, key)

    def masks(self, split: str, i: int) -> dict[str, NDArray[np.uint8]]:
        """The masks of sample `i`, finding -> [size, size] of 0 and 1; errors as `read`.

        Of a finding without a mask nothing is known; a mask of zeros says that it is not there. Masks of
        datasets of format version 1 lack what another finding overlaps (`shards.masks.read_masks`).
        """
        shard, key, members = self._members(split, i)
        held = [name for name in (self.index.masks_extension,) if name in members]
        contents = self._pread(shard, key, members, [METADATA_EXTENSION, *held])
        metadata = self._parse(contents[METADATA_EXTENSION], shard, key)
        try:
            return read_masks(contents, metadata["masks"], self.index.label_names, self.index.image_size)
        except DataError as error:
            raise DataError(f"{shard.file}: sample {key}: {error}") from error

    def _parse(self, data: bytes, shard: Shard, key: str) -> dict[str, Any]:
        return _parse(data, shard, key, self.index.label_names, self.index.version)

    def close(self) -> None:
        """Close all files; they open again when needed."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open and mapped files: they mean nothing in another process."""
        return self.__dict__ | {"_open_files": OrderedDict(), "_shard_indexes": {}}

    def _members(self, split: str, i: int) -> tuple[Shard, str, dict[str, tuple[int, int]]]:
        shard, row = self.locate(split, i)
        shard_index = self._shard_index(shard)
        return shard, shard_index.keys[row], shard_index.members(row)

    def _shard_index(self, shard: Shard) -> ShardIndex:
        if shard.file not in self._shard_indexes:
            path = self._fetch(shard.index_file)
            try:
                data = map_shard_index(path)
            except OSError as error:
                raise _unread(f"shard index {path}", error) from error
            except JsonError as error:
                raise DataError(f"cannot read shard index {path}: {error}") from error
            self._shard_indexes[shard.file] = _checked_index(data, path, shard, shard.bytes)
        return self._shard_indexes[shard.file]

    def _pread(
        self, shard: Shard, key: str, members: dict[str, tuple[int, int]], extensions: list[str]
    ) -> dict[str, bytes]:
        """Contents of some members of a sample; they lie beside each other, so one read brings them all."""
        missing = [extension for extension in extensions if extension not in members]
        if missing:
            raise DataError(f"{shard.file}: sample {key} has no member .{missing[0]}")
        spans = {extension: members[extension] for extension in extensions}
        for extension, (_, size) in spans.items():
            _check_length(shard, key, extension, size)
        start = min(offset for offset, _ in spans.values())
        end = max(offset + size for offset, size in spans.values())
        if end - start > sum(size for _, size in spans.values()) + _GAPS:
            raise DataError(f"{shard.file}: the members of sample {key} lie far apart; rebuild the dataset")
        data = self._bytes_at(shard.file, key, end - start, start)
        return {
            extension: data[offset - start : offset - start + size]
            for extension, (offset, size) in spans.items()
        }

    def _bytes_at(self, file: str, key: str, size: int, start: int) -> bytes:
        try:
            data = _read_at(self._descriptor(file), size, start)
            if len(data) == size:
                return data
        except OSError:
            pass
        # A file replaced on a network file system leaves a stale handle, a repaired one its truncated bytes;
        # a cached one may be evicted between its coming and its opening: the path may be as good as ever.
        self._forget(file)
        try:
            descriptor = self._descriptor(file)
            data = _read_at(descriptor, size, start)
            there = os.fstat(descriptor).st_size
        except OSError as error:
            self._forget(file)
            raise _unread(f"sample {key} of {file}", error) from error
        if len(data) == size:
            return data
        if there >= start + size:
            raise _unread(f"sample {key} of {file}", OSError(errno.EAGAIN, "a read ended within the file"))
        raise DataError(f"{file}: truncated before the end of sample {key}; rebuild the dataset")

    def _forget(self, file: str) -> None:
        descriptor = self._open_files.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)

    def _descriptor(self, file: str) -> int:
        if file in self._open_files:
            self._open_files.move_to_end(file)
            return self._open_files[file]
        path = self._fetch(file)
        self._make_room()
        try:
            self._open_files[file] = open_regular(path)
        except JsonError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        return self._open_files[file]

    def _make_room(self) -> None:
        """Close what stands in no folder any more (a cache has evicted it), then the longest unused."""
        for name in [name for name, file in self._open_files.items() if _is_gone(file)]:
            self._forget(name)
        while len(self._open_files) >= self._most_open:
            os.close(self._open_files.popitem(last=False)[1])


def _is_gone(descriptor: int) -> bool:
    """Whether an open file stands in no folder any more, or its handle of a network file system is stale."""
    try:
        return os.fstat(descriptor).st_nlink == 0
    except OSError:
        return True


def _read_at(descriptor: int, size: int, start: int) -> bytes:
    """`size` bytes of a file, or fewer where it ends; a single read may bring fewer anywhere."""
    parts, missing = [os.pread(descriptor, size, start)], size
    while parts[-1] and (missing := missing - len(parts[-1])):
        parts.append(os.pread(descriptor, missing, start + size - missing))
    return b"".join(parts)


def _unread(what: str, error: OSError) -> DataError:
    if error.errno == errno.EIO:  # a disk that has lost these bytes says so each time
        return DataError(f"cannot read {what}: {error.strerror}")
    return UnavailableError(
        f"{what} cannot be read now ({error.strerror}), which says nothing about what it holds: start again "
        "when it can be, or repair the dataset with the command that built it"
    )


def scan_shard(
    folder: Path,
    shard: Shard,
    label_names: Sequence[str],
    only: str | None = None,
    version: int = FORMAT_VERSION,
) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """Every sample of a shard in the order of its tar: key, members, and parsed metadata.

    Args:
        folder: where the tar and its `.idx` lie.
        shard: which.
        label_names, version: those of the dataset.
        only: read this member and the metadata, not all; default: all.

    Raises:
        DataError: a file cannot be read, the `.idx` is not that of the dataset, or a sample is damaged; names
            the file, and the key.
    """
    try:
        with open(open_regular(folder / shard.file), "rb") as tar:  # noqa: PTH123 - a descriptor, not a path
            data = read_limited(folder / shard.index_file, SHARD_INDEX_LIMIT)
            size = os.fstat(tar.fileno()).st_size
            shard_index = _checked_index(data, folder / shard.index_file, shard, size)
            for row, key in enumerate(shard_index.keys):
                contents = {}
                spans = sorted(shard_index.members(row).items(), key=lambda item: item[1])
                for extension, (offset, length) in spans:
                    if only in (None, extension) or extension == METADATA_EXTENSION:
                        _check_length(shard, key, extension, length)
                        contents[extension] = _read_at(tar.fileno(), length, offset)
                if METADATA_EXTENSION not in contents:
                    raise DataError(f"{shard.file}: sample {key} has no member .{METADATA_EXTENSION}")
                yield key, contents, _parse(contents[METADATA_EXTENSION], shard, key, label_names, version)
    except OSError as error:
        raise DataError(f"{folder / shard.file}: cannot be read ({error.strerror})") from error
    except JsonError as error:
        raise DataError(f"{folder / shard.index_file}: {error}") from error


def _checked_index(data: bytes | memoryview, path: Path, shard: Shard, size: int) -> ShardIndex:
    """The `.idx` file of a shard whose tar has `size` bytes, which must be the one that the dataset lists."""
    shard_index = ShardIndex.from_bytes(data, str(path), size)
    if hash_bytes(data) != shard.index_hash:
        raise DataError(f"{path} differs from its hash in index.json; run `medvlp shards verify`")
    if len(shard_index.keys) != shard.samples:
        raise DataError(
            f"{path} lists {len(shard_index.keys)} samples, the dataset's index {shard.samples}; "
            "run `medvlp shards verify`"
        )
    return shard_index


def _check_length(shard: Shard, key: str, extension: str, length: int) -> None:
    most = METADATA_LIMIT if extension == METADATA_EXTENSION else IMAGE_LIMIT
    if length > most:
        raise DataError(
            f"{shard.file}: sample {key}: .{extension} has {length} bytes, more than the limit of {most}"
        )


def _parse(data: bytes, shard: Shard, key: str, label_names: Sequence[str], version: int) -> dict[str, Any]:
    try:
        return parse_metadata(data, label_names, version)
    except JsonError as error:
        raise DataError(f"{shard.file}: sample {key}: its metadata cannot be used ({error})") from error


def _image_extension(shard: Shard, key: str, members: dict[str, tuple[int, int]]) -> str:
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return extension
    raise DataError(f"{shard.file}: sample {key} has no image")

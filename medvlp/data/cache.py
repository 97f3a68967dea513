"""Opening datasets: local folders as they are, remote shards through a node-local, size-bounded cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import xxhash
from filelock import FileLock
from webdataset.gopen import Pipe, gopen, gopen_schemes

from medvlp.config import DataConfig
from shards.atomic import atomic_file, remove_leftovers
from shards.errors import DataError
from shards.format import Index, is_remote, locate
from shards.reader import ShardReader

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
#: Names that can stand in a URL or a shell command (`pipe:`) without meaning anything there.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192) -> object:
    """WebDataset's pipe around `aws s3 cp`, which it recommends for S3 but does not register."""
    return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode=mode, bufsize=bufsize)


gopen_schemes.setdefault("s3", _open_s3)


def cache_folder(config: DataConfig) -> Path:
    """The node-local folder for remote shards and token ids: `data.cache_dir`, else as a job's site says."""
    return Path(config.cache_dir or os.environ.get("MEDVLP_CACHE_DIR") or "~/.cache/medvlp").expanduser()


def open_reader(config: DataConfig) -> ShardReader:
    """Reader of the dataset at `data.root`; shards of a URL prefix are brought to the cache when needed.

    Raises:
        DataError: no dataset there, or it cannot be read.
    """
    root = str(config.root)
    if not is_remote(root):
        return ShardReader(root)
    limit = int(config.cache_gigabytes * 1e9)
    return ShardReader(root, fetch=ShardCache(root, Index.load(root), cache_folder(config) / "shards", limit))


def read_remote(url: str) -> Iterator[bytes]:
    """The blocks of a remote file, opened by WebDataset (`http`, `https`, `s3`, `gs`, `pipe`, ...).

    Raises:
        DataError: the file cannot be read to its end.
    """
    try:
        with gopen(url, "rb", bufsize=_BLOCK) as stream:
            while block := stream.read(_BLOCK):
                yield block
    except FileNotFoundError as error:
        raise DataError(f"cannot read {url}: the program {error.filename!r} is not installed") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {url}: {error}") from error


class ShardCache:
    """Brings files of a remote dataset to a folder of this node; used as the `fetch` of a `ShardReader`.

    A file is downloaded by one process of the node while the others wait for its lock, checked against the
    hash in the index, and renamed when complete. When the tars in the folder exceed `limit` bytes the least
    recently opened ones are deleted; a reader that still has one open keeps reading it.
    """

    def __init__(self, root: str, index: Index, folder: Path, limit: int) -> None:
        self.root = root
        self.folder = folder
        self.limit = limit
        self._hashes = {shard.file: shard.hash for shard in index.shards}
        self._hashes |= {shard.index_file: shard.index_hash for shard in index.shards}

    def __call__(self, file: str) -> Path:
        """Local path of a shard or `.idx` file of the dataset.

        Raises:
            DataError: not a file of the dataset, a failed download, or content that the index contradicts.
        """
        if file not in self._hashes or not _PLAIN_NAME.fullmatch(file):
            raise DataError(f"{self.root}: {file!r} is no file of the dataset")
        # The hash in the name keeps files of other datasets and older builds apart.
        path = self.folder / f"{self._hashes[file].rpartition(':')[2]}-{file}"
        if not _touch(path):
            self._bring(file, path)
            self._evict(keep=path)
        return path

    def _bring(self, file: str, path: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write to {self.folder}: {error.strerror}; set data.cache_dir") from error
        with FileLock(self.folder / f".{path.name}.lock"):
            if path.exists():
                return
            remove_leftovers(self.folder, path.name)
            url = locate(self.root, file)
            digest = xxhash.xxh3_128()
            with atomic_file(path) as target:
                for block in read_remote(url):
                    digest.update(block)
                    target.write(block)
                if f"xxh3:{digest.hexdigest()}" != self._hashes[file]:
                    raise DataError(
                        f"{url}: the content differs from the dataset's index; run medvlp shards verify"
                    )
            logger.info("cached %s (%.1f MB)", file, path.stat().st_size / 1e6)

    def _evict(self, keep: Path) -> None:
        with FileLock(self.folder / ".evict.lock"):
            used = {path: path.stat() for path in self.folder.glob("*.tar")}
            total = sum(stat.st_size for stat in used.values())
            for path in sorted(used, key=lambda path: used[path].st_mtime_ns):
                if total <= self.limit:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= used[path].st_size


def _touch(path: Path) -> bool:
    """Mark as used now; whether the file is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True

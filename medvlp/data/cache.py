"""Opening datasets: local folders as they are, remote shards through a node-local, size-bounded cache."""

import errno
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from medvlp.config import DataConfig
from shards.atomic import atomic_file, remove_leftovers
from shards.errors import DataError
from shards.format import Index, is_remote, locate
from shards.reader import ShardReader
from shards.remote import STALL_SECONDS, RemoteError, download
from shards.shard_index import SHARD_INDEX_LIMIT

logger = logging.getLogger(__name__)

#: Names that can stand in a URL or a shell command (`pipe:`) without meaning anything there.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

#: Of lock files: users who share a folder open each other's.
_LOCK_MODE = 0o666


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
    limit, stall_seconds = int(config.cache_gigabytes * 1e9), config.stall_seconds
    index = Index.load(root, stall_seconds)
    cache = ShardCache(root, index, cache_folder(config) / "shards", limit, stall_seconds)
    return ShardReader(root, fetch=cache, index=index)


class ShardCache:
    """Brings files of a remote dataset to a folder of this node; used as the `fetch` of a `ShardReader`.

    A file is downloaded by one process of the node while the others wait for its lock, checked against the
    hash in the index, and renamed when complete. When the tars in the folder exceed `limit` bytes the least
    recently opened ones are deleted; a reader that still has one open keeps reading it.
    """

    def __init__(
        self, root: str, index: Index, folder: Path, limit: int, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self.root = root
        self.folder = folder
        self.limit = limit
        self.stall_seconds = stall_seconds
        self._sizes = {shard.file: shard.bytes for shard in index.shards}
        self._hashes = {shard.file: shard.hash for shard in index.shards}
        self._hashes |= {shard.index_file: shard.index_hash for shard in index.shards}

    def __call__(self, file: str) -> Path:
        """Local path of a shard or `.idx` file of the dataset.

        Raises:
            DataError: not a file of the dataset.
            RemoteError: a failed download, content that the index contradicts, or a folder that cannot be
                written: no sample is to blame for that.
        """
        if file not in self._hashes or not _PLAIN_NAME.fullmatch(file):
            raise DataError(f"{self.root}: {file!r} is no file of the dataset")
        # The hash in the name keeps files of other datasets and older builds apart.
        path = self.folder / f"{self._hashes[file].rpartition(':')[2]}-{file}"
        try:
            if not _touch(path):
                self._bring(file, path)
                self._evict(keep=path)
        except RemoteError:
            raise
        except (DataError, OSError) as error:
            refusal = error.__cause__ if isinstance(error, DataError) else error
            full = getattr(refusal, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            room = "make room there, lower data.cache_gigabytes, or " if full else ""
            raise RemoteError(
                f"{file} cannot be brought to {self.folder}: {getattr(refusal, 'strerror', None) or error}; "
                f"{room}set data.cache_dir to a folder that you can write"
            ) from error
        return path

    def _bring(self, file: str, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{path.name}.lock", mode=_LOCK_MODE):
            if path.exists():
                return
            remove_leftovers(self.folder, path.name)
            url = locate(self.root, file)
            with atomic_file(path) as target:
                most = self._sizes.get(file, SHARD_INDEX_LIMIT)
                if download(url, target, most, self.stall_seconds) != self._hashes[file]:
                    raise RemoteError(
                        f"{url}: the content differs from the dataset's index; run medvlp shards verify"
                    )
            logger.info("cached %s (%.1f MB)", file, path.stat().st_size / 1e6)

    def _evict(self, keep: Path) -> None:
        with FileLock(self.folder / ".evict.lock", mode=_LOCK_MODE):
            used = {path: path.stat() for path in self.folder.glob("*.tar")}
            total = sum(stat.st_size for stat in used.values())
            for path in sorted(used, key=lambda path: used[path].st_mtime_ns):
                if total <= self.limit:
                    break
                if path != keep:
                    with suppress(PermissionError):  # another user's, in a folder they share
                        path.unlink(missing_ok=True)
                        total -= used[path].st_size


def _touch(path: Path) -> bool:
    """Mark as used now; whether the file is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's file: readable is enough
        if not os.access(path, os.R_OK):
            raise
    return True

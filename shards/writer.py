"""Writes one shard: a tar whose bytes depend on nothing but its samples, and its `.idx` file."""

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shards.atomic import atomic_file, atomic_write, remove_leftovers
from shards.format import index_file_name
from shards.shard_index import ShardIndex


@dataclass(frozen=True)
class Sample:
    """A sample ready to be stored: its key and the bytes of each member, by extension and in tar order."""

    key: str
    members: dict[str, bytes]


def write_shard(folder: Path, file: str, samples: Iterable[Sample]) -> int:
    """Write `folder / file` and its `.idx`, each under a temporary name first; return the number of samples.

    Without any sample there is no file, and an older one is removed. The `.idx` comes last, so a tar that
    has one is complete.

    Raises:
        DataError: a file cannot be written; nothing is left under a final name.
    """
    remove_leftovers(folder, file)
    remove_leftovers(folder, index_file_name(file))
    written: list[tuple[str, dict[str, tuple[int, int]]]] = []
    iterator = iter(samples)
    first = next(iterator, None)
    if first is None:
        (folder / file).unlink(missing_ok=True)
        (folder / index_file_name(file)).unlink(missing_ok=True)
        return 0
    with (
        atomic_file(folder / file) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        written.append((first.key, _add(archive, first)))
        for sample in iterator:
            written.append((sample.key, _add(archive, sample)))
    atomic_write(folder / index_file_name(file), ShardIndex.from_members(written).to_bytes())
    return len(written)


def _add(archive: tarfile.TarFile, sample: Sample) -> dict[str, tuple[int, int]]:
    """Append the members of a sample; return extension -> (offset, size) of their content."""
    spans = {}
    for extension, data in sample.members.items():
        # A fresh TarInfo has owner 0, no owner names, time 0 and mode 0644: nothing of this machine gets in.
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size = len(data)
        spans[extension] = (archive.offset + tarfile.BLOCKSIZE, len(data))
        archive.addfile(member, io.BytesIO(data))
    return spans

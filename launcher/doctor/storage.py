"""Folders: the run folder keeps what is written to it, the cache has room."""

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.doctor.results import Result, fail, ok, warn

GIB = 2**30
#: File systems that no other node sees.
LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "ramfs", "f2fs"})
#: An fsync of a few bytes that takes longer makes every checkpoint wait.
SLOW_SYNC_SECONDS = 2.0
#: A clock that differs more confuses `make`, logs and whoever reads them.
CLOCK_SECONDS = 1.0
LITTLE_SPACE = 20 * GIB
_PROBE_BYTES = b"medvlp doctor\n" * 512


def probe_name() -> str:
    """Name of a file nobody else has."""
    return f".medvlp-doctor-{secrets.token_hex(8)}"


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_run_folder(folder: Path) -> Iterator[Result]:
    """Write, fsync, rename and read a file where the run folder is or will be; file system, free space."""
    place = existing_parent(folder)
    named = f"{folder}" if place == folder.absolute() else f"{folder} (made below {place})"
    first, second = place / probe_name(), place / probe_name()
    try:
        before = time.time()
        with first.open("wb") as file:
            file.write(_PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.time() - before
        modified = first.stat().st_mtime
        first.rename(second)
        same = second.read_bytes() == _PROBE_BYTES and not first.exists()
    except OSError as error:
        yield fail(
            "run folder", f"{named}: {error.strerror}",
            "choose another run.dir, or see to its permissions and your quota (quota -s, lfs quota)",
        )  # fmt: skip
        return
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)
    if not same:
        yield fail(
            "run folder", f"{named}: a renamed file was not read back as written", "use another file system"
        )
        return
    if seconds > SLOW_SYNC_SECONDS:
        yield warn(
            "run folder", f"{named}: fsync of {len(_PROBE_BYTES)} bytes took {seconds:.1f} s",
            "checkpoints will take long to become durable; ask for a faster file system",
        )  # fmt: skip
    else:
        yield ok("run folder", f"{named}: written, synced in {1000 * seconds:.0f} ms, renamed, read")
    yield from _clock_of_files(modified, before, before + seconds)
    yield from _kind_and_space(place)


def _clock_of_files(modified: float, before: float, after: float) -> Iterator[Result]:
    """The time that the file system gave a file written between two readings of this node's clock."""
    apart = max(before - modified, modified - after, 0.0)
    if apart > CLOCK_SECONDS:
        yield warn(
            "clock", f"this node's clock and that of the file server differ by {apart:.1f} s",
            "ask an administrator to look at NTP (chronyc tracking)",
        )  # fmt: skip


def _kind_and_space(place: Path) -> Iterator[Result]:
    kind = file_system(place)
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if kind in LOCAL_TYPES and nodes == 1:
        yield warn(
            "shared storage", f"{place} is on {kind}, which other nodes usually do not see",
            "for jobs of several nodes, and to resume on another node, choose a shared file system; "
            "`medvlp doctor` inside a job of two nodes tells for certain",
        )  # fmt: skip
    elif nodes == 1:
        yield ok("shared storage", f"{place} is on {kind}")
    free = shutil.disk_usage(place).free
    if free < LITTLE_SPACE:
        yield warn(
            "free space", f"{free / GIB:.1f} GiB in {place}",
            "a checkpoint needs about 12 bytes a parameter, checkpoint.keep_last + 1 of them at once",
        )  # fmt: skip
    else:
        yield ok("free space", f"{free / GIB:,.0f} GiB in {place} (a quota may leave less)")


def file_system(folder: Path) -> str:
    """Type of the file system a folder is on, as /proc/mounts names it ("nfs4", "lustre", "ext4")."""
    real, best, kind = str(folder.resolve()), "", "unknown"
    for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
        fields = line.split()
        mount = fields[1].replace("\\040", " ")
        if (real == mount or real.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, fields[2]
    return kind


def check_cache(folder: Path, gigabytes: float, remote_data: bool) -> Result:
    """Room in the node-local cache for `gigabytes` (1e9 bytes) of remote shards, or for token ids only."""
    place = existing_parent(folder)
    if not os.access(place, os.W_OK):
        return fail(
            "node cache", f"{folder} cannot be written", "set data.cache_dir to a node-local scratch folder"
        )
    free = shutil.disk_usage(place).free
    detail = f"{folder}: {free / 1e9:,.1f} GB free"
    if remote_data and free < gigabytes * 1e9:
        return warn(
            "node cache", f"{detail}, and data.cache_gigabytes is {gigabytes:g}",
            "lower data.cache_gigabytes, or set data.cache_dir to a larger node-local scratch folder",
        )  # fmt: skip
    if free < GIB:
        return warn("node cache", detail, "set data.cache_dir to a node-local folder with room")
    return ok("node cache", detail)

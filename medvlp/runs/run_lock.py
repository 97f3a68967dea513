"""One writer for a folder, a run's above all, over the nodes of a shared file system too.

Not filelock: the kernel's locks are inherited by forked data workers, do not cross nodes on every file
system and name nobody; its leases wait for every holder to expire, also for one that is known to be dead.
"""

import getpass
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import psutil

from medvlp.runs.errors import RunFolderError
from shards.atomic import atomic_write
from shards.errors import DataError
from shards.strict_json import JsonError, open_regular, parse_json, read_limited, to_record

logger = logging.getLogger(__name__)

LOCK = ".lock"
#: Seconds between two signs of life, and without one until a holder counts as dead that cannot be looked at.
BEAT_SECONDS, DEAD_SECONDS = 10.0, 120.0
_LOOK_SECONDS = 0.2
#: Largest file of a holder, in bytes.
_LIMIT = 1 << 16

#: Whether a Slurm job, given as "cluster/id" and the user id of its processes, is over; None: not known.
JobIsOver = Callable[[str, int], bool | None]


def unknown(job: str, uid: int) -> None:
    """Nobody to ask."""


@dataclass(frozen=True)
class Holder:
    """Who holds, or held, a run folder.

    Attributes:
        host, user, since: for people.
        place: names the process table that `processes` are in: host, boot and pid namespace.
        uid: of the processes; those of others may be hidden.
        processes: process id -> its start: rank 0, and the launcher that ends the other ranks.
        job, restart: Slurm's cluster and job id, and how often the job was requeued; "" outside of one.
        released: it has ended well.
    """

    host: str
    user: str
    since: str
    place: str
    uid: int
    processes: dict[str, str]
    job: str = ""
    restart: int = 0
    released: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        first = next(iter(self.processes), "?")
        job = f" in Slurm job {self.job.rpartition('/')[2]}" if self.job else ""
        return f"process {first} of {self.user} on {self.host}{job}, since {self.since}"


def this_process(launcher: int | None, environment: Mapping[str, str] = os.environ) -> Holder:
    """This process as a holder.

    Args:
        launcher: process id of the program that ends the other ranks with this one, if there is one.
        environment: Slurm's variables are read.
    """
    pids = [os.getpid()] + ([] if launcher is None else [launcher])
    job = environment.get("SLURM_JOB_ID", "")
    return Holder(
        host=os.uname().nodename,
        user=_user(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        place=_place(),
        uid=os.getuid(),
        processes={str(pid): _start_of(pid) or "" for pid in pids},
        job=f"{environment.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


class RunLock:
    """The right to write a run folder.

    Each holder makes the next of the numbered files in `RUN/.lock`, exclusively, so that of two starts one
    wins; the highest number holds. A file that was highest is never removed before a higher one is there, so
    whoever judged an older holder dead cannot take the lock from its successor. A thread touches the file
    every `BEAT_SECONDS`; it ends the process when somebody has taken over.

    Args:
        run_dir: the run folder, which exists.
        holder: of this process.
        job_is_over: asks Slurm.
        key: the config key or option that names the folder, for messages.
    """

    def __init__(
        self, run_dir: Path | str, holder: Holder, job_is_over: JobIsOver = unknown, key: str = "run.dir"
    ) -> None:
        self.folder, self.key = Path(run_dir) / LOCK, key
        self.holder, self._job_is_over = holder, job_is_over
        self._number = 0
        self._asked: dict[str, bool] = {}
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock, over from a dead holder too.

        A holder is dead when its processes are gone (same host), when its Slurm job is over or has been
        requeued as this one, or when it gave no sign of life for `DEAD_SECONDS`. Where only the last can
        tell, this waits for the next sign.

        Raises:
            RunFolderError: another process holds it; says which, where and since when.
        """
        self.folder.mkdir(exist_ok=True)
        while True:
            number = _newest(self.folder)
            if number and not self._is_dead(number):
                raise RunFolderError(self._refusal(number))
            if self._claim(number + 1):
                break
        self._number = number + 1
        for path in self.folder.iterdir():
            if _is_number(path.name) and int(path.name) < self._number:
                path.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="medvlp-lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back; the next start needs to ask nobody whether this process lives."""
        self._ended.set()
        if self._number and _newest(self.folder) == self._number:
            _mark_released(self.folder / str(self._number), self.holder)

    def _claim(self, number: int) -> bool:
        path = self.folder / str(number)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.holder)))
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        # Only where others took over twice since `number` was chosen is a higher one there by now.
        return _newest(self.folder) == number

    def _is_dead(self, number: int) -> bool:
        path = self.folder / str(number)
        first, told = _modified(path), False
        while True:
            holder, modified = _read(path), _modified(path)
            if modified is None or (holder is not None and self._is_known_dead(holder)):
                return True
            if holder is not None and _lives(holder):
                return False
            if self._now() - modified / 1e9 > DEAD_SECONDS:
                logger.warning("%s gave no sign of life for %g s: taking over", _name(holder), DEAD_SECONDS)
                return True
            if modified != first:
                return False
            if not told:
                logger.info("%s may have ended: waiting for a sign of life", _name(holder))
                told = True
            time.sleep(_LOOK_SECONDS)

    def _is_known_dead(self, holder: Holder) -> bool:
        if holder.released or _is_gone(holder):
            return True
        if not holder.job:
            return False
        if holder.job == self.holder.job:
            return self.holder.restart > holder.restart
        if holder.job not in self._asked:
            self._asked[holder.job] = self._job_is_over(holder.job, holder.uid) is True
        return self._asked[holder.job]

    def _now(self) -> float:
        """The file server's clock: those of two hosts may differ."""
        probe = self.folder / f"clock-{self.holder.host}-{os.getpid()}"
        probe.write_bytes(b"")
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def _refusal(self, number: int) -> str:
        holder = _read(self.folder / str(number))
        return (
            f"{self.key}={self.folder.parent} is being written by {_name(holder)}; two in one folder would "
            f"mix their files: wait for its end or stop it, or choose another {self.key}"
        )

    def _beat(self) -> None:
        path, touched = self.folder / str(self._number), time.time()
        while not self._ended.wait(BEAT_SECONDS):
            try:
                newest = _newest(self.folder)
                if newest > self._number:
                    self._lose(newest, time.time() - touched)
                os.utime(path)
                touched = time.time()
            except OSError as error:  # a file server that does not answer now may at the next beat
                logger.warning("the lock %s cannot be touched: %s", path, error.strerror)

    def _lose(self, newest: int, silent: float) -> None:
        """End this process, whose last sign of life was `silent` seconds ago.

        What the new holder went by (its patience, what Slurm said) is not known here.
        """
        if self._ended.is_set():
            return
        print(
            f"error: {_name(_read(self.folder / str(newest)))} has taken over "
            f"{self.key}={self.folder.parent}, for it took this process for dead: it was stopped, cut off "
            "from the folder's file system, or its Slurm job is said to be over. The last sign of life it "
            f"gave was {max(silent, 0):.0f} s ago; it ends",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RunFolderError.exit_code)


def release_after(run_dir: Path | str, launcher: int) -> None:
    """Give back what a rank held that this launcher has seen end, in whatever way."""
    folder = Path(run_dir) / LOCK
    number = _newest(folder)
    holder = _read(folder / str(number)) if number else None
    own = holder is not None and holder.place == _place() and str(launcher) in holder.processes
    if holder is not None and own and not holder.released:
        _mark_released(folder / str(number), holder)


def _mark_released(path: Path, holder: Holder) -> None:
    try:
        atomic_write(path, json.dumps(asdict(holder) | {"released": True}).encode())
    except DataError as error:  # the end of the process tells the same
        logger.warning("%s", error)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _newest(folder: Path) -> int:
    """The highest number in the lock folder; 0 without any."""
    try:
        return max((int(path.name) for path in folder.iterdir() if _is_number(path.name)), default=0)
    except FileNotFoundError:
        return 0


def _read(path: Path) -> Holder | None:
    """Who wrote the file; None while it is not yet, or no longer, whole."""
    try:
        content = parse_json(read_limited(path, _LIMIT), _LIMIT)
        if not isinstance(content, dict):
            return None
        names = {field.name for field in fields(Holder)}
        holder = to_record({name: value for name, value in content.items() if name in names}, Holder)
    except (OSError, JsonError):
        return None
    told = (holder.host, holder.user, holder.since, holder.job)  # stand in messages
    known = all(_is_number(pid) and len(pid) < 10 for pid in holder.processes)
    return holder if known and all(text.isprintable() for text in told) else None


def _modified(path: Path) -> int | None:
    """Time of the last sign of life in ns; None when the file is gone, or is none.

    The file is opened, because NFS asks the server then and else may answer from memory for a minute.
    """
    try:
        descriptor = open_regular(path)
    except (FileNotFoundError, JsonError):
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _name(holder: Holder | None) -> str:
    return "a process that left no name" if holder is None else holder.name


def _lives(holder: Holder) -> bool:
    """Whether rank 0 is seen to be alive; False also where it cannot be seen."""
    if holder.place != _place() or not holder.processes:
        return False
    pid, start = next(iter(holder.processes.items()))
    return start != "" and _start_of(int(pid)) == start


def _is_gone(holder: Holder) -> bool:
    """Whether rank 0 and its launcher are seen to have ended; False also where they cannot be seen."""
    if holder.place != _place() or holder.uid != os.getuid():  # another user's may be hidden (hidepid)
        return False
    return all(_start_of(int(pid)) != start for pid, start in holder.processes.items())


def _start_of(pid: int) -> str | None:
    """What tells a process from a later one with its number; None when it has ended."""
    if sys.platform.startswith("linux"):
        try:
            state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        # Ticks since boot, which no correction of the clock moves.
        return None if state in "ZX" else values[18]
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.NoSuchProcess:
        return None


def _place() -> str:
    parts = [os.uname().nodename]
    if sys.platform.startswith("linux"):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())

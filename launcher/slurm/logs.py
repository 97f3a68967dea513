"""Output files of a run's jobs: the last lines, what follows, and the lines of one rank."""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launcher.run_state import SLURM_FOLDER
from shards.errors import MedvlpError

_POLL_SECONDS = 0.5
#: How often Slurm is asked whether the job is over.
_ASK_SECONDS = 5.0
_FILE = re.compile(r"job-(\d+)(?:[_+](\d+))?\.out")
_RANK = re.compile(r"(?:\d\d:\d\d:\d\d )?rank (\d+)\b")


class LogError(MedvlpError):
    """There is no output to show."""

    exit_code = 4


def log_files(folder: Path, job_id: int | None, task: int | None = None) -> list[Path]:
    """Output files of a job, or of the newest one that has any: one, or one for each task of an array.

    Args:
        task: only this one of the array.

    Raises:
        LogError: nothing has been written yet.
    """
    found = _outputs(folder, task)
    chosen = job_id if job_id is not None else max(found, default=None)
    if chosen is None or chosen not in found:
        of_array = "" if task is None else f"_{task}"
        which = "no job has" if chosen is None else f"job {chosen}{of_array} has not"
        raise LogError(f"{which} written to {folder / SLURM_FOLDER} yet; see `medvlp jobs {folder}`")
    return sorted(found[chosen], key=lambda path: (len(path.name), path.name))


def _outputs(folder: Path, task: int | None) -> dict[int, list[Path]]:
    """Job (or array) id -> its output files, or only those of a task."""
    found: dict[int, list[Path]] = {}
    for path in (folder / SLURM_FOLDER).glob("job-*.out"):
        match = _FILE.fullmatch(path.name)
        if match and (task is None or match[2] == str(task)):
            found.setdefault(int(match[1]), []).append(path)
    return found


def wait_for_output(
    folder: Path,
    job_id: int,
    is_over: Callable[[], bool],
    say: Callable[[str], None],
    task: int | None = None,
) -> None:
    """Wait until a job has begun to write, or is over without having done so.

    Args:
        task: only this one of the array counts.
        is_over: asks Slurm whether the job has ended for good.
        say: receives one line if there is something to wait for.
    """
    said = False
    while job_id not in _outputs(folder, task) and not is_over():
        if not said:
            say(f"job {job_id} has not started yet (medvlp jobs); Ctrl-C ends this waiting, not the job")
        said = True
        time.sleep(_ASK_SECONDS)


def tail(path: Path, count: int, rank: int | None) -> tuple[list[str], int]:
    """The last `count` whole lines (of one rank), and the place in bytes where the next line begins."""
    kept: deque[str] = deque(maxlen=count)
    position = 0
    with path.open("rb") as file:
        for data in file:
            if data.endswith(b"\n"):
                position += len(data)
                kept.extend(of_rank([data.decode("utf-8", errors="replace").rstrip("\r\n")], rank))
    return list(kept), position


def of_rank(lines: Iterable[str], rank: int | None) -> Iterator[str]:
    """The lines of one rank, or all of them for None.

    All ranks write to one file. Rank 0's lines have no mark; a line of rank r begins with "rank r" behind its
    time (see `medvlp.training.run.configure_logging`). What belongs to nobody counts as rank 0's.
    """
    for line in lines:
        match = _RANK.match(line)
        if rank is None or (int(match[1]) if match else 0) == rank:
            yield line


def follow(path: Path, position: int, is_over: Callable[[], bool]) -> Iterator[str]:
    """Lines from a place in bytes on, as they are written; ends when the job is over.

    A requeued job goes on writing to the same file, so following goes on too.

    Args:
        path: an output file.
        position: where to begin, at the beginning of a line.
        is_over: asks Slurm whether the job has ended for good.
    """
    asked, over, rest = time.monotonic(), is_over(), b""
    while True:
        if path.stat().st_size < position:  # cut or replaced
            position, rest = 0, b""
        with path.open("rb") as file:
            file.seek(position)
            data = file.read()
        position += len(data)
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in lines)
        if over:  # it was before this was read
            if rest:
                yield rest.decode("utf-8", errors="replace")
            return
        if time.monotonic() - asked >= _ASK_SECONDS:
            over, asked = is_over(), time.monotonic()
        elif not lines:
            time.sleep(_POLL_SECONDS)

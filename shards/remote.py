"""Remote files, read by the program that speaks their protocol; never waited for without an end.

A program and not a library for each protocol: curl, aws and gsutil know proxies, credentials and redirects,
and only another process can be ended wherever it waits.
"""

import contextlib
import io
import logging
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO

import xxhash

from shards.errors import UnavailableError

logger = logging.getLogger(__name__)

#: A file is given up where it brings less than this for so long; how often it is tried, with which pauses.
SLOWEST_BYTES, STALL_SECONDS = 1024, 60.0
TRIES, PAUSE_SECONDS = 3, 1.0
_BLOCK = 1 << 20
#: The words of a curl that was told that the file does not exist, or is not for us.
_FINAL = re.compile(r"error: 4(?!08|25|29)\d\d")
_CURL = (
    "curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--proto-redir", "=http,https",
)  # fmt: skip
_PROGRAMS: dict[str, tuple[str, ...]] = {
    "http": _CURL,
    "https": _CURL,
    "s3": ("aws", "s3", "cp", "--only-show-errors"),
    "gs": ("gsutil", "-q", "cat"),
}


class RemoteError(UnavailableError):
    """A remote file cannot be read: not a corrupt sample, which another one could replace."""


class _AttemptError(Exception):
    """Why one try failed, and whether another can help."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


def download(url: str, target: BinaryIO, most: int, stall_seconds: float = STALL_SECONDS) -> str:
    """Write a remote file to `target`.

    Args:
        url: http, https, s3, gs, or `pipe:` and a shell command.
        target: an empty file, which each try begins anew.
        most: bytes it may have.
        stall_seconds: a try ends when fewer than `SLOWEST_BYTES` a second have come for so long.

    Returns:
        the hash of the content, as the index holds it.

    Raises:
        RemoteError: it cannot be read to its end in `TRIES` tries; says why.
    """
    for number in range(1, TRIES + 1):
        digest, size = xxhash.xxh3_128(), 0
        try:
            for block in _read(url, stall_seconds):
                size += len(block)
                if size > most:
                    raise _AttemptError(f"it has more than the {most} bytes it may have", final=True)
                digest.update(block)
                target.write(block)
            if not size:
                raise _AttemptError("nothing came back")
        except _AttemptError as error:
            target.seek(0)
            target.truncate()
            if error.final or number == TRIES:
                tries = f" ({number} tries)" if number > 1 else ""
                raise RemoteError(f"cannot read {url}: {error}{tries}") from None
            logger.warning("reading %s failed: %s; try %d of %d follows", url, error, number + 1, TRIES)
            time.sleep(number * PAUSE_SECONDS)
        else:
            break
    return f"xxh3:{digest.hexdigest()}"


def read_remote(url: str, most: int, stall_seconds: float = STALL_SECONDS) -> bytes:
    """The content of a remote file of at most `most` bytes; arguments and errors as `download`."""
    content = io.BytesIO()
    download(url, content, most, stall_seconds)
    return content.getvalue()


def _read(url: str, stall_seconds: float) -> Iterator[bytes]:
    """The blocks of one try."""
    with tempfile.TemporaryFile() as messages, _program(url, stall_seconds, messages) as process:
        output = process.stdout
        assert output is not None
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            since, came = time.monotonic(), 0
            while True:
                waited = time.monotonic() - since
                if waited >= stall_seconds:
                    if came < SLOWEST_BYTES * stall_seconds:
                        raise _AttemptError(f"only {came} bytes came in {waited:.0f} s (data.stall_seconds)")
                    since, came, waited = time.monotonic(), 0, 0.0
                if not selector.select(stall_seconds - waited):
                    continue
                block = os.read(output.fileno(), _BLOCK)
                if not block:
                    break
                came += len(block)
                read = time.monotonic()
                yield block
                since += time.monotonic() - read  # the reader's own time (a slow disk) is not the server's
        try:
            code = process.wait(stall_seconds)
        except subprocess.TimeoutExpired:
            raise _AttemptError(f"{process.args!s:.100} does not end") from None
        if code:
            raise _failure(process, code, messages)


@contextlib.contextmanager
def _program(url: str, stall_seconds: float, messages: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """The process whose output is the file; it and its children are gone after the block."""
    scheme, _, rest = url.partition(":")
    command: str | list[str] = rest
    if scheme != "pipe":
        if scheme not in _PROGRAMS:
            known = ", ".join([*_PROGRAMS, "pipe"])
            raise _AttemptError(f"no program reads {scheme}:; there are {known}", final=True)
        command = [*_PROGRAMS[scheme], url, *(["-"] if scheme == "s3" else [])]
    if scheme in ("http", "https"):  # so that it ends by itself when this process is killed
        speed = ["--speed-time", f"{2 * stall_seconds + 1:.0f}", "--speed-limit", str(SLOWEST_BYTES)]
        command = [*command, "--connect-timeout", f"{stall_seconds:.0f}", *speed]
    try:
        process = subprocess.Popen(
            command, shell=scheme == "pipe", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=messages, start_new_session=True, bufsize=0,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise _AttemptError(f"the program {error.filename!r} is not installed", final=True) from None
    except OSError as error:
        raise _AttemptError(f"its program cannot be started: {error.strerror}", final=True) from None
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _failure(process: subprocess.Popen[bytes], code: int, messages: BinaryIO) -> _AttemptError:
    messages.seek(0)
    lines = messages.read(10_000).decode(errors="replace").splitlines()
    said = next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
    program = process.args if isinstance(process.args, str) else str(process.args[0])  # type: ignore[index]
    name = program.split()[0] if program.split() else "the program"
    ending = f"{name} ended with code {code}" if code > 0 else f"{name} was killed by signal {-code}"
    return _AttemptError(said[:200] or ending, final=bool(_FINAL.search(said)))

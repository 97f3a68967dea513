"""Requests to save and stop: signals, and the end of the time. The ranks agree on one between two steps."""

import os
import signal
import socket
import threading
import time
import weakref
from types import FrameType, TracebackType
from typing import Any, Self

from medvlp import distributed

#: Exit code of a run that saved a checkpoint and stopped on request (EX_TEMPFAIL: start it again).
EXIT_INTERRUPTED = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

#: A second signal so soon after the first is the same request (Ctrl-C reaches launcher and ranks at once).
SAME_REQUEST_SECONDS = 1.0

#: However often they come, they are one request: Slurm sends its warning to every process of a step, and the
#: launcher and a container pass theirs on to the ranks, on a busy machine seconds later.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)

#: Seconds the listening thread gets to end; it has nothing to do then.
_THREAD_SECONDS = 5.0

#: What a rank says instead of a signal's number when the time is over.
_TIME_IS_OVER = 1000


class Interrupts:
    """Context manager that catches `SIGNALS`; the previous handlers are restored on leaving.

    The first signal asks for a checkpoint between two steps. A second SIGTERM or SIGINT ends the
    process at once with 128 + its number. A thread listens for them, so that this works while the main
    thread waits in a collective or for a disk, where Python runs no signal handlers.

    Args:
        max_minutes: time from entering to the request that no signal makes; None for no limit. Rank 0's
            clock counts.

    Attributes:
        stopped_by: what all ranks agreed on, or None: the name of a signal, or "train.max_minutes".
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.stopped_by: str | None = None
        self.max_minutes = max_minutes
        self._received = 0
        self._received_at = 0.0
        self._started = time.monotonic()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._listening, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _leave_to_thread) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="medvlp-signals", daemon=True)
        self._thread.start()
        _active.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.discard(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        # Closing would not end the thread: a forked data worker may hold copies of both ends.
        self._writing.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=_THREAD_SECONDS)
        self._close()

    def _close(self) -> None:
        self._writing.close()
        self._listening.close()

    def _listen(self) -> None:
        while numbers := self._listening.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = number, now
        elif number not in WARNINGS and now - self._received_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def proposal(self, step: int) -> list[int]:
        """This rank's wish to stop, for `medvlp.training.consensus`: the signal's number, 0 for none."""
        over = not self._received and distributed.is_main() and self._time_is_over()
        return [_TIME_IS_OVER if over else self._received]

    def agree(self, greatest: list[int], step: int) -> bool:
        """Take the wish of all ranks into `stopped_by`; training never waits for it."""
        (number,) = greatest
        if number:
            over = number == _TIME_IS_OVER
            self.stopped_by = "train.max_minutes" if over else signal.Signals(number).name
        return True

    def _time_is_over(self) -> bool:
        return self.max_minutes is not None and time.monotonic() - self._started >= 60 * self.max_minutes


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The handler that makes Python write the signal's number to the thread's socket."""


_active: weakref.WeakSet[Interrupts] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked process must neither hear nor hold open its parent's socket."""
    for interrupts in list(_active):
        signal.set_wakeup_fd(-1)
        interrupts._close()
    _active.clear()


os.register_at_fork(after_in_child=_forget_in_child)

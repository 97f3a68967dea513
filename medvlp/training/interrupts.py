"""Signals that ask a run to save and stop. A handler only notes them; the ranks agree between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from medvlp import distributed

#: Exit code of a run that saved a checkpoint and stopped on request (EX_TEMPFAIL: start it again).
EXIT_INTERRUPTED = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interrupts:
    """Context manager that catches `SIGNALS`; the previous handlers are restored on leaving.

    Attributes:
        stopped_by: name of the signal all ranks agreed on, or None.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. All ranks call this together."""
        number = int(distributed.greatest_over_ranks([float(self._received)])[0])
        if number:
            self.stopped_by = signal.Signals(number).name
        return number != 0

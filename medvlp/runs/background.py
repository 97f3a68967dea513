"""A disk operation in a thread of its own, tried again when the disk refuses."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from medvlp.runs.state_files import WriteGivenUpError

logger = logging.getLogger(__name__)


class DiskTask:
    """Runs `action` in a daemon thread, from the moment it is made.

    Args:
        action: takes a function that says whether it should give up; may raise OSError and be called again.
        retries: further tries after a refusal.
        retry_seconds: pause before the first of them, doubled before each next one.

    Attributes:
        result: what `action` returned.
        problem: why it failed for good, or None.
        error: an exception that is no refusal of the disk, to be raised by whoever asks for the result.
    """

    def __init__(self, action: Callable[[Callable[[], bool]], Any], retries: int, retry_seconds: float):
        self.result: Any = None
        self.problem: str | None = None
        self.error: Exception | None = None
        self._action, self._retries, self._pause = action, retries, retry_seconds
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for attempt in range(self._retries + 1):
            try:
                self.result = self._action(self._given_up.is_set)
            except WriteGivenUpError as error:
                self.problem = str(error)
                return
            except OSError as error:
                reason = error.strerror or str(error)
                if attempt == self._retries or self._given_up.is_set():
                    tries = f" after {attempt + 1} tries" if attempt else ""
                    self.problem = f"{reason}{tries}"
                    return
                pause = self._pause * 2**attempt
                logger.warning("writing the checkpoint failed (%s); trying again in %.1f s", reason, pause)
                self._given_up.wait(pause)
            except Exception as error:
                self.error, self.problem = error, f"{type(error).__name__}: {error}"
                return
            else:
                return

    @property
    def finished(self) -> bool:
        """Whether the thread has ended, in whatever way."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the end, but not longer than `seconds`."""
        self._thread.join(seconds)

    def give_up(self) -> None:
        """Ask the action to end early and wait until it has."""
        self._given_up.set()
        started = time.monotonic()
        self._thread.join(10.0)
        if not self.finished:
            logger.warning("a write still hangs after %.0f s", time.monotonic() - started)

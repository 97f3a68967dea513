"""One checkpoint at a time, written behind the training loop and finished when all ranks' files are durable.

The threads never use a process group: a collective of theirs could meet another of the loop's in a different
order on another rank. The ranks tell each other between two steps (`poll`), where they meet anyway.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medvlp import distributed
from medvlp.config import CheckpointConfig
from medvlp.runs import checkpoint_files
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import Manifest, step_folder
from medvlp.runs.state_files import StateFile, WriteGivenUpError

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


#: Longest pause between two looks at the other ranks while waiting for a write, in seconds. Short against the
#: timeout of a collective: a slow disk must not look like a lost rank.
_LOOK_EVERY = 0.5


class CheckpointWriter:
    """Two stages, each in the background: all ranks write their files, then rank 0 finishes the checkpoint.

    Args:
        checkpoints: the run's folder of checkpoints.
        config: retries, and which checkpoints are kept.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig):
        self.checkpoints = checkpoints
        self.config = config
        self._task: DiskTask | None = None
        self._manifest: Manifest | None = None
        self._finishing = False
        self._started = 0.0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way; the same on all ranks."""
        return self._manifest is not None

    def clear(self) -> None:
        """Delete what a start that was killed left half-written; all ranks call this together.

        Raises:
            CheckpointError: it cannot be deleted.
        """
        problem = None
        if distributed.is_main():
            try:
                checkpoint_files.clear_partial(self.checkpoints)
            except OSError as error:
                problem = error.strerror or str(error)
        problem = distributed.broadcast_object(problem)
        if problem:
            raise CheckpointError(
                f"left-over .step-*.partial folders in {self.checkpoints} cannot be deleted: {problem}"
            )

    def start(self, files: Sequence[StateFile], manifest: Manifest) -> None:
        """Begin to write; the files' tensors must not change until `busy` is false again.

        Args:
            files: this rank's, below `checkpoint_files.partial_folder`.
            manifest: complete but for the files' entries.
        """
        assert not self.busy, "the last checkpoint must be finished first"
        folder = checkpoint_files.partial_folder(self.checkpoints, manifest.step)
        self._manifest, self._started, self._finishing = manifest, time.perf_counter(), False
        self._task = self._run(lambda given_up: checkpoint_files.write(folder, files, given_up))

    def poll(self) -> None:
        """Bring the checkpoint on its way a stage further where all ranks are ready; a collective.

        Raises:
            CheckpointError: on all ranks, when the disk refused a rank for good. Nothing half-written stays.
        """
        if self._manifest is None:
            return
        task = self._task
        if distributed.greatest_over_ranks([float(task is not None and not task.finished)])[0]:
            return
        manifest, self._task = self._manifest, None
        problems = distributed.gather_objects(None if task is None else task.problem)
        if any(problems):
            self._fail(problems, None if task is None else task.error)
        if self._finishing:
            self._manifest = None
            size = sum(entry["bytes"] for entry in manifest.files.values()) / 1e6
            seconds = time.perf_counter() - self._started
            logger.info("checkpoint %s: %.1f MB in %.1f s", step_folder(manifest.step), size, seconds)
            return
        assert task is not None
        entries: dict[str, dict[str, Any]] = {}
        for of_rank in distributed.gather_objects(task.result):
            entries |= of_rank
        manifest.files = dict(sorted(entries.items()))
        self._finishing = True
        if distributed.is_main():
            folder = checkpoint_files.partial_folder(self.checkpoints, manifest.step)
            self._task = self._run(lambda given_up: checkpoint_files.commit(folder, manifest, self.config))

    def wait(self, alive: Callable[[str, int], None] = lambda place, step: None) -> None:
        """`poll` until nothing is on its way; all ranks call this together.

        Args:
            alive: told at every look that the ranks wait for a disk and not for one another.

        Raises:
            CheckpointError: see `poll`.
        """
        pause = 0.001
        while self._manifest is not None:
            alive("waiting for the disk", self._manifest.step - 1)
            if self._task is not None:
                self._task.wait(pause)
            else:
                time.sleep(pause)
            pause = min(2 * pause, _LOOK_EVERY)
            self.poll()

    def abandon(self) -> None:
        """End this rank's thread; what is not finished stays unfinished. Needs no other rank."""
        if self._task is not None:
            self._task.give_up()
        self._task, self._manifest = None, None

    def _run(self, action: Callable[[Callable[[], bool]], Any]) -> DiskTask:
        return DiskTask(action, self.config.retries, self.config.retry_seconds)

    def _fail(self, problems: list[str | None], error: Exception | None) -> None:
        assert self._manifest is not None
        folder = checkpoint_files.partial_folder(self.checkpoints, self._manifest.step)
        if distributed.is_main():  # it would be in the way of making room
            shutil.rmtree(folder, ignore_errors=True)
        step, self._manifest = self._manifest.step, None
        rank = next(rank for rank, problem in enumerate(problems) if problem)
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {self.checkpoints}: {problems[rank]} (rank "
            f"{rank}). Earlier checkpoints are untouched; make room or give another run.dir, and start again"
        ) from error

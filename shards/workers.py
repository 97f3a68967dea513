"""Runs a function over tasks in processes that end when their parent does."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

import cv2

from shards.errors import MedvlpError

Task = TypeVar("Task")
Result = TypeVar("Result")

_job: tuple[Callable[[Any, Any], Any], Any] | None = None


def default_workers() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def run_tasks(
    function: Callable[[Any, Task], Result], shared: Any, tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Yield `function(shared, task)` for all tasks, as they finish; `shared` is sent to each process once.

    With one worker everything runs in this process, in order.

    Raises:
        MedvlpError: a worker process died; errors of `function` are raised as they are.
    """
    tasks = list(tasks)
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield function(shared, task)
        return
    # Not forked: the parent may run threads (Arrow, tokenizers), whose locks a fork would copy in any state.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(function, shared)
    )
    try:
        for future in as_completed([executor.submit(_run, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise MedvlpError(
            "a worker process died (out of memory?); run the same command again to go on, with fewer "
            "--workers if need be"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _job
    _job = (function, shared)
    cv2.setNumThreads(0)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent stops, and the workers with it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run(task: Any) -> Any:
    assert _job is not None, "called outside a worker process"
    function, shared = _job
    return function(shared, task)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)

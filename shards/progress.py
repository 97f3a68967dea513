"""How far long work is: a bar with the time left on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

#: Seconds between two lines in a log; work that takes less leaves none.
LOG_SECONDS = 30.0


def tracked(
    items: Iterable[Item],
    what: str,
    total: int,
    done: int = 0,
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Yield the items, and tell on stderr how many of them are done.

    Args:
        what: is done, such as "verifying shards".
        total: number of all. done: of them, those that an earlier run has done.
        size: how many an item stands for, such as the samples of a batch.
    """
    with meter(what, total, done) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextmanager
def meter(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """For work that is no loop: `advance(count)` tells that so many more are done; see `tracked`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total, done).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total, completed=done)
        yield lambda count: progress.advance(bar, count)


class _Lines:
    """Plain lines, `LOG_SECONDS` apart."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self._what, self._total, self._before, self._done = what, total, done, done
        self._started = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        moment = time.monotonic()
        if moment - self._said >= LOG_SECONDS and self._before < self._done < self._total:
            self._said = moment
            passed, done = moment - self._started, self._done - self._before
            left = timedelta(seconds=round(passed * (self._total - self._done) / done))
            line = f"{self._what}: {self._done:,} of {self._total:,}, about {left} left"
            print(line, file=sys.stderr, flush=True)

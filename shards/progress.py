"""How far long work is: a bar with the time left on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _with_lines(items, what, total, done, size)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(bar, size(item))


def _with_lines(
    items: Iterable[Item], what: str, total: int, done: int, size: Callable[[Item], int]
) -> Iterator[Item]:
    started = said = time.monotonic()
    before = done
    for item in items:
        yield item
        done += size(item)
        moment = time.monotonic()
        if moment - said >= LOG_SECONDS and done < total:
            said = moment
            left = timedelta(seconds=round((moment - started) * (total - done) / (done - before)))
            print(f"{what}: {done:,} of {total:,}, about {left} left", file=sys.stderr, flush=True)

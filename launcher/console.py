"""What commands say: names and configs of strangers must do nothing to the terminal that shows them."""

import sys
from collections.abc import Iterable

import typer
from rich import console
from rich.segment import Segment

from shards.errors import without_controls


def echo(text: object = "", err: bool = False) -> None:
    """A line on stdout or stderr, as it is but for control characters."""
    typer.echo(without_controls(str(text)), err=err)


class Console(console.Console):
    """Rich's console, which passes on the control characters of what it is given, without them."""

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See rich. Its own movements of the cursor are segments marked as such."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)


def for_tables(width: int) -> Console:
    """Stdout; a pipe or log file has no width, so tables take this one there."""
    return Console() if sys.stdout.isatty() else Console(width=width)

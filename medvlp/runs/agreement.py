"""What goes wrong on one rank is raised on all: a message of one that ends alone may be shown by nobody."""

from collections.abc import Callable
from typing import TypeVar

from medvlp import distributed
from medvlp.runs.errors import AgreedError
from shards.errors import MedvlpError

Done = TypeVar("Done")


def together(action: Callable[[], Done]) -> Done:
    """Do something on all ranks that call this; the first one's error is raised on all.

    Args:
        action: a rank that fails must not skip a collective in it: the others would wait there.

    Raises:
        AgreedError: some rank met a `MedvlpError`; of its text and exit code.
    """
    done: list[Done] = []
    own = told = None
    try:
        done.append(action())
    except MedvlpError as error:
        own, told = error, [str(error), error.exit_code]
    failed = next((found for found in distributed.gather_objects(told) if found), None)
    if failed is None:
        return done[0]
    if isinstance(own, AgreedError) and told == failed:
        raise own
    raise AgreedError(failed[0], exit_code=failed[1]) from own

"""The model hub: quiet while it is tried, one clear sentence when it cannot be reached."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

#: Parts of the messages of transformers and huggingface_hub about a hub that does not answer.
_UNREACHABLE = (
    "couldn't connect to",
    "trying to locate the file on the Hub",
    "Connection error",
    "offline mode",
)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from logging two lines for each of its retries."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_reason(error: BaseException) -> str:
    """Why something could not be loaded, on one line; for an unreachable hub also how to go on."""
    text = " ".join(str(error).split())
    if any(part in text for part in _UNREACHABLE):
        return (
            "the hub cannot be reached and its cache does not hold it; give a local folder, or fill the "
            "cache (`hf download NAME`, HF_HOME says where) on a machine with a network"
        )
    return text

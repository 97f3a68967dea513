"""Batches on the device; on a GPU each is copied while the one before it is computed."""

from collections.abc import Iterator

import torch

from medvlp.data.batch import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, Batch]]:
    """Each batch with its copy on the device (on the CPU: with itself)."""
    if device.type == "cuda":
        return _copied_ahead(batches, device)
    return ((batch, batch.to(device)) for batch in batches)


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, Batch]]:
    """A batch is handed out as soon as the next one is on its way, on a stream of its own.

    So an error in reading the next one is met one batch early; it is raised where that one's turn is.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    coming: tuple[Batch, Batch, torch.cuda.Event] | None = None
    failure: Exception | None = None
    while failure is None:
        started = None
        try:
            batch = next(batches)
            with torch.cuda.stream(stream):
                started = batch, batch.to(device), stream.record_event()
        except Exception as error:
            failure = error
        if coming is not None:
            host, there, copied = coming
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            there.record_stream(computing)  # else its memory would go to a later copy before it is read
            yield host, there
        coming = started
    if not isinstance(failure, StopIteration):
        raise failure

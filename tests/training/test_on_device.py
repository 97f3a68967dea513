"""Batches on their way to the device; CUDA's streams are faked, its tensors are torch's fake ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from medvlp.data.batch import Batch
from medvlp.training import on_device as module
from medvlp.training import trainer
from medvlp.training.on_device import on_device
from shards.errors import DataError
from tests.training.tiny import random_batch

CUDA = torch.device("cuda", 0)


class Streams:
    """Two streams, and what is asked of them, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.now = "computing"

    def stream(self, name: str) -> Any:
        def record_event() -> str:
            self.asked.append(f"{name} records")
            return f"event {self.asked.count(f'{name} records') - 1}"

        return mock.Mock(
            spec=["record_event", "wait_event"],
            record_event=record_event,
            wait_event=lambda event: self.asked.append(f"{name} waits for {event}"),
        )

    @contextmanager
    def inside(self, stream: Any) -> Iterator[None]:
        self.now = "copying"
        yield
        self.now = "computing"

    def to(self, batch: Batch, device: torch.device) -> Batch:
        self.asked.append(f"{self.now}: {batch.keys[0]}")
        return batch._map(lambda tensor: tensor.to(device))

    @contextmanager
    def faked(self) -> Iterator[None]:
        computing = self.stream("computing")
        parts: dict[str, Any] = {"Stream": lambda device: self.stream("copying"), "stream": self.inside}
        self.used: list[Any] = []
        with (
            mock.patch.multiple(torch.cuda, **parts, current_stream=lambda device: computing),
            mock.patch.object(Batch, "to", lambda batch, device: self.to(batch, device)),
            mock.patch.object(Tensor, "record_stream", lambda tensor, stream: self.used.append(stream)),
        ):
            yield


@contextmanager
def streams_and_tensors() -> Iterator[Streams]:
    """Fake streams, and tensors that can be on a GPU."""
    streams = Streams()
    with streams.faked(), FakeTensorMode(allow_non_fake_inputs=True):
        yield streams


@contextmanager
def copying_ahead() -> Iterator[None]:
    """Trainers on the CPU take their batches as those on a GPU do."""
    with Streams().faked(), mock.patch.object(trainer, "on_device", module._copied_ahead):
        yield


def numbered(count: int, error: Exception | None = None) -> Iterator[Batch]:
    for number in range(count):
        batch = random_batch(number, 2)
        batch.keys = [str(number), "other"]
        yield batch
    if error is not None:
        raise error


def test_on_the_cpu_a_batch_is_read_when_it_is_asked_for() -> None:
    read: list[str] = []

    def batches() -> Iterator[Batch]:
        for batch in numbered(3):
            read.append(batch.keys[0])
            yield batch

    host, there = next(on_device(batches(), torch.device("cpu")))
    assert read == ["0"]
    assert there.image is host.image


def test_the_next_batch_is_copied_before_one_is_handed_out() -> None:
    with streams_and_tensors() as streams:
        found = on_device(numbered(4), CUDA)
        host, there = next(found)
        assert host.keys[0] == there.keys[0] == "0"
        assert host.image.device.type == "cpu"
        assert there.image.device.type == there.text.input_ids.device.type == "cuda"
        first = ["copying: 0", "copying records", "copying: 1", "copying records"]
        assert streams.asked == [*first, "computing waits for event 0"]
        tensors = 3 + len(there.text.tensors())  # image, sample, labels, text
        assert len(streams.used) == tensors
        next(found)
        more = ["copying: 2", "copying records", "computing waits for event 1"]
        assert streams.asked[len(first) + 1 :] == more
        assert [host.keys[0] for host, _ in found] == ["2", "3"]


@pytest.mark.parametrize("ready", [0, 1, 3])
def test_an_error_of_the_data_is_met_where_its_batch_would_come(ready: int) -> None:
    with streams_and_tensors():
        found = on_device(numbered(ready, DataError("too many corrupt samples")), CUDA)
        assert [host.keys[0] for host, _ in islice(found, ready)] == [str(n) for n in range(ready)]
        with pytest.raises(DataError, match="too many corrupt samples"):
            next(found)


def test_batches_may_end() -> None:
    with streams_and_tensors():
        assert [host.keys[0] for host, _ in on_device(numbered(2), CUDA)] == ["0", "1"]
        assert not [*on_device(numbered(0), CUDA)]

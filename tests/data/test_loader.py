"""Loaders: bit-identical batches for any worker count, exact slices for any world size, exact resume."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medvlp.config import Config, TransformConfig
from medvlp.config_files import ConfigError
from medvlp.data import loader as loading
from medvlp.data.batch import Batch
from medvlp.data.loader import build_loader, data_workers, evaluation_loader
from medvlp.data.text import Tokenizer
from medvlp.data.transforms import DRAWS, SampleRandom, evaluation_view, training_view
from medvlp.data.workers import kill_workers, worker_death
from medvlp.encoders.backbones import EncoderError
from medvlp.ranks import LostPeerError
from medvlp.training.run import _named, configure_logging
from shards.errors import DataError
from shards.images import decode_image
from shards.reader import ShardReader

ConfigFactory = Callable[..., Config]
AUGMENTED = TransformConfig(scale_min=0.7, flip=0.5, brightness=0.2, contrast=0.2)


def batches(
    config: Config, tokenizer: Tokenizer, count: int, rank: int = 0, world_size: int = 1, **options: int
) -> list[Batch]:
    options = {"micro_batch": config.train.global_batch // world_size, **options}
    reader = ShardReader(config.data.root)
    loader = build_loader(config, reader, tokenizer, rank, world_size, **options)
    return list(itertools.islice(loader, count))


def assert_equal(first: Batch, second: Batch) -> None:
    assert first.keys == second.keys
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.sample, second.sample)
    assert torch.equal(first.labels.nan_to_num(9), second.labels.nan_to_num(9))
    assert first.text.lengths == second.text.lengths
    for name, value in first.text.tensors().items():
        assert torch.equal(value, second.text.tensors()[name])


def assert_concatenate(parts: Iterable[Batch], whole: Batch) -> None:
    """Local batches are padded to their own longest report, so texts are compared without padding."""
    parts = list(parts)
    assert [key for part in parts for key in part.keys] == whole.keys
    assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    assert torch.equal(torch.cat([part.sample for part in parts]), whole.sample)
    rows = [row for part in parts for row in part.text.input_ids]
    for row, (ids, mask) in enumerate(zip(whole.text.input_ids, whole.text.attention_mask, strict=True)):
        length = int(mask.sum())
        assert torch.equal(rows[row][:length], ids[:length])


def test_a_batch_is_what_the_shards_hold(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config = make_config(transform=AUGMENTED)
    reader = ShardReader(dataset)
    for step, batch in enumerate(batches(config, tokenizer, 4)):
        assert batch.image.shape == (16, 1, 56, 56)
        assert batch.image.dtype == torch.uint8
        assert batch.labels.shape == (16, len(reader.index.label_names))
        assert len(set(batch.keys)) == 16
        assert batch.skipped == 0
        random = SampleRandom(config.train.seed, epoch=step // 4)
        for row, position in enumerate(batch.sample.tolist()):
            key, data, metadata = reader.read("train", position)
            assert batch.keys[row] == key
            view = training_view(decode_image(data), 56, AUGMENTED, random.uniform(position, DRAWS))[0]
            np.testing.assert_array_equal(batch.image[row, 0].numpy(), view)
            for column, name in enumerate(reader.index.label_names):
                value = metadata["labels"].get(name)
                assert (
                    np.isnan(batch.labels[row, column])
                    if value is None
                    else batch.labels[row, column] == value
                )


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_do_not_change_a_bit(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    expected = batches(make_config(transform=AUGMENTED), tokenizer, 10)
    for workers in (1, 2, 3):
        config = make_config(transform=AUGMENTED, workers=workers)
        for first, second in zip(batches(config, tokenizer, 10), expected, strict=True):
            assert_equal(first, second)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_and_micro_batches_make_up_the_global_batch(
    make_config: ConfigFactory, tokenizer: Tokenizer, world_size: int, accumulation: int
) -> None:
    config = make_config(transform=AUGMENTED)
    expected = batches(config, tokenizer, 6)
    micro_batch = 16 // world_size // accumulation
    ranks = [
        batches(config, tokenizer, 6 * accumulation, rank, world_size, micro_batch=micro_batch)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(expected):
        parts = [
            ranks[rank][step * accumulation + k] for k in range(accumulation) for rank in range(world_size)
        ]
        assert all(len(part.keys) == micro_batch for part in parts)
        assert_concatenate(parts, whole)


@pytest.mark.parametrize("start", [1, 4, 7])
def test_resume_equals_the_uninterrupted_run(
    make_config: ConfigFactory, tokenizer: Tokenizer, start: int
) -> None:
    config = make_config(transform=AUGMENTED, workers=1)
    expected = batches(config, tokenizer, start + 3)[start:]
    for first, second in zip(batches(config, tokenizer, 3, start_step=start), expected, strict=True):
        assert_equal(first, second)


def test_epochs_differ_and_cover_the_split(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    config = make_config(tail="wrap")
    loader = build_loader(config, ShardReader(config.data.root), tokenizer, 0, 1, 16)
    steps = loader.steps_per_epoch
    both = list(itertools.islice(loader, 2 * steps))
    first, second = both[:steps], both[steps:]
    for epoch in (first, second):
        assert set(torch.cat([batch.sample for batch in epoch]).tolist()) == set(range(loader.samples))
    assert [batch.keys for batch in first] != [batch.keys for batch in second]
    views = {key: image for batch in first for key, image in zip(batch.keys, batch.image, strict=True)}
    same = [
        torch.equal(views[key], image) for b in second for key, image in zip(b.keys, b.image, strict=True)
    ]
    assert np.mean(same) < 0.2


def test_the_loader_leaves_the_default_generator_alone(
    make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    before = torch.get_rng_state()
    batches(make_config(workers=1), tokenizer, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_without_text_are_left_out_and_said(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ShardReader(own_dataset)
    silent = {0, 1, 2, 30, 50}
    for position in silent:
        tar = own_dataset / reader.locate("train", position)[0].file
        data = bytearray(tar.read_bytes())
        metadata = data.index(reader.key("train", position).encode() + b".json")
        start = data.index(b'"findings"', data.index(b'"sections"', metadata))
        data[start : start + 10] = b'"Findings"'
        tar.write_bytes(data)
    config = make_config(root=str(own_dataset), sections=["findings"], tail="wrap")
    loader = build_loader(config, ShardReader(own_dataset), tokenizer, 0, 1, 16)
    total = reader.sample_count("train")
    assert loader.samples == total - 5
    seen = torch.cat([batch.sample for batch in itertools.islice(loader, loader.steps_per_epoch)])
    assert set(seen.tolist()) == set(range(total)) - silent
    assert (
        f"5 of {total} samples of split train are not trained on: 5 have no text in the sections findings"
        in caplog.text
    )


def test_reports_that_lose_their_end_are_told(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A small dataset's vocabulary spells most words by pieces, and reports of ordinary length do not fit."""
    reader = ShardReader(dataset)
    build_loader(make_config(max_tokens=512), reader, tokenizer, 0, 1, 16)
    assert "lose their end" not in caplog.text
    loader = build_loader(make_config(max_tokens=8), reader, tokenizer, 0, 1, 16)
    total = reader.sample_count("train")
    assert f"of {total} reports of split train are longer than data.max_tokens=8 and lose" in caplog.text
    batch = next(iter(loader))
    assert (batch.text.attention_mask.sum(1) == 8).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_the_split_in_order(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, workers: int
) -> None:
    config = make_config(transform=AUGMENTED, workers=workers)
    reader = ShardReader(dataset)
    count = reader.sample_count("train")
    loader = evaluation_loader(config, reader, tokenizer, "train", batch=20)
    assert len(loader) == -(-count // 20)
    for _ in range(2):
        found = list(loader)
        assert torch.equal(torch.cat([batch.sample for batch in found]), torch.arange(count))
        assert len(found[-1].keys) == count % 20
    for i in (0, count - 1):
        stored = decode_image(reader.read("train", i)[1])
        np.testing.assert_array_equal(
            found[i // 20].image[i % 20, 0].numpy(), evaluation_view(stored, 56, "random")[0]
        )
    some = list(evaluation_loader(config, reader, tokenizer, "train", batch=2, positions=[7, 3, 5]))
    assert [batch.sample.tolist() for batch in some] == [[7, 3], [5]]


def test_workers_keep_out_of_the_signals_of_their_rank(
    make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config = make_config(workers=2)
    others = set(multiprocessing.active_children())  # a pool of an earlier test
    stream = iter(build_loader(config, ShardReader(config.data.root), tokenizer, 0, 1, 16))
    next(stream), next(stream)  # one of each worker: both have started
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    # torchrun signals the process group of a rank; a worker in it would die before the rank has saved.
    assert all(os.getpgid(worker.pid) != os.getpgid(0) for worker in workers)
    del stream
    for worker in workers:
        worker.join(timeout=100)
    assert not any(worker.is_alive() for worker in workers)


def test_iterations_of_one_loader_may_overlap(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    reader = ShardReader(make_config().data.root)
    alone = list(evaluation_loader(make_config(), reader, tokenizer, "train", 3))
    loader = evaluation_loader(make_config(workers=2), reader, tokenizer, "train", 3)
    pairs = list(zip(loader, loader, strict=True))  # two iterators, each with workers of its own
    assert len(pairs) == len(alone) > 9
    for expected, found in zip(alone, pairs, strict=True):
        assert_equal(found[0], expected)
        assert_equal(found[1], expected)


def test_datasets_travel_to_spawned_workers(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    config = make_config()
    loader = build_loader(config, ShardReader(config.data.root), tokenizer, 0, 1, 16)
    dataset = loader._loader.dataset
    copy = pickle.loads(pickle.dumps(dataset))
    request = (3, np.arange(6))
    assert_equal(copy[request], dataset[request])


def test_impossible_batches_and_splits_are_refused(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    config = make_config()
    config.train.global_batch = 500
    with pytest.raises(ConfigError, match=r"train\.global_batch \(500\) is larger than the split"):
        batches(config, tokenizer, 1)
    config.train.global_batch = 16
    for micro_batch in (6, 32):
        with pytest.raises(ConfigError, match=r"multiple of train\.micro_batch x ranks"):
            batches(config, tokenizer, 1, micro_batch=micro_batch)
    config = make_config(partitions=4)
    with pytest.raises(ConfigError, match=r"accumulation x data\.partitions \(8 x 4\)"):
        batches(config, tokenizer, 1, micro_batch=2)
    with pytest.raises(DataError, match="no split 'holdout'"):
        batches(make_config(split="holdout"), tokenizer, 1)


def test_a_killed_worker_of_an_evaluation_is_named(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    config = make_config(workers=2)
    others = set(multiprocessing.active_children())
    stream = iter(evaluation_loader(config, ShardReader(config.data.root), tokenizer, "train", 1))
    next(stream)
    victim = max(set(multiprocessing.active_children()) - others, key=lambda child: child.pid or 0)

    def kill_and_wait() -> None:
        victim.kill()
        time.sleep(100)  # its end interrupts this; the stream may have enough batches in store

    with pytest.raises(RuntimeError) as caught:
        kill_and_wait()
    named = worker_death(caught.value)
    assert named is not None
    assert f"data worker 1 (process {victim.pid}) was killed by SIGKILL" in str(named)
    assert worker_death(RuntimeError("something else")) is None
    kill_workers()
    assert not set(multiprocessing.active_children()) - others


@pytest.mark.parametrize(("cores", "workers"), [(1, 2), (6, 5), (12, 8)])
def test_beside_a_gpu_a_rank_loads_with_all_but_one_of_its_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int
) -> None:
    config = Config().data
    monkeypatch.setattr(loading, "threads_of_rank", lambda ranks: cores)
    assert data_workers(config) == 2
    monkeypatch.setattr(loading, "uses_cuda", lambda: True)
    assert data_workers(config) == workers
    config.workers = 3
    assert data_workers(config) == 3


def test_an_end_that_was_taken_for_something_else_is_named() -> None:
    """It is raised wherever the process is, also where errors are given other names."""
    for error in (
        RuntimeError("DataLoader worker (pid 7) is killed"),
        RuntimeError("Connection reset by peer"),
    ):
        taken = EncoderError("cannot take images")
        taken.__cause__ = error
        assert type(_named(taken, 1, "")) is type(_named(error, 1, "")) is not EncoderError
    taken.__cause__ = RuntimeError("sizes do not match")
    assert _named(taken, 1, "") is taken
    missed = LostPeerError("not all ranks met")
    missed.__cause__ = RuntimeError("Timed out waiting")
    assert _named(missed, 1, "") is missed


@pytest.mark.parametrize("terminal", [False, True])
def test_the_end_of_a_worker_during_a_message_is_no_error_of_logging(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(text: str) -> int:
        written.append(text)
        if len(written) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        return len(text)

    stream = SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        configure_logging(0)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            logging.getLogger("medvlp").warning("a message")
    assert "Traceback" not in "".join(written)

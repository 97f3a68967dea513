"""Remote datasets over a real HTTP server on loopback and over `pipe:` commands."""

from __future__ import annotations

import errno
import functools
import http.server
import itertools
import multiprocessing
import os
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medvlp.config import Config
from medvlp.data.cache import ShardCache, open_reader
from medvlp.data.loader import build_loader
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from shards.errors import DataError
from shards.reader import ShardReader
from shards.remote import RemoteError

ConfigFactory = Callable[..., Config]

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="WebDataset opens http with curl")


class _CountingHandler(http.server.SimpleHTTPRequestHandler):
    requests: Counter[str]

    def do_GET(self) -> None:
        self.requests[self.path.rpartition("/")[2]] += 1
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        """Keep the test output quiet."""


@pytest.fixture
def server(own_dataset: Path) -> Iterator[tuple[str, Counter[str]]]:
    """URL of `own_dataset` on a free loopback port, and the count of requests by file."""
    requests: Counter[str] = Counter()
    handler = type("Handler", (_CountingHandler,), {"requests": requests})
    site = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(own_dataset))
    )
    thread = threading.Thread(target=site.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{site.server_port}", requests
    site.shutdown()
    thread.join()
    site.server_close()


def shard_files(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in folder.glob("*.tar")}


@needs_curl
def test_a_remote_dataset_trains_like_the_local_one(
    server: tuple[str, Counter[str]], own_dataset: Path, make_config: ConfigFactory
) -> None:
    url, requests = server
    streams = []
    for root, workers in ((str(own_dataset), 0), (url, 2)):
        config = make_config(root=root, workers=workers)
        reader = open_reader(config.data)
        tokenizer = Tokenizer.load(None, root)
        loader = build_loader(config, reader, tokenizer, 0, 1, 16)
        streams.append([(batch.keys, batch.image.sum().item()) for batch in itertools.islice(loader, 6)])
    assert streams[0] == streams[1]
    assert max(count for file, count in requests.items() if file.endswith((".tar", ".idx"))) == 1


@needs_curl
def test_processes_of_a_node_download_a_shard_once(
    server: tuple[str, Counter[str]], make_config: ConfigFactory
) -> None:
    url, requests = server
    reader = open_reader(make_config(root=url).data)
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(4), context.Queue()

    def read() -> None:
        start.wait()
        answers.put(reader.read("train", 0)[0])

    processes = [context.Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    keys = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(keys) == 1
    assert requests["train-000000.tar"] == 1


@needs_curl
def test_the_least_recently_opened_shards_make_room(
    server: tuple[str, Counter[str]], own_dataset: Path, make_config: ConfigFactory, tmp_path: Path
) -> None:
    url, requests = server
    index = ShardReader(own_dataset).index
    first, second, third = index.split_shards("train")[:3]
    cache = ShardCache(url, index, tmp_path / "cache", limit=first.bytes + third.bytes + 1)
    paths = {shard.file: cache(shard.file) for shard in (first, second)}
    os.utime(paths[first.file], ns=(1, 1))
    os.utime(paths[second.file], ns=(2, 2))
    descriptor = paths[second.file].open("rb")
    cache(first.file)  # opened again, so the second is now the oldest
    cache(third.file)
    assert shard_files(tmp_path / "cache") == {first.file, third.file}
    assert descriptor.read() == (own_dataset / second.file).read_bytes()
    descriptor.close()
    assert cache(second.file).read_bytes() == (own_dataset / second.file).read_bytes()
    assert requests[second.file] == 2
    assert requests[first.file] == 1


@needs_curl
def test_content_that_differs_from_the_index_is_refused(
    server: tuple[str, Counter[str]], own_dataset: Path, make_config: ConfigFactory, tmp_path: Path
) -> None:
    url, _ = server
    reader = open_reader(make_config(root=url).data)
    tar = own_dataset / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(DataError, match=r"train-000000\.tar: the content differs from the dataset's index"):
        reader.read("train", 0)
    assert shard_files(tmp_path / "cache" / "shards") == set()
    tar.unlink()
    with pytest.raises(DataError, match=r"cannot read http://.*train-000000\.tar"):
        reader.read("train", 0)


def test_a_missing_server_is_one_clear_error(make_config: ConfigFactory) -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/index\.json"):
        open_reader(make_config(root="http://127.0.0.1:9").data)


def test_pipe_commands_and_hostile_names(
    own_dataset: Path, make_config: ConfigFactory, tmp_path: Path
) -> None:
    config = make_config(root=f"pipe:cat '{own_dataset}'/{{}}")
    reader = open_reader(config.data)
    assert reader.read("train", 3)[1] == ShardReader(own_dataset).read("train", 3)[1]
    cache = ShardCache(config.data.root, reader.index, tmp_path / "cache", limit=1)
    for name in ("../secret", "x;touch y", "unlisted.tar"):
        with pytest.raises(DataError, match="is no file of the dataset"):
            cache(name)


def test_an_opener_whose_program_is_missing_is_named(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, own_dataset: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    cache = ShardCache("s3://bucket/data", ShardReader(own_dataset).index, tmp_path / "cache", limit=1)
    with pytest.raises(DataError, match="the program 'aws' is not installed"):
        cache("train-000000.tar")


@needs_curl
def test_a_reader_with_a_cache_travels_to_workers(
    server: tuple[str, Counter[str]], make_config: ConfigFactory
) -> None:
    reader = open_reader(make_config(root=server[0]).data)
    assert pickle.loads(pickle.dumps(reader)).read("train", 1) == reader.read("train", 1)


@needs_curl
def test_a_shard_that_cannot_be_fetched_ends_the_epoch_and_is_no_corrupt_sample(
    server: tuple[str, Counter[str]], own_dataset: Path, make_config: ConfigFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from shards import remote

    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    url, requests = server
    config = make_config(root=url, workers=0, max_bad_fraction=1.0, stall_seconds=2.0)
    reader = open_reader(config.data)
    loader = build_loader(config, reader, Tokenizer.load(None, url), 0, 1, 16)
    reader.close()
    shutil.rmtree(Path(config.data.cache_dir or "") / "shards")
    requests.clear()
    for tar in own_dataset.glob("*.tar"):
        tar.write_bytes(b"other content")
    with pytest.raises(DataError, match="the content differs from the dataset's index"):
        list(itertools.islice(loader, 6))
    assert sum(count for file, count in requests.items() if file.endswith(".tar")) == 1


@needs_curl
def test_a_full_cache_is_no_corrupt_sample(
    server: tuple[str, Counter[str]], own_dataset: Path, make_config: ConfigFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url, _ = server
    config = make_config(root=url, workers=0, max_bad_fraction=1.0)
    reader, tokenizer = open_reader(config.data), Tokenizer.load(None, url)
    loader = build_loader(config, reader, tokenizer, 0, 1, 16)
    reader.close()
    folder, asked = Path(config.data.cache_dir or ""), []

    def full(remote: str, *given: object) -> str:
        asked.append(remote)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medvlp.data.cache.download", full)
    for stored in ("shards", "tokens"):
        shutil.rmtree(folder / stored)
    message = rf"cannot be brought to {folder}/shards: No space left on device; make room"
    for reads in (
        lambda: list(itertools.islice(loader, 6)),
        lambda: SampleStore.open_or_build(open_reader(config.data), "train", config.data, tokenizer),
    ):
        asked.clear()
        with pytest.raises(RemoteError, match=message):
            reads()
        assert len(asked) == 1


@needs_curl
def test_a_cache_that_cannot_be_written_is_no_corrupt_sample(
    server: tuple[str, Counter[str]], make_config: ConfigFactory, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    reader = open_reader(make_config(root=server[0], cache_dir=str(tmp_path / "file")).data)
    with pytest.raises(RemoteError, match=r"file/shards: Not a directory; set data\.cache_dir"):
        reader.image("train", 0)


def test_the_cached_shards_of_another_user_are_read(
    own_dataset: Path, make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(root=f"pipe:cat {own_dataset}/{{}}")
    image = open_reader(config.data).image("train", 0)

    def of_another(path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(os, "utime", of_another)
    assert open_reader(config.data).image("train", 0) == image


def test_users_who_share_a_cache_open_each_others_locks(
    own_dataset: Path, make_config: ConfigFactory
) -> None:
    config = make_config(root=f"pipe:cat {own_dataset}/{{}}")
    open_reader(config.data).image("train", 0)
    locks = list((Path(config.data.cache_dir or "") / "shards").glob(".*.lock"))
    assert locks
    assert {path.stat().st_mode & 0o777 for path in locks} == {0o666}


def test_eviction_passes_over_the_shards_of_another_user(
    own_dataset: Path, make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(root=f"pipe:cat {own_dataset}/{{}}", cache_gigabytes=1e-6)
    reader = open_reader(config.data)
    reader.image("train", 0)
    (others,) = (Path(config.data.cache_dir or "") / "shards").glob("*.tar")
    unlink = Path.unlink

    def sticky(path: Path, missing_ok: bool = False) -> None:
        if path == others:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", sticky)
    last = reader.sample_count("train") - 1
    assert reader.image("train", last) == ShardReader(own_dataset).image("train", last)
    assert others.exists()

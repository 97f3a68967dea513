"""`index.json`, `.idx` files and where they are read from."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import struct
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.format import Index, Shard, SplitTotals, fingerprint, is_remote, locate
from shards.shard_index import ShardIndex, map_shard_index

SHARDS = [
    Shard("train-000000.tar", "train", 3, 10240, f"xxh3:{1:032x}", f"xxh3:{2:032x}"),
    Shard("test-000000.tar", "test", 1, 10240, f"xxh3:{3:032x}", f"xxh3:{4:032x}"),
]
INDEX = Index(
    name="toy",
    label_names=["edema"],
    splits={"train": SplitTotals(3, 2, 3, 1, 10240), "test": SplitTotals(1, 1, 1, 1, 10240)},
    shards=SHARDS,
    image_size=64,
    tokenizer=None,
    fingerprint=fingerprint(SHARDS),
    arguments={"source": {"name": "toy"}},
)
#: Bytes of the tar that `test_shard_index_comes_back` describes.
TAR_BYTES = 2**40
SIZES = st.dictionaries(st.sampled_from(["jpg", "json", "masks.png"]), st.integers(0, 2**31), min_size=1)


def lay_out(sizes: list[dict[str, int]]) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, size)}) of members of these sizes, laid out as a tar does."""
    end, samples = 0, []
    for row, members in enumerate(sizes):
        spans = {}
        for extension, size in members.items():
            spans[extension] = (end + 512, size)
            end += 512 + -(-size // 512) * 512
        samples.append((f"{row:08d}-0", spans))
    return samples


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a real HTTP server over `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_index_comes_back_from_json_and_from_disk(tmp_path: Path) -> None:
    assert Index.from_json(INDEX.to_json(), "here") == INDEX
    (tmp_path / "index.json").write_bytes(INDEX.to_json())
    assert Index.load(tmp_path) == INDEX
    assert Index.load(str(tmp_path)).to_json() == INDEX.to_json()


def test_index_is_read_over_http_and_pipe(tmp_path: Path, server: str) -> None:
    (tmp_path / "index.json").write_bytes(INDEX.to_json())
    assert Index.load(server) == INDEX
    assert Index.load(server + "/") == INDEX
    assert Index.load(f"pipe:cat {tmp_path}") == INDEX
    assert Index.load(f"pipe:cat {tmp_path}/{{}} | cat") == INDEX


def test_missing_remote_index_is_a_data_error(server: str, tmp_path: Path) -> None:
    for root in (server, "http://127.0.0.1:9", f"pipe:cat {tmp_path}/nowhere"):
        with pytest.raises(DataError, match=r"cannot read .*index\.json|not an index"):
            Index.load(root)


def test_remote_roots_and_their_files() -> None:
    assert is_remote("s3://bucket/data")
    assert not is_remote(Path("/data"))
    assert locate("s3://bucket/data/", "a.tar") == "s3://bucket/data/a.tar"
    assert locate("pipe:aws s3 cp s3://b/{} -", "a.tar") == "pipe:aws s3 cp s3://b/a.tar -"
    assert locate("/data", "a.tar") == "/data/a.tar"


def test_missing_folder_and_unfinished_build_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Index.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not finished"):
        Index.load(tmp_path)
    monkeypatch.chdir(tmp_path)  # as from another folder than that of the training
    with pytest.raises(DataError, match=f"data folder pairs does not exist below {tmp_path}"):
        Index.load("pairs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99"),
        ({"shards": [{"file": "x"}]}, "not an index"),
        ({"surprise": 1}, "not an index"),
        ({"shards": [{**SHARDS[0].__dict__, "file": "../../etc/passwd"}]}, "no plain name"),
        ({"shards": [{**SHARDS[0].__dict__, "file": "a\0.tar"}]}, "no plain name"),
        ({"shards": [{**SHARDS[0].__dict__, "hash": "xxh3:../../x"}]}, "hash"),
        ({"shards": [{**SHARDS[0].__dict__, "samples": 10**12}]}, "cannot hold"),
        ({"shards": [{**SHARDS[0].__dict__, "samples": -1}]}, "cannot hold"),
        ({"shards": [{**SHARDS[0].__dict__, "samples": 1.5}]}, "is not of type int"),
        ({"shards": [{**SHARDS[0].__dict__, "split": "other"}]}, "not among the splits"),
        ({"shards": [SHARDS[0].__dict__] * 2}, "same name"),
        ({"splits": {"../../x": SplitTotals(0, 0, 0, 0, 0).__dict__}, "shards": []}, "name of a split"),
        ({"image_size": 10**9}, "image_size"),
        ({"image_size": True}, "is not of type int"),
        ({"label_names": ["edema", "edema"]}, "same name"),
        ({"label_names": [["edema"]]}, "is not of type str"),
        ({"name": "\x1b[2J"}, r"U\+001B, which cannot be printed"),
        ({"fingerprint": "../x"}, "hash"),
        ({"splits": []}, "is not of type dict"),
    ],
)
def test_damaged_index_is_a_data_error(change: dict[str, object], message: str) -> None:
    fields = json.loads(INDEX.to_json()) | change
    with pytest.raises(DataError, match=message):
        Index.from_json(json.dumps(fields).encode(), "index.json")
    for garbage in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"version":1,"version":1}', b"9" * 5000):
        with pytest.raises(DataError):
            Index.from_json(garbage, "index.json")


def test_an_index_of_gigabytes_or_a_pipe_in_its_place_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "index.json").touch()
    os.truncate(tmp_path / "index.json", 2**34)
    with pytest.raises(DataError, match=f"{2**34} bytes, more than the limit"):
        Index.load(tmp_path)
    (tmp_path / "index.json").unlink()
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(DataError, match="not a regular file"):
        Index.load(tmp_path)


def test_unknown_split_names_those_there_are() -> None:
    assert [shard.file for shard in INDEX.split_shards("test")] == ["test-000000.tar"]
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        INDEX.split_shards("valid")


@settings(max_examples=50)
@given(st.lists(SIZES, max_size=8))
def test_shard_index_comes_back(sizes: list[dict[str, int]]) -> None:
    samples = lay_out(sizes)
    index = ShardIndex.from_bytes(ShardIndex.from_members(samples).to_bytes(), "x.idx", TAR_BYTES)
    assert [(key, index.members(row)) for row, key in enumerate(index.keys)] == samples


@settings(max_examples=50)
@given(st.integers(0, 200), st.binary(max_size=9))
def test_damaged_shard_index_is_a_data_error(cut: int, tail: bytes) -> None:
    data = ShardIndex.from_members([("a", {"jpg": (512, 9)}), ("b", {"jpg": (1536, 7)})]).to_bytes()
    if data[:cut] + tail == data:
        return
    with contextlib.suppress(DataError):  # any other exception fails the test
        index = ShardIndex.from_bytes(data[:cut] + tail, "x.idx", 10240)
        # A changed number inside the array is seen by the file's hash, which the index holds.
        assert list(index.keys) == ["a", "b"]


@pytest.mark.parametrize(
    "samples",
    [
        [("a", {"jpg": (512, 10_000)})],
        [("a", {"jpg": (512, 2**62)})],
        [("a", {"jpg": (2**62, 9)})],
        [("a", {"jpg": (-512, 9)})],
        [("a", {"jpg": (512, -9)})],
        [("a", {"jpg": (0, 9)})],
        [("a", {"jpg": (512, 9), "json": (514, 9)})],
        [("a", {"jpg": (512, 9)}), ("b", {"jpg": (512, 9)})],
        [("a", {"jpg": (2048, 9)}), ("b", {"jpg": (512, 9)})],
        [("a", {"jpg": (512, 9)}), ("a", {"jpg": (1536, 9)})],
        [("a/../b", {"jpg": (512, 9)})],
        [("a\0", {"jpg": (512, 9)})],
        [("\x1b[31m", {"jpg": (512, 9)})],
        [("a", {"../jpg": (512, 9)})],
        [("a", {})],
    ],
)
def test_members_that_no_tar_has_are_refused(samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> None:
    plain = ShardIndex.from_members([(f"k{row}", members) for row, (_, members) in enumerate(samples)])
    header = json.dumps({"extensions": plain.extensions, "keys": [key for key, _ in samples]}).encode()
    data = b"MVLPIDX1" + struct.pack("<I", len(header)) + header + plain.spans.tobytes()
    with pytest.raises(DataError, match=r"^x\.idx: damaged shard index \("):
        ShardIndex.from_bytes(data, "x.idx", 10240)


def test_a_header_that_claims_gigabytes_is_refused() -> None:
    for data in (b"MVLPIDX1\xff\xff\xff\xff{}", b"MVLPIDX1", b"MVLPIDX1\x02\0\0\0[]"):
        with pytest.raises(DataError, match="damaged shard index"):
            ShardIndex.from_bytes(data, "x.idx", 10240)


def test_an_index_is_mapped_also_where_there_is_no_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU machine without a network, which trains and builds no shards (tests/cuda)."""
    index = ShardIndex.from_members([("a-0", {"jpg": (512, 400)})])
    (tmp_path / "x.idx").write_bytes(index.to_bytes())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    mapped = map_shard_index(tmp_path / "x.idx")
    assert mapped.readonly
    assert ShardIndex.from_bytes(mapped, "x.idx", 10240).members(0) == index.members(0)


def test_an_opened_index_takes_ten_bytes_a_sample_of_this_process(tmp_path: Path) -> None:
    """Ten million samples must fit into each of a node's data workers."""
    samples = [(f"{row:08d}-0", {"jpg": (512 + 1024 * row, 400)}) for row in range(100_000)]
    (tmp_path / "x.idx").write_bytes(ShardIndex.from_members(samples).to_bytes())
    mapped = map_shard_index(tmp_path / "x.idx")
    tracemalloc.start()
    index = ShardIndex.from_bytes(mapped, "x.idx", 1024 * 100_001)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 12 * len(samples)
    assert (index.keys[99_999], index.members(99_999)) == samples[-1]

"""Remote files from real HTTP servers that stall, drip, fail, truncate and lie; and commands that hang."""

from __future__ import annotations

import http.server
import io
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from medvlp.data.cache import ShardCache
from shards import remote
from shards.errors import DataError
from shards.format import Index, hash_bytes, hash_file
from shards.reader import ShardReader
from shards.remote import RemoteError, download, read_remote

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="http is read with curl")

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the first part of the path; counts requests."""

    requests: list[str]
    released: threading.Event

    def do_GET(self) -> None:
        self.requests.append(self.path)
        kind = self.path.strip("/").split("/")[0]
        if kind == "twice" and len(self.requests) < 3:
            kind = "500"
        if kind.isdigit():
            self.send_error(int(kind))
            return
        if kind == "silent":
            self.released.wait(60)
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        self.send_response(200)
        more = {"short": 1000, "long": -1000}.get(kind, 0)
        if kind != "endless":
            self.send_header("Content-Length", str(len(CONTENT) + more))
        self.end_headers()
        try:
            self._send(kind)
        except OSError:
            return

    def _send(self, kind: str) -> None:
        if kind == "stall":
            self.wfile.write(CONTENT[:5000])
            self.released.wait(60)
        elif kind == "drip":
            for byte in CONTENT:
                self.wfile.write(bytes([byte]))
                if self.released.wait(0.05):
                    return
        elif kind == "endless":
            while not self.released.is_set():
                self.wfile.write(CONTENT)
        else:
            self.wfile.write(CONTENT)
        self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Keep the test output quiet."""


@pytest.fixture
def site() -> Iterator[tuple[str, list[str]]]:
    requests: list[str] = []
    handler = type("Site", (Handler,), {"requests": requests, "released": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    handler.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)


def read(url: str, most: int = 1 << 20, stall: float = 30.0) -> bytes:
    return read_remote(url, most, stall_seconds=stall)


@pytest.mark.parametrize(
    ("kind", "reason", "tries"),
    [
        ("stall", r"only 5000 bytes|only 0 bytes came in", 3),
        ("silent", r"only 0 bytes came in 1 s \(data\.stall_seconds\)", 3),
        ("drip", r"only \d+ bytes came in 1 s", 3),
        ("500", "The requested URL returned error: 500", 3),
        ("503", "The requested URL returned error: 503", 3),
        ("429", "The requested URL returned error: 429", 3),
        ("404", "The requested URL returned error: 404", 1),
        ("403", "The requested URL returned error: 403", 1),
        ("short", "1000 bytes", 3),
        ("redirect", "file", 3),
        ("endless", "more than the 1048576 bytes it may have", 1),
    ],
)
def test_what_cannot_be_read_is_one_line_after_bounded_tries(site, caplog, kind, reason, tries) -> None:
    url, requests = site
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(RemoteError, match=reason) as caught:
        # What does not stall is given time: on a busy machine even an answer at once takes a second.
        read(f"{url}/{kind}/x.tar", stall=1.0 if kind in ("stall", "silent", "drip") else 30.0)
    assert time.monotonic() - started < 60
    text = str(caught.value)
    assert text.startswith(f"cannot read {url}/{kind}/x.tar: ")
    assert "\n" not in text
    assert "('" not in text
    assert "root:" not in text
    assert len(requests) == tries
    assert len(caplog.records) == tries - 1


def test_a_server_that_recovers_is_read_whole(site) -> None:
    url, requests = site
    target = io.BytesIO()
    assert download(f"{url}/twice/x", target, 1 << 20, 5.0) == hash_bytes(CONTENT)
    assert target.getvalue() == CONTENT
    assert len(requests) == 3


def test_a_length_that_lies_is_found_by_the_hash(site) -> None:
    assert read(f"{site[0]}/long/x") == CONTENT[:-1000]


def test_a_port_that_nobody_serves() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(RemoteError, match=r"Failed to connect|Could ?n.t connect"):
            read(f"http://127.0.0.1:{port}/x")


def test_commands_that_hang_fail_or_say_nothing(tmp_path: Path) -> None:
    for command, reason in {
        "sleep 100 | cat": "only 0 bytes came",
        "exit 7": "ended with code 7",
        "echo it broke >&2; exit 1": "it broke",
        "true": "nothing came back",
        "exec 1>&-; sleep 100": "does not end",
    }.items():
        with pytest.raises(RemoteError, match=reason):
            read(f"pipe:{command}", stall=30.0 if command.endswith(("7", "1", "true")) else 1.0)
    with pytest.raises(RemoteError, match="no program reads gopher:; there are http"):
        read("gopher://x/y")


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(RemoteError):
        read(f"pipe:sleep 1000 & echo $! >> {pids}; wait", stall=1.0)
    for pid in pids.read_text().split():
        deadline = time.monotonic() + 100
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_cache_is_free_and_empty_after_a_failure(site, tmp_path: Path, phantom_dataset: Path) -> None:
    index = Index.load(phantom_dataset)
    cache = ShardCache(f"{site[0]}/stall", index, tmp_path / "cache", 10**9, stall_seconds=1.0)
    file = index.shards[0].file
    with pytest.raises(RemoteError, match=file):
        cache(file)
    (lock,) = (tmp_path / "cache").glob(".*.lock")
    FileLock(lock).acquire(timeout=0).lock.release()
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_pipes_sockets_and_devices_are_no_data(tmp_path: Path, phantom_dataset: Path) -> None:
    copy = tmp_path / "copy"
    for suffix in (".tar", ".idx", ".json"):
        for kind in ("fifo", "socket", "device"):
            shutil.copytree(phantom_dataset, copy)
            name = "index.json" if suffix == ".json" else f"train-000000{suffix}"
            (copy / name).unlink()
            if kind == "fifo":
                os.mkfifo(copy / name)
            elif kind == "socket":
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(str(copy / name))
            else:
                (copy / name).symlink_to("/dev/zero")
            with pytest.raises(DataError, match="not a regular file"):
                ShardReader(copy).read("train", 0)
            with pytest.raises((DataError, ValueError), match="not a regular file"):
                hash_file(copy / name)
            shutil.rmtree(copy)

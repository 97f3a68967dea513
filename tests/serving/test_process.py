"""The server as a process: its files, its memory under idle connections, and its end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from medvlp.serving.client import PrototypeClient, RemoteError, connection_of
from medvlp.serving.layout import ADDRESS, TOKEN, folder_of

#: Idle connections of the test, a share of what the issue names (10,000), and what each may cost.
IDLE, BYTES_EACH = 500, 64 << 10


@pytest.fixture
def server(run: Path) -> Iterator[subprocess.Popen[str]]:
    """`medvlp prototypes serve RUN`, once it answers."""
    command = [sys.executable, "-m", "launcher.main", "prototypes", "serve", str(run), "--device", "cpu"]
    process = subprocess.Popen([*command, "--follow", "--poll", "0.2"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 250
    while time.monotonic() < deadline and process.poll() is None:
        content = read_address(run)
        if content and content["step"] is not None:
            break
        time.sleep(0.1)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def read_address(run: Path) -> dict[str, object] | None:
    file = folder_of(run) / ADDRESS
    return json.loads(file.read_text()) if file.is_file() else None


def test_idle_connections_cost_little_and_the_end_is_clean(server: subprocess.Popen[str], run: Path) -> None:
    process = psutil.Process(server.pid)
    token = (folder_of(run) / TOKEN).read_text().strip()
    assert token not in (folder_of(run) / ADDRESS).read_text()
    with PrototypeClient(connection_of(run)) as client:
        rows = np.ones((64, 16), np.float32)
        for _ in range(50):
            client.nearest(rows)
        before = process.memory_info().rss
        host, port = str(read_address(run)["address"]).rsplit(":", 1)
        idle = [socket.create_connection((host, int(port)), 100) for _ in range(IDLE)]
        for _ in range(50):
            client.nearest(rows)
        grown = process.memory_info().rss - before
        assert grown < IDLE * BYTES_EACH, f"{grown / IDLE:.0f} bytes for each idle connection"
        for connection in idle:
            connection.close()
        assert client.table().step == 3

        server.send_signal(signal.SIGTERM)
        _, messages = server.communicate(timeout=200)
        assert server.returncode == 0, messages
        assert "ended" in messages
        assert token not in messages
        with pytest.raises(RemoteError, match="no server answers"):
            client.table()
    with pytest.raises(RemoteError, match="names no server"):
        connection_of(run)
    # The lock of the build stays; the server's address and token do not.
    assert {path.name for path in folder_of(run).glob(".*")} == {".lock"}

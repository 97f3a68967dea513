"""Checking a file: its checksum, and how far a long check is."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from medvlp.runs import state_files
from shards import progress


def test_checking_a_large_file_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 10)
    expected = xxhash.xxh3_128_hexdigest(file.read_bytes())
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(state_files, "_PIECE", 1000)
    assert state_files.checksum(file) == expected
    assert capsys.readouterr().err == "", "a small file"
    monkeypatch.setattr(state_files, "SHOWN", 2000)
    assert state_files.checksum(file) == expected
    assert (
        f"checking bytes of {tmp_path.name}/weights: 2,000 of 2,560, about 0:00:00 left"
        in capsys.readouterr().err
    )

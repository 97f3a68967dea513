"""Files and folders that are whole or not there, whoever else writes to the same place."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from shards import atomic
from shards.atomic import atomic_file, atomic_folder, remove_leftovers

NO_PROCESS = (1 << 22) + 1  # above the largest process id of Linux


@pytest.mark.parametrize("replace", [False, True])
def test_two_writers_never_mix_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    place, first = tmp_path / "out", atomic_folder(tmp_path / "out", replace)
    one = first.__enter__()
    (one / "a").write_text("of the first")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "getpid", lambda: 1)  # a second process of this host, which lives
        with atomic_folder(place, replace) as other:
            assert other != one
            (other / "b").write_text("of the second")
    (one / "c").write_text("of the first")
    assert [path.name for path in place.iterdir()] == ["b"]
    if replace:
        first.__exit__(None, None, None)
        assert sorted(path.name for path in place.iterdir()) == ["a", "c"]
    else:
        with pytest.raises(OSError, match="not empty"):
            first.__exit__(None, None, None)
        assert [path.name for path in place.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [place]


def test_only_what_a_dead_writer_of_this_host_left_is_cleared_away(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead, living, elsewhere = (
        tmp_path / f".out.{name}.partial" for name in (f"{host}-{NO_PROCESS}", f"{host}-1", "other-host-77")
    )
    for folder in (dead, living, elsewhere):
        folder.mkdir()
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out") as folder:
        (folder / "missing").read_bytes()
    assert set(tmp_path.iterdir()) == {living, elsewhere}


@pytest.mark.parametrize("name", ["shard.tar", "copy [1]*.tar"])
def test_the_file_of_a_living_writer_is_no_leftover(name: str, tmp_path: Path) -> None:
    """Two builds of one folder: the second one must not end the first."""
    host, hours_ago = socket.gethostname(), time.time() - 7200
    places = {
        writer: tmp_path / f".{name}.{writer}.tmp"
        for writer in (f"{host}-{NO_PROCESS}", f"{host}-1", "other-host-77", "third-host-77")
    }
    for place in places.values():
        place.touch()
    os.utime(places["third-host-77"], (hours_ago, hours_ago))
    os.utime(places[f"{host}-1"], (hours_ago, hours_ago))
    with atomic_file(tmp_path / name) as file:
        file.write(b"of the first")
        remove_leftovers(tmp_path, name)
    assert (tmp_path / name).read_bytes() == b"of the first"
    left = {writer for writer, place in places.items() if place.exists()}
    assert left == {f"{host}-1", "other-host-77"}

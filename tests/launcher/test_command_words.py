"""Words of a command line as commands get them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.command_words import parse
from launcher.main import app

EMBED = ["embed", "run", "--data", "shards", "--out", "x.parquet"]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ([*EMBED, "--data=~/shards"], "data", "/home/me/shards"),
        ([*EMBED, "--data", "~/shards"], "data", "/home/me/shards"),
        ([*EMBED, "--out=~/x.parquet"], "out", Path("/home/me/x.parquet")),
        (["embed", "~/run", *EMBED[2:]], "run", Path("/home/me/run")),
        (["shards", "verify", "~/shards"], "dataset", Path("/home/me/shards")),
        (["prototypes", "build", "run", "--out=~/p"], "out", Path("/home/me/p")),
        (["shards", "build", "phantom", "--out=~/shards"], "out", Path("/home/me/shards")),
        (["pretrain", "a.yaml", "run.dir=~/run"], "arguments", ["a.yaml", "run.dir=/home/me/run"]),
        (["pretrain", "a.yaml", "train.steps=~"], "arguments", ["a.yaml", "train.steps=~"]),
        ([*EMBED, "--data=./~/shards"], "data", "./~/shards"),
        ([*EMBED, "--data=pipe:cat a=~/b"], "data", "pipe:cat a=~/b"),
        ([*EMBED, "--data=~other/shards"], "data", "~other/shards"),
    ],
)
def test_a_tilde_is_the_home_directory_in_every_path(words: list[str], name: str, value: object) -> None:
    assert parse(app, words).values[name] == value

"""What a terminal is shown: names and configs of strangers hold nothing that would do something to it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from launcher import main
from launcher.console import Console, echo
from shards.errors import without_controls

EVIL = "m\x1b]0;PWNED\x07\x1b[2J\x9b2J\u202ez"


def medvlp(*words: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["medvlp", *words])
    # Else it would end the process of the tests half a minute after an error.
    monkeypatch.setattr(main, "end_within", lambda seconds, code: None)
    with pytest.raises(SystemExit) as ended:
        main.run()
    return ended.value.code


def is_harmless(text: str) -> bool:
    return not any(character in text for character in "\x1b\x07\x9b\u202e")


def test_a_run_of_a_stranger_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "evil\x1b[2J"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(
        'method: {name: "m\\e]0;PWNED\\a\\e[2Jz"}\ncheckpoint: {keep_best: "b\\e[31mest"}\n'
    )
    (run / "events.jsonl").write_text('{"kind":"interrupt","by":"sig\\u001b[2J","step":3}\n')
    (run / "metrics.jsonl").write_text('{"step":3}\n')
    assert medvlp("runs", str(tmp_path), monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert is_harmless(said)
    assert "evil[2J" in said
    assert "m]0;PWNED[2Jz" in said


def test_an_error_that_repeats_a_value_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text('train: {seed: "\\e]0;PWNED\\a"}\n')
    assert medvlp("config", str(file), monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "PWNED" in said
    assert is_harmless(said)


def test_texts_of_all_kinds_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(EVIL, title=EVIL)
    table.add_row(Text(EVIL))
    Console(force_terminal=False).print(table, EVIL, Text(EVIL))
    echo(EVIL)
    echo(EVIL, err=True)
    said = capsys.readouterr()
    assert said.out.count("PWNED") == 6
    assert said.err.count("PWNED") == 1
    assert is_harmless(said.out + said.err)
    Console(force_terminal=True, color_system="standard").print("[red]x[/]")
    assert capsys.readouterr().out == "\x1b[31mx\x1b[0m\n", "colours are the program's own"


def test_letters_and_spaces_stay() -> None:
    assert without_controls("é\xa0肺\u3000a\tb\n\r") == "é\xa0肺\u3000a\tb\n"
    assert without_controls("caf\udce9.png") == "caf�.png", "a name that is not UTF-8 can be shown"

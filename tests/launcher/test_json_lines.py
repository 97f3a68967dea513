"""Reading `.jsonl` files from their end while they grow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import json_lines


@settings(max_examples=25)
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20),
    block=st.integers(1, 40),
    torn=st.booleans(),
)
def test_lines_come_back_in_reverse_whatever_the_size_of_a_block(
    lines: list[str], block: int, torn: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    written = [json.dumps({"text": line}) for line in lines]
    end = '{"text": "half' if torn else ""
    path.write_text("".join(line + "\n" for line in written) + end, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "_BLOCK", block)
        found = [value["text"] for value in json_lines.newest_first(path)]
    assert found == lines[::-1]


def test_a_line_that_is_whole_but_not_ended_is_not_read_yet(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert json_lines.newest(path) == {"step": 1}
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert json_lines.newest(path) == {"step": 2}


def test_damaged_lines_are_passed_over_and_no_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\x00\n[2]\n{"step": \n')
    assert list(json_lines.newest_first(path)) == [{"step": 1}]
    assert json_lines.newest(tmp_path / "none.jsonl") is None


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.seek(1 << 33)  # 8 GiB of nothing
        file.write(b'\n{"step": 7}\n')
    assert json_lines.newest(path) == {"step": 7}
    assert list(json_lines.newest_first(path)) == [{"step": 7}]

"""JSON of strangers: refused with a reason that quotes nothing, or the value that was written."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import strict_json
from shards.metadata import parse_metadata
from shards.strict_json import MAX_DEPTH, JsonError, parse_json, read_limited, stream_object, to_record
from tests.shards.hostile import SECRET

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=10,
)  # fmt: skip
LIMIT = 1 << 20


@given(PLAIN)
def test_plain_values_come_back(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), LIMIT) == value
    assert parse_json(json.dumps(value, ensure_ascii=False), LIMIT) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no JSON"),
        (b'{"a": "' + SECRET.encode(), "no JSON"),
        (b'{"a": 1, "a": 2}', "one name twice"),
        (b'{"x": [{"a": 1, "a": 2}]}', "one name twice"),
        (b"[NaN]", "not finite"),
        (b"[-Infinity]", "not finite"),
        (b"[1e999]", "not finite"),
        (b"1" * 5000, "too large"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b"\xff\xfe[\0]\0", "not UTF-8"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "inside each other"),
        (b"[" * 300_000 + b"]" * 300_000, "inside each other"),
        (b'{"a":' * 200_000, "inside each other"),
        (b" " * (LIMIT + 1), "more than the limit"),
    ],
)
def test_what_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(JsonError, match=reason) as caught:
        parse_json(text, LIMIT)
    assert SECRET not in str(caught.value)


def test_a_whole_surrogate_pair_and_the_deepest_value_are_read() -> None:
    assert parse_json(b'"\\ud83e\\udec1"', LIMIT) == "\N{LUNGS}"
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, LIMIT)


@dataclass
class Inner:
    number: int
    share: float = 1.0


@dataclass
class Outer:
    name: str
    inner: list[Inner] = field(default_factory=list)
    by_name: dict[str, Inner] = field(default_factory=dict)
    note: str | None = None
    anything: Any = None


def test_records_are_made_of_dataclasses_lists_and_dicts() -> None:
    values = {
        "name": "a",
        "inner": [{"number": 1}],
        "by_name": {"b": {"number": 2, "share": 3}},
        "note": None,
    }
    assert to_record(values, Outer) == Outer("a", [Inner(1)], {"b": Inner(2, 3)})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "the file is no object"),
        ({}, "name is missing"),
        ({"name": "a", SECRET: 1}, "unknown field"),
        ({"name": 1}, "name is not of type str"),
        ({"name": None}, "name is not of type str"),
        ({"name": "a", "inner": {}}, "inner is not of type list"),
        ({"name": "a", "inner": [{"number": True}]}, r"inner\[0\]\.number is not of type int"),
        ({"name": "a", "inner": [{"number": 1.0}]}, r"inner\[0\]\.number is not of type int"),
        ({"name": "a", "inner": [{"number": 1, "share": 10**400}]}, r"share is not of type float"),
        ({"name": "a", "by_name": {SECRET: 1}}, "a value of by_name is no object"),
        ({"name": "a", "note": [SECRET]}, "note is not of type str"),
    ],
)
def test_other_values_are_no_record(values: Any, reason: str) -> None:
    with pytest.raises(JsonError, match=reason) as caught:
        to_record(values, Outer)
    assert SECRET not in str(caught.value)


def test_only_regular_files_within_the_limit_are_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_limited(file, 5) == b"12345"
    with pytest.raises(JsonError, match="5 bytes, more than the limit of 4"):
        read_limited(file, 4)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises((JsonError, IsADirectoryError)):
            read_limited(place, 10)


BOX = {"label": "edema", "x": 1, "y": 2.5, "width": 3, "height": 4, "side": "left", "reader": "R1"}
QUESTION = {"question": "Is it?", "answer": "yes", "kind": "closed", "topic": "presence", "language": "en"}
GOOD: dict[str, Any] = {
    "study_id": "s", "patient_id": "p", "view": "PA", "sections": {"findings": "Clear."},
    "sentences": ["Clear."], "labels": {"edema": 0}, "entities": [["lung", "edema", 0]],
    "boxes": [BOX], "source": "t", "license": "", "extra": {},
    "masks": ["edema"], "anatomy": [BOX], "phrases": [{"text": "Clear.", "boxes": [BOX]}],
    "questions": [QUESTION], "lists": ["train_1"],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"sections": [SECRET]},
        {"sections": {"findings": [SECRET]}},
        {"sections": {"findings": None}},
        {"sentences": [1]},
        {"labels": {SECRET: 1}},
        {"labels": {"edema": True}},
        {"labels": {"edema": 1.0}},
        {"labels": {"edema": 10**30}},
        {"labels": {"edema": [SECRET]}},
        {"labels": [SECRET]},
        {"entities": [[SECRET]]},
        {"entities": [["lung", SECRET, True]]},
        {"entities": [["lung", SECRET, [1]]]},
        {"entities": {SECRET: 1}},
        {"boxes": [BOX | {"x": 1e300}]},
        {"boxes": [BOX | {"x": True}]},
        {"boxes": [BOX | {"x": -1}]},
        {"boxes": [BOX | {"width": 0}]},
        {"boxes": [BOX | {"side": SECRET}]},
        {"boxes": [BOX | {"reader": None}]},
        {"boxes": [BOX | {SECRET: 1}]},
        {"boxes": [{name: value for name, value in BOX.items() if name != "side"}]},
        {"boxes": [SECRET]},
        {"anatomy": [SECRET]},
        {"masks": [SECRET]},
        {"masks": [["edema"]]},
        {"masks": ["edema", "edema"]},
        {"masks": {"edema": 1}},
        {"phrases": [SECRET]},
        {"phrases": [{"text": "", "boxes": []}]},
        {"phrases": [{"text": SECRET, "boxes": [SECRET]}]},
        {"phrases": [{"text": SECRET, "boxes": None}]},
        {"questions": [QUESTION | {"kind": SECRET}]},
        {"questions": [QUESTION | {"answer": ""}]},
        {"questions": [QUESTION | {"topic": SECRET}]},
        {"questions": [QUESTION | {"language": 1}]},
        {"questions": [SECRET]},
        {"lists": [f"{SECRET}/../x"]},
        {"lists": ["a", "a"]},
        {"lists": [1]},
        {"patient_id": 7},
        {"patient_id": ""},
        {SECRET: SECRET},
    ],
)
def test_a_wrong_sample_is_refused_without_a_word_of_it(change: dict[str, Any]) -> None:
    assert parse_metadata(json.dumps(GOOD).encode(), ["edema"]) == GOOD
    with pytest.raises(JsonError) as caught:
        parse_metadata(json.dumps(GOOD | change).encode(), ["edema"])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("step", [1, 3, 1 << 18])
def test_an_object_is_streamed_member_by_member(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_STREAM_STEP", step)
    members = {"a": 12.5, "b": {"c": [1, "} , {"]}, "": 'é"', "n": 3}
    for text in (json.dumps(members), json.dumps(members, indent=2, ensure_ascii=False) + "\n"):
        assert dict(stream_object(io.StringIO(text), 100)) == members
    assert list(stream_object(io.StringIO(" { } "), 100)) == []
    assert list(stream_object(io.StringIO('{"a": 1, "a": 2}'), 100)) == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "1", '{"a": 1', '{"a": 1,}', '{"a": 1} x', '{"a": 1}}', '{"a" 1}', '{1: 2}', '{"a": NaN}',
        '{"a": 1e999}', '{"a": {"b": 1, "b": 2}}', '{"a": "\\ud800"}', '{"a": ' + "[" * 40 + "]" * 40 + "}",
        '{"a": "' + "x" * 1000 + '"', '{,"a": 1}', '{"a": "\udcff"}', '{"a": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_an_object_that_is_none_is_refused_while_streaming(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict_json, "_STREAM_STEP", 4)
    with pytest.raises(JsonError):
        list(stream_object(io.StringIO(text), 100))

"""RadGraph's output by the published parse rules."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from shards.entities.matrix import entity_matrix
from shards.entities.radgraph import read_radgraph, report_entities
from shards.errors import DataError

TEXT = "Small left pleural effusion . No opacity in the left lower lobe , possible edema . Low lung volumes"


def node(tokens: str, label: str, start: int, *relations: tuple[str, str]) -> dict[str, Any]:
    end = start + len(tokens.split()) - 1
    return {
        "tokens": tokens,
        "label": label,
        "start_ix": start,
        "end_ix": end,
        "relations": list(map(list, relations)),
    }


REPORT = {
    "text": TEXT,
    "entities": {
        "1": node("Small", "OBS-DP", 0, ("modify", "4")),
        "2": node("left", "ANAT-DP", 1, ("modify", "3")),
        "3": node("pleural", "ANAT-DP", 2),
        "4": node("effusion", "OBS-DP", 3, ("located_at", "3")),
        "5": node("opacity", "OBS-DA", 6, ("located_at", "8")),
        "6": node("left", "ANAT-DP", 9, ("modify", "8")),
        "7": node("lower", "ANAT-DP", 10, ("modify", "8")),
        "8": node("lobe", "ANAT-DP", 11),
        "9": node("edema", "OBS-U", 14),
        "10": node("Low", "OBS-DP", 16, ("located_at", "12")),
        "11": node("lung", "ANAT-DP", 17, ("modify", "12")),
        "12": node("volumes", "ANAT-DP", 18),
    },
}


def triples(report: dict[str, Any]) -> set[tuple[str, str, int]]:
    return {(entity.anatomy, entity.observation, entity.value) for entity in report_entities(report)}


def test_report_is_parsed_by_the_rules() -> None:
    assert triples(REPORT) == {
        ("pleural|left", "effusion", 1),
        ("lobe|left|lower", "opacity", 0),
        ("unspecified", "edema", -1),
        ("volumes|lung", "low", 1),
    }
    assert (
        entity_matrix([e.anatomy, e.observation, e.value] for e in report_entities(REPORT)) != -1
    ).sum() == 3


def test_observation_of_another_sentence_is_not_attached() -> None:
    entities = dict(REPORT["entities"])
    entities["9"] = node("edema", "OBS-U", 14, ("located_at", "3"))
    assert not any(name == "edema" for _, name, _ in triples({"text": TEXT, "entities": entities}))


def test_observation_located_at_a_modifier_belongs_to_its_anatomy() -> None:
    entities = dict(REPORT["entities"])
    entities["5"] = node("opacity", "OBS-DA", 6, ("located_at", "7"))
    assert ("lobe|left|lower", "opacity", 0) in triples({"text": TEXT, "entities": entities})


def test_later_spelling_of_labels() -> None:
    entities = {"1": node("effusion", "Observation::definitely present", 3)}
    assert triples({"text": TEXT, "entities": entities}) == {("unspecified", "effusion", 1)}


def test_reports_are_found_by_id_and_by_the_end_of_a_path(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text(json.dumps({"p10/p10000032/s50414267.txt": REPORT, "CXR1": REPORT}))
    found = read_radgraph(path)
    assert set(found) == {"p10/p10000032/s50414267.txt", "s50414267", "50414267", "CXR1"}
    assert len(found["50414267"]) == 4


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"a": {"text": "x"}}),
        json.dumps({"a": {"text": "x", "entities": {"1": node("x", "OBS-DP", 7)}}}),
        json.dumps({"a": {"text": "x", "entities": {"1": {"tokens": "x", "label": "OBS-DP"}}}}),
        json.dumps({"a": "secret words"}),
    ],
)
def test_another_file_is_one_clear_error_without_text(tmp_path: Path, content: str) -> None:
    path = tmp_path / "inference.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"inference\.json") as caught:
        read_radgraph(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="cannot read"):
        read_radgraph(tmp_path / "nowhere.json")


def test_short_ids_that_stand_for_several_reports_find_none(tmp_path: Path) -> None:
    def report(word: str) -> dict:
        entity = {"tokens": word, "label": "OBS-DP", "start_ix": 0, "end_ix": 0, "relations": []}
        return {"text": word, "entities": {"1": entity}}

    path = tmp_path / "radgraph.json.gz"
    reports = {
        "p1/s1.txt": report("edema"),
        "p2/s1.txt": report("mass"),
        "p3/s2.txt": report("mass"),
        "s1": report("x"),
    }
    path.write_bytes(gzip.compress(json.dumps(reports).encode()))
    found = read_radgraph(path)
    assert found["p1/s1.txt"][0].observation == "edema"
    assert found["s1"][0].observation == "x"
    assert found["2"] == found["s2"] == found["p3/s2.txt"]
    assert "1" not in found
    path = tmp_path / "radgraph.json"
    path.write_text(f'{{"s1": {json.dumps(report("edema"))}, "s1": {json.dumps(report("mass"))}}}')
    with pytest.raises(DataError, match="a report is there twice"):
        read_radgraph(path)

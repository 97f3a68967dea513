"""evaluation.json comes back as it was written; tables put several evaluations side by side or refuse to."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from pathlib import Path

import pytest
from rich.console import Console

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report import comparison, results, tables
from medvlp.evaluation.report.results import Evaluation, UnitResult
from medvlp.evaluation.task import EvaluationError, Reading
from shards.errors import DataError
from tests.shards.hostile import SECRET, mutate_json, to_bytes


def make(trained: float, fingerprint: str = "abc", uncertain: str = "exclude") -> Evaluation:
    return Evaluation(
        model={"name": "run", "run": "runs/run", "checkpoint": "step-00000005", "step": 5},
        data={"name": "phantom", "root": "shards", "fingerprint": fingerprint, "split": "test", "splits": {}},
        settings={"uncertain": uncertain, "labels": [], "tasks": []},
        results={
            "zero-shot": {
                "trained": {
                    "auroc/macro": Estimate(trained, 0.7, 0.9),
                    "auroc/edema": Estimate(trained, 0.6, 0.95),
                },
                "untrained": {"auroc/macro": Estimate(0.5, 0.4, 0.6)},
                "pixels": {"auroc/macro": Estimate(0.62, 0.55, 0.68)},
                "chance": {"auroc/macro": Estimate(0.5)},
            }
        },
        notes={"zero-shot": {"counts": {"edema": {"positives": 3, "negatives": 4, "excluded": 0}}}},
        config={"train": {"seed": 0}},
    )


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    results.write(make(0.8), file)
    assert results.read(file) == make(0.8)
    bare = make(0.8)
    del bare.data["splits"], bare.settings["tasks"]
    results.write(bare, tmp_path / "bare.json")
    assert results.read(tmp_path / "bare.json") == make(0.8), "what readers rely on is there"
    (tmp_path / "bare.json").unlink()
    content = json.loads(file.read_text())
    assert content["schema_version"] == results.SCHEMA_VERSION
    assert content["results"]["zero-shot"]["trained"]["auroc/macro"] == {
        "value": 0.8,
        "low": 0.7,
        "high": 0.9,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_an_undefined_number_is_null(tmp_path: Path) -> None:
    evaluation = make(float("nan"))
    results.write(evaluation, tmp_path / "evaluation.json")
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["results"]["zero-shot"]["trained"]["auroc/macro"]["value"] is None
    stored = results.read(tmp_path / "evaluation.json").results["zero-shot"]["trained"]["auroc/macro"]
    assert tables.cell(stored, "auroc/macro", Reading()) == "–"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot write"):
        results.write(make(0.8), tmp_path / "nowhere" / "evaluation.json")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 1, "results": {}}']
)
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    with pytest.raises(EvaluationError, match=r"evaluation\.json"):
        results.read(file)
    with pytest.raises(EvaluationError, match="cannot be read"):
        results.read(tmp_path / "missing.json")


def test_models_of_several_runs_stand_in_one_table_with_shared_baselines_once() -> None:
    grid = comparison.grid({"first": make(0.8), "second": make(0.9)}, "zero-shot")
    assert list(grid.cells) == [
        "first",
        "first, untrained",
        "second",
        "second, untrained",
        "pixels",
        "chance",
    ]
    assert grid.metrics == ["auroc/macro"]
    markdown = tables.markdown_table(grid)
    assert "| model | AUROC macro |" in markdown
    assert "| second | 0.900 (0.70–0.90) |" in markdown
    assert "| chance | 0.500 |" in markdown
    single = comparison.grid({"first": make(0.8)}, "zero-shot", findings=True)
    assert single.metrics == ["auroc/edema"]
    assert "AUROC edema" in tables.markdown_table(single)


def test_the_short_tables_hold_the_main_numbers_only() -> None:
    evaluation = make(0.8)
    for metric in ("accuracy/macro", "f1/macro", "f1/edema"):
        evaluation.results["zero-shot"]["trained"][metric] = Estimate(0.7)
    assert comparison.grid({"run": evaluation}, "zero-shot").metrics == ["auroc/macro", "f1/macro"]
    single = comparison.grid({"run": evaluation}, "zero-shot", findings=True)
    assert set(single.metrics) == {"auroc/edema", "accuracy/macro", "f1/edema"}
    short = single.by_finding()
    assert short is not None
    assert short.metrics == ["auroc/edema"]
    table = tables.console_table(short, "")
    assert (table.columns[0].header, list(table.columns[0].cells)) == ("AUROC by finding", ["edema"])


def test_a_baseline_with_other_numbers_gets_a_row_of_its_own() -> None:
    other = make(0.9)
    other.results["zero-shot"]["pixels"] = {"auroc/macro": Estimate(0.7)}
    grid = comparison.grid({"first": make(0.8), "second": other}, "zero-shot")
    assert grid.cells["second, pixels"]["auroc/macro"].value == 0.7
    assert grid.cells["pixels"]["auroc/macro"].value == 0.62


@pytest.mark.parametrize("names", [("mgca", "pixels"), ("pixels", "mgca"), ("chance", "pixels")])
def test_a_run_that_is_named_like_a_baseline_takes_no_baselines_place(names: tuple[str, str]) -> None:
    """`runs/prior` is a likely folder, and a baseline of grounding."""
    cells = comparison.grid(dict(zip(names, (make(0.8), make(0.9)), strict=True)), "zero-shot").cells
    assert cells["pixels"]["auroc/macro"].value == 0.62
    assert cells["chance"]["auroc/macro"].value == 0.5
    for name, value in zip(names, (0.8, 0.9), strict=True):
        shown = name if name == "mgca" else f"{name} (run)"
        assert cells[shown]["auroc/macro"].value == value
        assert cells[f"{shown}, untrained"]["auroc/macro"].value == 0.5
    assert list(cells)[-2:] == ["pixels", "chance"]


def with_settings(**settings: object) -> Evaluation:
    made = make(0.9)
    made.settings |= settings
    return made


@pytest.mark.parametrize(
    "other",
    [
        make(0.9, fingerprint="def"),
        make(0.9, uncertain="positive"),
        with_settings(labels=["edema"]),
        with_settings(blank="negative"),
    ],
)
def test_results_of_different_data_do_not_stand_in_one_table(other: Evaluation) -> None:
    with pytest.raises(EvaluationError, match="second: another dataset"):
        comparison.grid({"first": make(0.8), "second": other}, "zero-shot")


def test_a_task_with_other_settings_is_named_under_the_table() -> None:
    first = with_settings(options={"zero-shot": {"prompts": "here.yaml", "pool": "mean"}})
    other = with_settings(options={"zero-shot": {"prompts": "there.yaml", "pool": "max_similarity"}})
    for one in (first, other):  # the same prompts at another place
        one.settings["files"] = {"zero-shot": {"prompts": "checksum"}}
    section = tables.markdown_section({"first": first, "second": other}, "zero-shot")
    assert "- zero-shot of second: with another pool than first\n" in section
    assert "another" not in tables.markdown_section({"first": first, "second": first}, "zero-shot")


def of_texts(task: str, sections: list[str], queries: int = 402, **data: object) -> Evaluation:
    """An evaluation of a task that is measured against reports of these sections."""
    made = make(0.8)
    made.results = {task: made.results["zero-shot"], "zero-shot": made.results["zero-shot"]}
    counts = {"queries": queries, "distinct_reports": queries, "without_report": 0}
    made.notes[task] = {**counts, "words": {"pairs": queries, "images": 4, "patients": 4}}
    made.config["data"] = {"sections": sections, "cleaning": "none", **data}
    return made


@pytest.mark.parametrize(
    ("task", "first", "second", "named"),
    [
        ("retrieval", {}, {"sections": ["findings"]}, "data.sections"),
        ("retrieval", {}, {"queries": 100}, "queries, distinct reports"),
        ("masked-words", {}, {"sections": ["findings"]}, "data.sections"),
        ("masked-words", {}, {"queries": 100}, "hidden words"),
        ("report", {}, {"sections": ["impression", "findings"]}, "data.sections"),
        ("report", {}, {"cleaning": "mgca"}, "data.cleaning"),
    ],
)
def test_numbers_that_are_measured_against_other_texts_stand_in_other_tables(
    task: str, first: dict, second: dict, named: str
) -> None:
    """They stood side by side, under the counts of the first."""
    both = {
        name: of_texts(task, **{"sections": ["findings", "impression"], **given})
        for name, given in (("first", first), ("second", second))
    }
    both["able"] = of_texts(task, ["other"])
    both["able"].results[task] = {}
    by_task = comparison.by_task(both)
    assert [list(group) for group in by_task[task]] == [["first", "able"], ["second"]]
    assert [list(group) for group in by_task["zero-shot"]] == [["first", "second", "able"]]
    (line,) = comparison.apart(*by_task[task], task)
    assert (
        line == f"{task} of second: in a table of its own, for it was measured with other {named} than first"
    )
    assert comparison.apart(by_task[task][0], by_task[task][0], task) == []
    with pytest.raises(EvaluationError, match="in a table of its own"):
        comparison.grid(both, task)


def test_the_order_of_sections_makes_no_other_candidates() -> None:
    both = {
        "mgca": of_texts("retrieval", ["impression", "findings"]),
        "mpma": of_texts("retrieval", ["findings", "impression"]),
    }
    assert comparison.grid(both, "retrieval").cells.keys() >= {"mgca", "mpma"}
    both["mpma"].config["data"] = {"sections": 3}
    with pytest.raises(EvaluationError, match="retrieval: config and notes of its result are not as this"):
        comparison.by_task(both)


def test_a_task_of_places_names_what_sees_other_parts_of_the_images() -> None:
    first, other = (
        of_texts("segmentation", [], image_size=size, transform={"crop": crop})
        for size, crop in ((224, "random"), (256, "area"))
    )
    (line,) = comparison.unlike({"first": first, "other": other}, "segmentation")
    assert line == (
        "segmentation of other: with another data.image_size, data.transform.evaluation than first"
    )
    other.config["data"] |= {"image_size": 224, "transform": {"crop": "center"}}
    assert comparison.unlike({"first": first, "other": other}, "segmentation") == []
    assert comparison.unlike({"first": first, "other": other}, "zero-shot") == []


def test_a_task_that_was_not_evaluated_is_named() -> None:
    with pytest.raises(EvaluationError, match="task retrieval has not been evaluated"):
        comparison.grid({"first": make(0.8)}, "retrieval")


def test_metrics_have_names_for_people() -> None:
    retrieval = comparison.reading_of("retrieval")
    assert tables.label("image_to_text/R@10", retrieval) == "image→text R@10"
    assert tables.label("text_to_image/P@5/macro", retrieval) == "text→image P@5 macro"
    assert tables.label("auroc@10%/macro", comparison.reading_of("linear-probe")) == "AUROC 10% macro"
    rank = "image_to_text/median_rank"
    assert tables.cell(Estimate(12.0, 8.0, 20.5), rank, retrieval) == "12 (8–20)"
    assert tables.label("auroc/macro", comparison.reading_of("of another program")) == "AUROC macro"


def test_what_a_table_leaves_out_stands_under_it() -> None:
    listed = {"not_evaluable": [{"finding": name, "reason": "no prompts"} for name in ("mass", "edema")]}
    notes = {"threshold_split": None, "pixels": "ridge", **listed}
    assert tables.remarks("zero-shot", notes) == [
        "no F1 and accuracy: no other split to choose a threshold on",
        "pixel baseline: ridge",
        "no number for mass, edema: no prompts",
    ]
    assert "best F1 on the split valid" in tables.remarks("zero-shot", {"threshold_split": "valid"})[0]
    fraction = {"samples": 4, "patients": 2, "findings": 1, "unconverged": {"trained": 3}}
    assert tables.remarks("linear-probe", {"selection_split": "valid", "fractions": {"1%": fraction}}) == [
        "C chosen on the split valid",
        "1% of the labels: 4 images of 2 patients, 1 findings, 3 fits stopped before they converged",
    ]
    counts = {"queries": 9, "distinct_reports": 8, "without_report": 1}
    assert tables.remarks("retrieval", counts) == [
        "9 queries, 8 distinct reports, 1 samples without a report left out"
    ]


def test_a_task_a_method_cannot_do_is_said_and_stands_as_dashes() -> None:
    able, unable = make(0.8), make(0.7)
    unable.results["zero-shot"] = {}
    unable.notes["zero-shot"] = {"not_available": "the method medslip does not embed reports"}
    reason = "zero-shot of two: not available: the method medslip does not embed reports"
    both = {"one": able, "two": unable}
    assert comparison.grid(both, "zero-shot").cells["two"] == {}
    section = tables.markdown_section(both, "zero-shot")
    assert "| two | – |" in section
    assert f"- {reason}" in section
    assert comparison.unavailable({"one": able}, "zero-shot") == []
    assert tables.markdown_section({"two": unable}, "zero-shot") == f"- {reason}\n"


def test_a_file_of_units_comes_back_and_a_file_without_is_as_before(tmp_path: Path) -> None:
    file, part = tmp_path / "part.json", make(0.8)
    part.units = {"zero-shot": {"whole": UnitResult(part.results.pop("zero-shot"), {"a": 1}, "abc")}}
    results.write(part, file)
    assert results.read(file) == part
    results.write(make(0.8), file)
    assert "units" not in json.loads(file.read_text())


def test_rubbish_in_the_file_is_one_line_without_its_text(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    results.write(make(0.8), file)
    content = json.loads(file.read_text())
    generator = random.Random(0)
    for _ in range(200):
        file.write_bytes(to_bytes(mutate_json(content, generator)))
        with contextlib.suppress(EvaluationError):  # any other exception fails the test
            results.read(file)
    file.write_text(json.dumps(content | {SECRET: SECRET}))
    with pytest.raises(EvaluationError, match="unknown field") as caught:
        results.read(file)
    assert SECRET not in str(caught.value)
    file.write_bytes(b"")
    os.truncate(file, 2**33)
    with pytest.raises(EvaluationError, match="more than the limit"):
        results.read(file)


@pytest.mark.parametrize("name", ["mass [left]", "[bold]"])
def test_what_stands_in_brackets_is_shown_as_it_is(name: str) -> None:
    """It was taken for markup: left out, or an error."""
    found = comparison.Grid("zero-shot", [name], {name: {name: Estimate(0.5)}})
    for table in (tables.console_table(found, name), tables.rows_table([name], [[name]], name)):
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(table)
        assert console.export_text().count(name) == 3

"""`medvlp compare` on stored evaluations: which tasks are shown, and of whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report import results
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError
from medvlp.runs.manifest import step_folder
from tests.evaluation.report.test_differences import TASK, measured
from tests.evaluation.report.test_results import make, of_texts


def compare(*words: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def stored(folder: Path, name: str, evaluation: Evaluation, *tasks: str) -> Path:
    """The file of an evaluation of a run of this name, with further tasks."""
    evaluation.model["name"] = name
    for task in tasks:
        evaluation.results[task] = {"trained": {"image_to_text/R@5": Estimate(0.25)}}
        evaluation.notes[task] = {}
    results.write(evaluation, folder / f"{name}.json")
    return folder / f"{name}.json"


@pytest.mark.parametrize("markdown", [(), ("--markdown",)])
def test_every_task_is_shown_whoever_has_it(tmp_path: Path, markdown: tuple[str, ...]) -> None:
    first, second = stored(tmp_path, "one", make(0.8)), stored(tmp_path, "two", make(0.7), "retrieval")
    for files in ((first, second), (second, first)):
        result = compare(*files, *markdown)
        assert result.exit_code == 0, result.exception
        assert "0.800" in result.output
        assert "0.700" in result.output
        assert "0.250" in result.output
        missing = [line.strip(" -") for line in result.output.splitlines() if "not evaluated" in line]
        assert missing == ["retrieval of one: not evaluated (medvlp evaluate ... --task retrieval)"]
    strange = make(0.7, fingerprint="other")
    strange.results = {}
    error = compare(first, stored(tmp_path, "three", strange, "retrieval"), *markdown).exception
    assert isinstance(error, EvaluationError)
    assert "three: another dataset" in str(error)


@pytest.mark.parametrize("markdown", [(), ("--markdown",)])
def test_retrieval_among_other_texts_stands_in_a_table_of_its_own(
    tmp_path: Path, markdown: tuple[str, ...]
) -> None:
    """The numbers of both stood beside each other, under the counts of the first."""
    files = [
        stored(tmp_path, name, of_texts("retrieval", sections, queries))
        for name, sections, queries in (("one", ["findings", "impression"], 402), ("two", ["findings"], 20))
    ]
    result = compare(*files, *markdown)
    assert result.exit_code == 0, result.exception
    assert result.output.count("retrieval: phantom, split test") == 2
    for line in (
        "402 queries, 402 distinct reports",
        "20 queries, 20 distinct reports",
        "retrieval of two: in a table of its own, for it was measured with other data.sections, queries",
    ):
        assert line in result.output
    against = compare(files[0], "--against", files[1])
    reason = "measured with other data.sections, queries, distinct reports than"
    assert f"- retrieval of {tmp_path}: {reason} {tmp_path}, so no difference" in against.output


def test_differences_are_of_all_tasks_that_both_sides_have(tmp_path: Path) -> None:
    runs = []
    for name in ("mgca", "plain"):
        item = measured(tmp_path, name, 0, [1, 2, 3, 4])
        item.evaluation.data["name"], item.evaluation.model["step"] = "phantom", 3
        if name == "plain":
            item.evaluation.results["retrieval"] = {"trained": {"image_to_text/R@5": Estimate(0.25)}}
            item.evaluation.notes["retrieval"] = {}
        results.write(item.evaluation, item.run / "evaluation.json")
        runs.append(item.run)
    for ours, theirs in (runs, runs[::-1]):
        result = compare(ours, "--against", theirs)
        assert result.exit_code == 0, result.exception
        assert f"- retrieval of {runs[0]}: not evaluated (medvlp evaluate" in result.output
        assert f"{TASK}: phantom" in result.output


def test_a_run_that_was_trained_on_after_its_evaluation_is_named(tmp_path: Path) -> None:
    item = measured(tmp_path, "mgca", 0, [1, 2, 3, 4])
    item.evaluation.data["name"], item.evaluation.model["step"] = "phantom", 3
    results.write(item.evaluation, item.run / "evaluation.json")
    told = f"{item.run} was evaluated at step 3 and has a checkpoint of step "
    for saved in (3, 8):
        (item.run / "checkpoints" / step_folder(saved)).mkdir(parents=True)
        for words in ((item.run,), (item.run, "--against", item.run)):
            result = compare(*words)
            assert result.exit_code == 0, result.exception
            assert (told in result.stderr) == (saved == 8)
            assert (f"{told}8 by now" in result.stderr) == (saved == 8)

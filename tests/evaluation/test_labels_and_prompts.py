"""Which labels count, which findings can be evaluated, and the sentences that stand for a finding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medvlp.evaluation import prompts
from medvlp.evaluation.labels import Count, binary, counts, not_evaluable
from medvlp.evaluation.report.results import EvaluationError
from medvlp.evaluation.splits import columns, report_groups, selection_split
from shards.entities.observations import observation_class
from shards.entities.vocabulary import DESCRIPTIONS
from shards.errors import UsageError
from shards.sources.phantom import FINDINGS
from shards.sources.phantom.phrases import NORMAL

STORED = np.array([[1, 0], [0, -1], [-1, np.nan], [1, 0], [0, 1]])


def test_uncertain_labels_are_left_out_or_take_a_side() -> None:
    np.testing.assert_array_equal(binary(STORED)[:, 0], [1, 0, np.nan, 1, 0])
    np.testing.assert_array_equal(binary(STORED, "positive")[:, 1], [0, 1, np.nan, 0, 1])
    np.testing.assert_array_equal(binary(STORED, "negative")[:, 1], [0, 0, np.nan, 0, 1])


def test_findings_with_too_few_of_a_class_are_listed_with_their_counts() -> None:
    truth = binary(STORED)
    assert counts(truth, ["a", "b"]) == {"a": Count(2, 2, 1), "b": Count(1, 2, 2)}
    (listed,) = not_evaluable(truth, ["a", "b"], "test")
    assert listed.finding == "b"
    assert "1 positives and 2 negatives in test" in listed.reason


def test_thresholds_are_never_chosen_on_the_evaluated_split() -> None:
    assert selection_split(["train", "valid", "test"], "test") == "valid"
    assert selection_split(["train", "valid", "test"], "valid") == "train"
    assert selection_split(["train", "valid", "test"], "valid", trained_on=True) is None
    assert selection_split(["test"], "test") is None


def test_unknown_labels_are_refused() -> None:
    assert columns(["a", "b", "c"], ["c", "a"]) == [2, 0]
    assert columns(["a", "b"], []) == [0, 1]
    with pytest.raises(UsageError, match="the dataset has a, b"):
        columns(["a", "b"], ["edema"])
    with pytest.raises(EvaluationError, match="no labels"):
        columns([], [])


def test_equal_reports_share_a_group_whatever_their_spacing_and_case() -> None:
    groups = report_groups(["No effusion.", "Clear lungs.", "no  effusion.\n"])
    assert groups[0] == groups[2] != groups[1]


def test_default_prompts_hold_the_findings_name() -> None:
    found = prompts.read(None).prompts("Pleural_Thickening")
    assert found is not None
    assert "there is pleural thickening" in found.positive
    assert "no pleural thickening" in found.negative
    assert prompts.read(None).prompts("sex=M") is None


def test_a_prompt_file_adds_synonyms_templates_and_sentences(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(
        "templates:\n  negative: ['without {finding}']\n"
        "findings:\n  Cardiomegaly:\n    synonyms: [enlarged heart]\n"
        "  edema:\n    positive: [wet lungs]\n"
        "  sex=M:\n    positive: [a man]\n    negative: [a woman]\n"
    )
    book = prompts.read(file)
    heart, edema, sex = (book.prompts(label) for label in ("cardiomegaly", "Edema", "sex=M"))
    assert heart is not None
    assert edema is not None
    assert heart.negative == ("without cardiomegaly", "without enlarged heart")
    assert "there is enlarged heart" in heart.positive
    assert edema == prompts.Prompts(("wet lungs",), ("without edema",))
    assert sex == prompts.Prompts(("a man",), ("a woman",))
    assert book.unused(["Edema", "sex=M"]) == ["cardiomegaly"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("templates: {positiv: ['{finding}']}", "unknown key 'positiv'"),
        ("templates: {positive: ['always']}", "needs {finding}"),
        ("templates: {positive: ['{finding} {side}']}", "no placeholder but {finding}"),
        ("findings: {edema: {synonyms: wet}}", "findings.edema.synonyms: expected a list"),
        ("findings: {edema: {synonyms: []}}", "expected a list"),
        ("findings: [edema]", "expected a mapping"),
        ("findings: {edema: {", "not valid YAML"),
    ],
)
def test_a_wrong_prompt_file_is_named_with_its_key(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(prompts.PromptError, match=message) as caught:
        prompts.read(file)
    assert str(file) in str(caught.value)


def test_negatives_may_describe_a_normal_study(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(
        "templates: {negative: ['normal chest', 'no {finding}']}\nfindings: {edema: {synonyms: [wet]}}\n"
    )
    found = prompts.read(file).prompts("edema")
    assert found is not None
    assert found.negative == ("normal chest", "no edema", "no wet")


def test_a_finding_may_have_no_negatives_but_not_no_positives(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("findings: {edema: {positive: [wet lungs], negative: []}}")
    assert prompts.read(file).prompts("edema") == prompts.Prompts(("wet lungs",), ())
    file.write_text("findings: {edema: {positive: []}}")
    with pytest.raises(prompts.PromptError, match="positive: expected a list"):
        prompts.read(file)


def test_the_shipped_medslip_prompts_are_rows_of_its_book(repository: Path) -> None:
    book = prompts.read(repository / "configs" / "tasks" / "zero-shot-phantom-medslip.yaml")
    assert not book.unused([spec.name for spec in FINDINGS])
    for spec in FINDINGS:
        found = book.prompts(spec.name)
        assert found is not None
        assert found.negative == ()
        assert [DESCRIPTIONS[observation_class(spec.name)]] == list(found.positive)


def test_a_missing_prompt_file_is_named() -> None:
    with pytest.raises(prompts.PromptError, match=r"nowhere\.yaml"):
        prompts.read("nowhere.yaml")


def test_the_shipped_chexpert_prompts_are_valid(repository: Path) -> None:
    book = prompts.read(repository / "configs" / "tasks" / "zero-shot-chexpert.yaml")
    assert len(book.findings) == 5
    for finding in book.findings:
        found = book.prompts(finding)
        assert found is not None
        assert len(found.positive) >= 4
        assert not set(found.positive) & set(found.negative)


def test_the_shipped_phantom_prompts_are_words_of_the_grammar(repository: Path) -> None:
    book = prompts.read(repository / "configs" / "tasks" / "zero-shot-phantom.yaml")
    assert not book.unused([spec.name for spec in FINDINGS])
    for spec in FINDINGS:
        found = book.prompts(spec.name)
        assert found is not None
        assert all(spec.name.split()[-1] in text.lower() for text in found.positive)
        assert {text.lower() for text in found.negative} == set(NORMAL)

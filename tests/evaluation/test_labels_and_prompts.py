"""Which labels count, which findings can be evaluated, and the sentences that stand for a finding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medvlp.evaluation import prompts
from medvlp.evaluation.labels import (
    Count,
    binary,
    blank_side,
    check_uncertain,
    counts,
    not_evaluable,
    sides,
)
from medvlp.evaluation.splits import chosen_labels, selection_split
from medvlp.evaluation.tasks.retrieval import report_groups
from shards.entities.observations import observation_class
from shards.entities.vocabulary import DESCRIPTIONS
from shards.errors import UsageError
from shards.sources.phantom import FINDINGS
from shards.sources.phantom.phrases import NORMAL

STORED = np.array([[1, 0], [0, -1], [-1, np.nan], [1, 0], [0, 1]])


def test_uncertain_labels_are_left_out_or_take_a_side() -> None:
    np.testing.assert_array_equal(binary(STORED)[:, 0], [1, 0, np.nan, 1, 0])
    np.testing.assert_array_equal(binary(STORED, 1.0)[:, 1], [0, 1, np.nan, 0, 1])
    np.testing.assert_array_equal(binary(STORED, 0.0)[:, 1], [0, 0, np.nan, 0, 1])


def test_the_published_choice_for_chexpert_is_by_finding_and_unknown_labels_are_absent() -> None:
    names = ["Pleural_Effusion", "cardiomegaly", "Fracture"]
    stored = np.array([[-1, -1, -1], [np.nan, 1, np.nan], [1, 0, 0]])
    per_class = binary(stored, sides("per_class", names))
    np.testing.assert_array_equal(per_class, [[1, 0, np.nan], [np.nan, 1, np.nan], [1, 0, 0]])
    blank = binary(stored, sides("exclude", names), blank_side("negative", names))
    np.testing.assert_array_equal(blank[1], [0, 1, 0])
    chexpert = [*names, "No Finding", "Support Devices", "Pleural Other"]
    assert [blank_side("auto", of) for of in (chexpert, names)] == [0.0, pytest.approx(np.nan, nan_ok=True)]
    with pytest.raises(UsageError, match=r"per_class is of atelectasis, .* none of them"):
        check_uncertain("per_class", ["Fracture"])


def test_findings_with_too_few_of_a_class_are_listed_with_their_counts() -> None:
    truth = binary(STORED)
    assert counts(truth, ["a", "b"]) == {"a": Count(2, 2, 1), "b": Count(1, 2, 2)}
    (listed,) = not_evaluable(truth, ["a", "b"], "test")
    assert listed.finding == "b"
    assert "1 positives and 2 negatives in test" in listed.reason


def test_thresholds_are_never_chosen_on_the_evaluated_split() -> None:
    assert selection_split(["train", "valid", "test"], "test") == "valid"
    assert selection_split(["train", "valid", "test"], "valid") == "train"
    assert selection_split(["train", "valid", "test"], "valid", fits_to_labels=True) is None
    assert selection_split(["test"], "test") is None


def test_unknown_labels_are_refused() -> None:
    assert chosen_labels(["a", "b", "c"], ["c", "a"]) == ["c", "a"]
    assert chosen_labels(["a", "b"], []) == ["a", "b"]
    assert chosen_labels([], []) == []
    for names, message in ((["a", "b"], "the dataset has a, b"), ([], "the dataset has no labels")):
        with pytest.raises(UsageError, match=message):
            chosen_labels(names, ["edema"])
    with pytest.raises(UsageError, match="--label 'a' stands twice, and would weigh twice"):
        chosen_labels(["a", "b"], ["a", "b", "a"])


def test_equal_reports_share_a_group_whatever_their_spacing_and_case() -> None:
    groups = report_groups(["No effusion.", "Clear lungs.", "no  effusion.\n"])
    assert groups[0] == groups[2] != groups[1]


def test_default_prompts_hold_the_findings_name() -> None:
    found = prompts.read(None).prompts("Pleural_Thickening")
    assert found is not None
    assert "there is pleural thickening" in found.positive
    assert "no pleural thickening" in found.negative
    assert prompts.read(None).prompts("sex=M") is None


CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip


@pytest.mark.parametrize(
    "label",
    ["No Finding", "No_Findings", "NoFinding", "Normal", "healthy", "No abnormality", "no acute disease",
     "Normal CXR", "No acute cardiopulmonary process", "Without abnormal findings", "normal study", "None"],
)  # fmt: skip
def test_a_normal_study_has_states_of_a_normal_chest(label: str) -> None:
    assert prompts.read(None).prompts(label) == prompts.Prompts(prompts.NORMAL, prompts.ABNORMAL)


@pytest.mark.parametrize("label", ["No Effusion", "NoEffusion", "Without_Effusion", "absence of effusion"])
def test_a_denial_exchanges_the_sides_of_its_finding(label: str) -> None:
    effusion, denied = (prompts.read(None).prompts(name) for name in ("Effusion", label))
    assert effusion is not None
    assert denied == prompts.Prompts(effusion.negative, effusion.positive)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("EnlargedCardiomediastinum", "enlarged cardiomediastinum"),
        ("Enlarged_Cardiomediastinum", "enlarged cardiomediastinum"),
        ("enlarged-cardiomediastinum", "enlarged cardiomediastinum"),
        ("PleuralThickening", "pleural thickening"),
        ("COPD", "copd"),
        ("COPDSigns", "copd signs"),
        ("Non-Calcified_Nodule", "non calcified nodule"),
    ],
)
def test_names_of_several_words(label: str, words: str) -> None:
    found = prompts.read(None).prompts(label)
    assert found is not None
    assert found.positive[0] == words
    assert found.negative[0] == f"no {words}"


def test_sentences_agree_with_plural_names() -> None:
    book = prompts.read(None)
    for label, verb in (("Support Devices", "are"), ("Fractures", "are"), ("Fracture", "is"), ("Mass", "is"),
                        ("Atelectasis", "is"), ("Opacities", "are"), ("Thymus", "is")):  # fmt: skip
        found, name = book.prompts(label), prompts.normalise(label)
        assert found is not None
        assert f"there {verb} {name}" in found.positive
        assert f"there {verb} no {name}" in found.negative
        assert f"{name} {verb} absent" in found.negative


@pytest.mark.parametrize("label", ["Other", "Others", "Lung Other", "unknown", "Other findings"])
def test_a_label_that_names_no_finding_has_no_prompts(label: str, tmp_path: Path) -> None:
    assert prompts.read(None).prompts(label) is None
    file = tmp_path / "prompts.yaml"
    file.write_text(f"findings: {{'{label}': {{positive: [a sign], negative: []}}}}")
    assert prompts.read(file).prompts(label) == prompts.Prompts(("a sign",), ())


def test_every_label_of_chexpert_has_sensible_sentences() -> None:
    for label in CHEXPERT:
        found = prompts.read(None).prompts(label)
        assert found is not None, label
        assert not set(found.positive) & set(found.negative)
        for sentence in (*found.positive, *found.negative):
            assert "no no" not in sentence
            assert "other" not in sentence.split()
            assert "devices is" not in sentence
    assert "pleural thickening" in str(prompts.read(None).prompts("Pleural Other"))


def test_a_prompt_file_speaks_for_a_normal_study(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(
        "findings: {No Finding: {positive: [clear], negative: [ill]}, normal: {synonyms: [well]}}"
    )
    book = prompts.read(file)
    assert book.prompts("NoFinding") == prompts.Prompts(("clear",), ("ill",))
    assert book.prompts("Normal") == prompts.Prompts((*prompts.NORMAL, "well"), prompts.ABNORMAL)


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
        ("findings: {edema: {", "is not YAML"),
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


def test_words_of_a_prompt_file_are_text_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(
        "findings:\n  On:\n    positive: [Yes, 1.0, null]\n    negative: [No]\n  012:\n    synonyms: [off]\n"
    )
    book = prompts.read(path)
    assert book.prompts("ON") == prompts.Prompts(("Yes", "1.0", "null"), ("No",))
    assert book.unused(["on"]) == ["012"]
    path.write_text("findings:\n  Pleural_Effusion: {synonyms: [a]}\n  pleural effusion: {synonyms: [b]}\n")
    with pytest.raises(prompts.PromptError, match="'pleural effusion' is given twice"):
        prompts.read(path)

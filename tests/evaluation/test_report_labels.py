"""What reports state: by the rules (phantoms' exact labels, CheXpert's names) and from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medvlp.data.report import scored_words
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.clinical import LabelTable, clinical_efficacy
from medvlp.evaluation.report_labels import labelled, read_labels, stated
from medvlp.evaluation.task import EvaluationError
from shards.sources.phantom import FINDINGS, PhantomSource
from shards.sources.phantom.report import write_report
from shards.sources.phantom.seeds import Stream, generator

PHANTOM = [spec.name for spec in FINDINGS]
CHEXPERT = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
]  # fmt: skip


def test_the_rules_find_what_is_drawn_in_phantoms_reports() -> None:
    source = PhantomSource(250, 64, 0)
    texts, truth = [], []
    for i in range(250):
        findings, prior, view = source.plan(i)
        report = write_report(findings, prior, view, generator(0, Stream.REPORT, i))
        texts.append(
            " ".join(scored_words(" ".join([report.sections["findings"], report.sections["impression"]])))
        )
        labels = {finding.name: 1.0 if finding.certain else -1.0 for finding in findings}
        truth.append([labels.get(name, 0.0) for name in PHANTOM])
    assert labelled(PHANTOM) == PHANTOM
    found = clinical_efficacy(
        stated(texts, PHANTOM),
        LabelTable(PHANTOM, np.array(truth)),
        PHANTOM,
        PatientBootstrap(range(250), 0, 0),
    )
    assert found["f1/micro"].value > 0.97
    assert min(found[f"f1/{name}"].value for name in PHANTOM) > 0.9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No focal consolidation, pleural effusion or pneumothorax.",
         {"Consolidation": 0, "Pleural Effusion": 0, "Pneumothorax": 0, "No Finding": 1}),
        ("Possible edema. A pacemaker is seen.", {"Edema": -1, "Support Devices": 1, "No Finding": 0}),
        ("A chest tube is in place.", {"Support Devices": 1, "No Finding": 1}),
        ("There is a nodule and an opacity.", {"Lung Lesion": 1, "Lung Opacity": 1, "Consolidation": None}),
        ("Pneumonia in the left lower lobe.", {"Pneumonia": 1, "Consolidation": None}),
        ("", {"No Finding": 1, "Edema": None}),
    ],
)  # fmt: skip
def test_labels_of_chexpert(text: str, expected: dict[str, int | None]) -> None:
    assert labelled(CHEXPERT) == CHEXPERT
    table = stated([text], CHEXPERT)
    for name, value in expected.items():
        (found,) = table.columns([name])[0]
        assert (None if np.isnan(found) else found) == value, name


def test_a_class_that_is_a_label_of_its_own_is_no_other_label() -> None:
    """Where "Mass" and "Nodule" are labels, "Lung Lesion" is neither of them."""
    names = ["Lung Lesion", "Mass", "Nodule", "Fibrosis", "sex=M"]
    table = stated(["There is a mass."], names[:3])
    assert np.array_equal(table.values, [[np.nan, 1, np.nan]], equal_nan=True)
    assert labelled(names) == ["Lung Lesion", "Mass", "Nodule"]


def test_labels_from_a_file_belong_to_the_texts_that_were_generated(tmp_path: Path) -> None:
    file, texts = tmp_path / "labels.csv", {"a": "no edema .", "b": "edema ."}
    file.write_text("key,generated,Edema,Mass\nb,edema .,1,\na,no edema .,0,-1.0\n")
    table = read_labels(file, texts)
    assert table.names == ["Edema", "Mass"]
    assert np.array_equal(table.values, [[0, -1], [1, np.nan]], equal_nan=True)
    for content, message in [
        ("key,Edema\na,1\n", "no column 'generated'"),
        ("key,generated,Edema\na,edema .,1\n", "row 2: is not the report that was generated"),
        ("key,generated,Edema\na,no edema .,1\na,no edema .,1\n", "row 3: stands twice"),
        ("key,generated,Edema\na,no edema .,1\n", "1 of 2 generated reports have no row"),
        ("key,generated,Edema\na,no edema .,yes\n", "row 2: a label is not"),
        ("key,generated,Edema\na,no edema .,2\n", "row 2: a label is not"),
    ]:
        file.write_text(content)
        with pytest.raises(EvaluationError, match=message):
            read_labels(file, texts)

"""Stored resamples come back as they were, and only what was measured alike is compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap, Resampled, estimate
from medvlp.evaluation.metrics.paired import paired_difference
from medvlp.evaluation.report import differences, resamples
from medvlp.evaluation.report.comparison import options_of
from medvlp.evaluation.report.differences import Measured
from medvlp.evaluation.report.results import FOLDER, Evaluation, KeptFile
from medvlp.evaluation.task import EvaluationError

FINGERPRINT, PATIENTS = "0123456789abcdef" * 2, ("a", "b", "c", "d")
TASK = "zero-shot"


def measured(
    folder: Path,
    name: str,
    seed: int,
    values: Sequence[float],
    patients: Sequence[str] = PATIENTS,
    **method: Any,
) -> Measured:
    """A run whose metric is the mean of a value a patient, evaluated and stored."""
    run = folder / f"{name}-{seed}"
    bootstrap = PatientBootstrap(patients, 100, 3)
    found = bootstrap.estimate(lambda weights: weights @ np.array(values) / weights.sum(axis=1))
    models = {
        "trained": {"auroc/macro": found, "auroc/edema": Estimate(0.5)},
        "chance": {"auroc/macro": Estimate(0.5)},
    }
    plain, drawn = resamples.taken_from(models, {bootstrap.fingerprint})
    checksum = resamples.write(drawn, run / FOLDER / TASK / f"whole-{FINGERPRINT[:16]}")
    kept = {TASK: {"whole": KeptFile(FINGERPRINT, checksum)}}
    return Measured(run, Evaluation(
        {"name": name}, {"fingerprint": "f", "split": "test"}, {"uncertain": "exclude", "labels": []},
        {TASK: plain}, {TASK: {}}, {"train": {"seed": seed}, "method": method}, resamples=kept,
    ))  # fmt: skip


def test_resamples_come_back_without_a_patient(tmp_path: Path) -> None:
    made = measured(tmp_path, "mgca", 0, [0.1, 0.2, 0.3, 1 / 3])
    found = resamples.read(made.run, made.evaluation, TASK)
    expected = PatientBootstrap(PATIENTS, 100, 3)
    assert found.fingerprints == (expected.fingerprint,)
    drawn = expected.draws(lambda weights: weights @ np.array([0.1, 0.2, 0.3, 1 / 3]) / 4)
    np.testing.assert_allclose(found.drawn["trained"]["auroc/macro"], drawn, rtol=1e-6)
    assert found.drawn.keys() == {"trained"}
    assert found.drawn["trained"].keys() == {"auroc/macro"}, "a number without resamples has none"
    assert all(type(of) is Estimate for of in made.evaluation.results[TASK]["trained"].values())
    (file,) = made.run.rglob(resamples.FILE)
    assert load_file(file)["trained"].shape == (1, 100)


def test_fingerprints_are_of_patients_number_and_seed() -> None:
    same = PatientBootstrap(["b", "a", "a"], 10, 0).fingerprint
    assert same == PatientBootstrap(["a", "b"], 10, 0).fingerprint
    others = [(["a", "c"], 10, 0), (["a", "b"], 11, 0), (["a", "b"], 10, 1), (["a, b"], 10, 0)]
    assert len({same, *(PatientBootstrap(*of).fingerprint for of in others)}) == 5


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    values = {("mgca", 0): [4, 5, 6, 7], ("mgca", 1): [4, 5, 7, 9], ("plain", 0): [1, 2, 3, 4],
              ("plain", 1): [1, 2, 4, 5]}  # fmt: skip
    of = {key: measured(tmp_path, *key, given, weight=key[0]) for key, given in values.items()}
    pairs = [(of["mgca", seed], of["plain", seed]) for seed in (0, 1)]
    ((names, group),) = differences.groups(pairs).items()
    assert names == ("mgca", "plain")
    (row,) = differences.rows(group, TASK)
    assert (row.metric, row.ours, row.theirs) == ("auroc/macro", 5.875, 2.75)
    drawn = {key: resamples.read(item.run, item.evaluation, TASK).drawn["trained"]["auroc/macro"]
             for key, item in of.items()}  # fmt: skip
    expected = paired_difference(
        np.array([5.5, 6.25]), np.array([2.5, 3.0]),
        np.stack([drawn["mgca", 0], drawn["mgca", 1]]), np.stack([drawn["plain", 0], drawn["plain", 1]]),
    )  # fmt: skip
    assert row.difference == expected
    assert differences.different_keys(of["mgca", 0].evaluation, of["plain", 0].evaluation) == [
        "method.weight"
    ]


def test_what_is_not_alike_is_refused(tmp_path: Path) -> None:
    ours = measured(tmp_path, "mgca", 0, [1, 2, 3, 4])
    other_seed = measured(tmp_path, "plain", 1, [1, 2, 3, 4])
    with pytest.raises(EvaluationError, match=r"train\.seed=0.*of 1.*same order"):
        differences.groups([(ours, other_seed)])
    plain = measured(tmp_path, "plain", 0, [1, 2, 3, 4])
    with pytest.raises(EvaluationError, match=r"another run of mgca has train\.seed=0"):
        differences.groups([(ours, plain), (ours, plain)])
    patients = measured(tmp_path / "other", "plain", 0, [1, 2, 3, 4], ("a", "b", "c", "e"))
    with pytest.raises(EvaluationError, match="on other patients"):
        differences.rows([(ours, patients)], TASK)
    for section, key in (("data", "fingerprint"), ("settings", "uncertain"), ("settings", "labels")):
        changed = measured(tmp_path, "plain", 0, [1, 2, 3, 4])
        getattr(changed.evaluation, section)[key] = "other"
        with pytest.raises(EvaluationError, match=rf"another {section}\.{key}"):
            differences.rows([(ours, changed)], TASK)
    plain.evaluation.settings["options"] = {TASK: {"prompts": "other"}}
    with pytest.raises(EvaluationError, match="zero-shot was evaluated with another prompts than"):
        differences.rows([(ours, plain)], TASK)


def test_files_are_compared_by_their_content_and_not_where_they_lie(tmp_path: Path) -> None:
    ours, theirs = (measured(tmp_path, name, 0, [1, 2, 3, 4]) for name in ("mgca", "plain"))
    for item in (ours, theirs):
        item.evaluation.settings["options"] = {TASK: {"prompts": f"{item.run}/prompts.yaml", "pool": "mean"}}
        item.evaluation.settings["files"] = {TASK: {"prompts": "0123"}}
    assert differences.rows([(ours, theirs)], TASK)
    theirs.evaluation.settings["files"] = {TASK: {"prompts": "4567"}}
    with pytest.raises(EvaluationError, match="another prompts"):
        differences.rows([(ours, theirs)], TASK)
    # Labels that another labeller gave what each run has written are never the same file.
    for item in (ours, theirs):
        item.evaluation.settings["options"] = {"report": {"ce_labels": f"{item.run}/labels.csv"}}
        item.evaluation.settings["files"] = {"report": {"ce_labels": item.run.name}}
    assert options_of(ours.evaluation, "report") == options_of(theirs.evaluation, "report")
    theirs.evaluation.settings["options"] = {"report": {"ce_labels": None}}
    theirs.evaluation.settings["files"] = {"report": {}}
    assert options_of(ours.evaluation, "report") != options_of(theirs.evaluation, "report")


def test_a_method_that_cannot_do_the_task_has_no_row(tmp_path: Path) -> None:
    ours, theirs = (measured(tmp_path, name, 0, [1, 2, 3, 4]) for name in ("mgca", "medslip"))
    theirs.evaluation.results[TASK] = {}
    assert differences.rows([(ours, theirs)], TASK) == []


def test_another_file_at_their_place_is_refused(tmp_path: Path) -> None:
    made = measured(tmp_path, "mgca", 0, [1, 2, 3, 4])
    (file,) = made.run.rglob(resamples.FILE)
    whole, draw = file.read_bytes(), random.Random(0)
    file.write_bytes(whole[:-1] + b"\0")
    with pytest.raises(EvaluationError, match="not the resamples of this evaluation"):
        resamples.read(made.run, made.evaluation, TASK)
    refused = 0
    for _ in range(200):  # also where a stranger's evaluation.json has the checksum of the rubbish
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.3 else data)
        made.evaluation.resamples[TASK]["whole"].checksum = xxhash.xxh3_128_hexdigest(file.read_bytes())
        try:
            resamples.read(made.run, made.evaluation, TASK)
        except EvaluationError as error:
            refused += "\n" not in str(error)
    assert refused > 50
    file.unlink()
    with pytest.raises(EvaluationError, match="cannot be read"):
        resamples.read(made.run, made.evaluation, TASK)
    made.evaluation.resamples[TASK]["../whole"] = made.evaluation.resamples[TASK].pop("whole")
    with pytest.raises(EvaluationError, match="a unit that is none"):
        resamples.read(made.run, made.evaluation, TASK)
    made.evaluation.resamples = {}
    with pytest.raises(EvaluationError, match="no stored resamples"):
        resamples.read(made.run, made.evaluation, TASK)


def test_an_estimate_equals_the_same_numbers_with_draws() -> None:
    drawn = estimate(0.5, np.array([0.4, 0.6]))
    assert isinstance(drawn, Resampled)
    assert drawn == estimate(0.5, np.array([0.4, 0.6]))

"""Linear probes on numbers whose answer is known: a perfect model, a blind one, shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from medvlp.config import Config, ConfigError
from medvlp.evaluation.splits import Split
from medvlp.evaluation.task import EvaluationError
from medvlp.evaluation.tasks import linear_probe
from medvlp.evaluation.tasks.linear_probe import LinearProbe, LinearProbeConfig, patient_fraction
from tests.evaluation.prepared import Prepared, make_splits

PROBE = LinearProbe(LinearProbeConfig(fractions=[0.1, 1.0]))


@pytest.fixture
def splits() -> dict[str, Split]:
    return make_splits()


def test_probes_find_what_the_features_hold(splits: dict[str, Split]) -> None:
    result = Prepared(splits).run(PROBE)
    assert result.models["trained"]["auroc@100%/macro"].low > 0.9
    assert result.models["trained"]["auroc@10%/macro"].value > 0.8
    assert result.models["pixels"]["auroc@100%/macro"].low > 0.9
    blind = result.models["untrained"]["auroc@100%/macro"]
    assert blind.low < 0.5 < blind.high
    assert result.notes["fractions"]["10%"]["patients"] == 12
    assert result.notes["fractions"]["100%"]["samples"] == 240
    assert set(result.notes["fractions"]["100%"]["penalties"]) == {"trained", "untrained"}


def test_probes_of_shuffled_labels_find_nothing(splits: dict[str, Split]) -> None:
    rng = np.random.default_rng(0)
    for split in splits.values():
        split.labels = split.labels[rng.permutation(len(split.labels))]
    result = Prepared(splits).run(PROBE)
    for model in ("trained", "pixels"):
        found = result.models[model]["auroc@100%/macro"]
        assert found.low < 0.5 < found.high


def test_a_fraction_without_a_class_is_listed(splits: dict[str, Split]) -> None:
    few = np.isin(np.arange(240), patient_fraction(splits["train"].patients, 0.1, 0))
    splits["train"].labels[few, 1] = 0
    result = Prepared(splits).run(PROBE)
    assert "auroc@10%/mass" not in result.models["trained"]
    assert "auroc@100%/mass" in result.models["trained"]
    (item,) = result.notes["not_evaluable"]
    assert item["finding"] == "mass"
    assert "10% of train" in item["reason"]


def test_the_penalty_cannot_be_chosen_without_both_classes(splits: dict[str, Split]) -> None:
    splits["valid"].labels[:] = 0
    with pytest.raises(EvaluationError, match="C cannot be chosen"):
        Prepared(splits).run(PROBE)


def test_fractions_are_nested_and_by_patient() -> None:
    patients = np.repeat([f"p{number}" for number in range(100)], 3)
    small, large = patient_fraction(patients, 0.1, 7), patient_fraction(patients, 0.5, 7)
    assert len(small) == 30
    assert set(small) < set(large)
    assert len(np.unique(patients[small])) == 10
    assert not np.array_equal(small, patient_fraction(patients, 0.1, 8))
    assert len(patient_fraction(patients, 1.0, 7)) == 300
    assert len(patient_fraction(patients, 0.0001, 7)) == 3, "at least one patient"


@pytest.mark.parametrize("newton_features", [512, 1])
def test_both_solvers_reach_the_solution_of_a_fit_from_scratch(
    newton_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_probe, "NEWTON_FEATURES", newton_features)
    rng = np.random.default_rng(2)
    features = rng.normal(size=(300, 6))
    labels = (features[:, :2] + rng.normal(size=(300, 2)) > 0).astype(float)
    fitted = linear_probe.fit((features[:200], labels[:200]), (features[200:], labels[200:]))
    for column in range(2):
        scratch = LogisticRegression(C=fitted.penalty, tol=1e-8).fit(features[:200], labels[:200, column])
        np.testing.assert_allclose(
            fitted.scores(features)[:, column], scratch.decision_function(features), atol=0.02, rtol=0.02
        )


def test_the_penalty_and_the_probes_do_not_look_at_the_evaluated_split(splits: dict[str, Split]) -> None:
    before = Prepared(splits).run(PROBE).notes["fractions"]
    splits["test"].labels[:] = 1 - splits["test"].labels
    splits["test"].arrays.models["trained"].features[:] = 7
    assert Prepared(splits).run(PROBE).notes["fractions"] == before


def test_a_fraction_is_a_unit_of_its_own(splits: dict[str, Split]) -> None:
    whole = Prepared(splits).run(PROBE)
    assert [unit.name for unit in PROBE.units()] == ["fraction-0.1", "fraction-1"]
    for unit, share in zip(PROBE.units(), ("10%", "100%"), strict=True):
        part = Prepared(splits).run(PROBE, unit)
        assert part.models["trained"] == {
            name: value
            for name, value in whole.models["trained"].items()
            if name.startswith(f"auroc@{share}/")
        }


def test_a_fraction_that_stands_twice_is_named() -> None:
    LinearProbeConfig().check(Config())
    with pytest.raises(ConfigError, match=r"fractions=\[0\.1, 0\.1\]: one of them stands twice"):
        LinearProbeConfig(fractions=[0.1, 0.1]).check(Config())

"""The three tasks on numbers whose answer is known: a perfect model, a blind one, shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from medvlp.evaluation.baselines import ALPHAS, PixelRidge, report_embeddings
from medvlp.evaluation.features import ModelArrays, SplitArrays
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.prompts import Prompts
from medvlp.evaluation.report.results import EvaluationError
from medvlp.evaluation.splits import Split
from medvlp.evaluation.tasks import linear_probe, retrieval
from medvlp.evaluation.tasks.linear_probe import LinearProbe, patient_fraction
from medvlp.evaluation.tasks.zero_shot import Ensemble, ZeroShot

NAMES = ["edema", "mass"]


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def make_split(name: str, count: int, seed: int, models: tuple[str, ...] = ("trained", "untrained")) -> Split:
    """Two images a patient. "trained" and the pixels see the labels, "untrained" is noise."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 2)) < 0.4).astype(float)
    seen = np.concatenate([2 * labels - 1, np.zeros((count, 6))], axis=1) + 0.5 * rng.normal(size=(count, 8))
    report_axis = rng.normal(size=(count, 8))
    blind = rng.normal(size=(count, 8))
    made = {
        "trained": ModelArrays(unit(seen), unit(report_axis + 3 * seen), seen),
        "untrained": ModelArrays(unit(blind), unit(rng.normal(size=(count, 8))), blind),
    }
    pixels = np.concatenate([labels, rng.random((count, 62))], axis=1).astype(np.float32)
    words = [
        " ".join(word if label else f"no{word}" for word, label in zip(NAMES, row, strict=True))
        for row in labels
    ]
    reports = [f"{text} remark{number % 40}" for number, text in enumerate(words)]
    patients = np.array([f"{name}-{number // 2}" for number in range(count)])
    arrays = SplitArrays(np.arange(count), pixels, {model: made[model] for model in models})
    return Split(name, patients, reports, labels, arrays)


@pytest.fixture
def splits() -> dict[str, Split]:
    return {name: make_split(name, count, seed) for seed, (name, count) in enumerate(SIZES.items())}


SIZES = {"train": 240, "valid": 100, "test": 160}
ENSEMBLE = Ensemble.of({name: Prompts((name, f"some {name}"), (f"no {name}",)) for name in NAMES})


def prompt_embeddings() -> np.ndarray:
    """Positive prompts point along the finding's axis, negative ones against it."""
    axes = np.eye(8)[:2]
    return np.stack([axes[0], axes[0], -axes[0], axes[1], axes[1], -axes[1]])


def zero_shot(splits: dict[str, Split], **changes) -> ZeroShot:
    test = splits["test"]
    arguments = {
        "split": test,
        "selection": splits["valid"],
        "train": splits["train"],
        "names": NAMES,
        "columns": [0, 1],
        "ensemble": ENSEMBLE,
        "uncertain": "exclude",
        "bootstrap": PatientBootstrap(test.patients, 200, 0),
    }
    return ZeroShot(**(arguments | changes))


def test_zero_shot_tells_a_model_that_sees_from_one_that_does_not(splits: dict[str, Split]) -> None:
    result = zero_shot(splits).evaluate({"trained": prompt_embeddings(), "untrained": prompt_embeddings()})
    trained, blind, pixels = (
        result.models[name]["auroc/macro"] for name in ("trained", "untrained", "pixels")
    )
    assert trained.value > 0.9
    assert trained.low > 0.8
    assert blind.low < 0.5 < blind.high
    assert pixels.value > 0.95
    assert result.models["chance"]["auroc/macro"].value == 0.5
    assert result.models["trained"]["f1/edema"].value > 0.8
    assert result.notes["threshold_split"] == "valid"
    assert set(result.notes["thresholds"]["pixels"]) == set(NAMES)
    assert result.notes["prompts"]["mass"]["negative"] == ("no mass",)


def test_the_threshold_does_not_look_at_the_evaluated_split(splits: dict[str, Split]) -> None:
    before = zero_shot(splits).evaluate({"trained": prompt_embeddings()}).notes["thresholds"]
    splits["test"].labels[:] = 1 - splits["test"].labels
    after = zero_shot(splits).evaluate({"trained": prompt_embeddings()}).notes["thresholds"]
    assert before == after


def test_without_a_selection_split_there_is_no_f1(splits: dict[str, Split]) -> None:
    result = zero_shot(splits, selection=None).evaluate({"trained": prompt_embeddings()})
    assert result.notes["threshold_split"] is None
    assert {metric.split("/")[0] for metric in result.models["trained"]} == {"auroc", "pr_auc"}


def test_without_training_labels_the_pixel_baseline_says_so(splits: dict[str, Split]) -> None:
    result = zero_shot(splits, train=None).evaluate({"trained": prompt_embeddings()})
    assert "pixels" not in result.models
    assert "not available" in result.notes["pixels"]


def test_a_method_with_its_own_score_has_its_scores_averaged(splits: dict[str, Split]) -> None:
    expected = zero_shot(splits).evaluate({"trained": prompt_embeddings()}).models["trained"]
    for split in splits.values():
        arrays = split.arrays.models["trained"]
        arrays.scores = arrays.image @ prompt_embeddings().T
    found = zero_shot(splits).evaluate({"trained": None}).models["trained"]
    assert found["auroc/macro"].value == pytest.approx(expected["auroc/macro"].value)


def test_a_finding_without_negative_prompts_has_the_score_of_its_positives(splits: dict[str, Split]) -> None:
    ensemble = Ensemble.of({name: Prompts((name, f"some {name}"), ()) for name in NAMES})
    axes = np.eye(8)[[0, 0, 1, 1]]
    embedded = zero_shot(splits, ensemble=ensemble).evaluate({"trained": axes}).models["trained"]
    assert embedded["auroc/macro"].value > 0.9
    for split in splits.values():
        arrays = split.arrays.models["trained"]
        arrays.scores = arrays.image @ axes.T
    scored = zero_shot(splits, ensemble=ensemble).evaluate({"trained": None}).models["trained"]
    assert scored["auroc/macro"].value == pytest.approx(embedded["auroc/macro"].value)


def test_findings_without_both_classes_or_prompts_are_listed(splits: dict[str, Split]) -> None:
    splits["test"].labels[:, 1] = 0
    splits["test"].labels[0, 1] = 1
    ensemble = Ensemble.of({name: Prompts((name,), (f"no {name}",)) for name in NAMES})
    task = zero_shot(splits, ensemble=ensemble, names=[*NAMES, "sex=M"], columns=[0, 1, 0])
    result = task.evaluate({"trained": prompt_embeddings()[[0, 2, 3, 5]]})
    reasons = {item["finding"]: item["reason"] for item in result.notes["not_evaluable"]}
    assert reasons == {
        "sex=M": "no prompts",
        "mass": "1 positives and 159 negatives in test, needs 2 of each",
    }
    assert "auroc/mass" not in result.models["trained"]
    splits["test"].labels[:] = 1
    with pytest.raises(EvaluationError, match="no finding can be evaluated"):
        zero_shot(splits).evaluate({"trained": prompt_embeddings()})


def test_uncertain_labels_do_not_enter_a_metric(splits: dict[str, Split]) -> None:
    whole = zero_shot(splits).evaluate({"trained": prompt_embeddings()})
    splits["test"].labels[:50, 0] = -1
    part = zero_shot(splits).evaluate({"trained": prompt_embeddings()})
    assert part.notes["counts"]["edema"]["excluded"] == 50
    assert part.models["trained"]["auroc/mass"] == whole.models["trained"]["auroc/mass"]
    assert part.models["trained"]["auroc/edema"] != whole.models["trained"]["auroc/edema"]


def test_retrieval_beside_its_baselines_and_chance(splits: dict[str, Split]) -> None:
    result = retrieval.evaluate(splits["test"], splits["train"], NAMES, [0, 1], "exclude", 200, 0)
    for direction in retrieval.DIRECTIONS:
        found = {model: metrics[f"{direction}/R@10"] for model, metrics in result.models.items()}
        assert found["trained"].low > found["chance"].value
        assert found["untrained"].low < found["chance"].value * 1.5
        assert found["pixels"].low > found["chance"].value, "the pixels hold the words of the reports"
        precision = {
            model: metrics[f"{direction}/P@5/edema"].value for model, metrics in result.models.items()
        }
        assert precision["trained"] > 0.8 > 0.6 > precision["untrained"]
        assert precision["chance"] == pytest.approx(splits["test"].labels[:, 0].mean())
    assert (
        result.notes["distinct_reports"] == len(set(splits["test"].reports)) < result.notes["queries"] == 160
    )


def test_retrieval_leaves_out_samples_without_a_report(splits: dict[str, Split]) -> None:
    test = splits["test"]
    test.reports[:100] = [" "] * 100
    result = retrieval.evaluate(test, None, NAMES, [0, 1], "exclude", 50, 0)
    assert (result.notes["queries"], result.notes["without_report"]) == (60, 100)
    assert "pixels" not in result.models
    assert {"finding": "edema", "reason": "P@100: only 60 labelled candidates"} in result.notes[
        "not_evaluable"
    ]
    test.reports[:] = [""] * 160
    with pytest.raises(EvaluationError, match="0 samples of test have a report"):
        retrieval.evaluate(test, None, NAMES, [0, 1], "exclude", 50, 0)


def probe(splits: dict[str, Split], **changes) -> LinearProbe:
    test = splits["test"]
    arguments = {
        "split": test,
        "selection": splits["valid"],
        "train": splits["train"],
        "names": NAMES,
        "columns": [0, 1],
        "uncertain": "exclude",
        "fractions": [0.1, 1.0],
        "seed": 0,
        "bootstrap": PatientBootstrap(test.patients, 200, 0),
    }
    return LinearProbe(**(arguments | changes))


def test_probes_find_what_the_features_hold(splits: dict[str, Split]) -> None:
    result = probe(splits).evaluate()
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
    result = probe(splits).evaluate()
    for model in ("trained", "pixels"):
        found = result.models[model]["auroc@100%/macro"]
        assert found.low < 0.5 < found.high


def test_a_fraction_without_a_class_is_listed(splits: dict[str, Split]) -> None:
    few = np.isin(np.arange(240), patient_fraction(splits["train"].patients, 0.1, 0))
    splits["train"].labels[few, 1] = 0
    result = probe(splits).evaluate()
    assert "auroc@10%/mass" not in result.models["trained"]
    assert "auroc@100%/mass" in result.models["trained"]
    (item,) = result.notes["not_evaluable"]
    assert item["finding"] == "mass"
    assert "10% of train" in item["reason"]


def test_the_penalty_cannot_be_chosen_without_both_classes(splits: dict[str, Split]) -> None:
    splits["valid"].labels[:] = 0
    with pytest.raises(EvaluationError, match="C cannot be chosen"):
        probe(splits).evaluate()


def test_fractions_are_nested_and_by_patient() -> None:
    patients = np.repeat([f"p{number}" for number in range(100)], 3)
    small, large = patient_fraction(patients, 0.1, 7), patient_fraction(patients, 0.5, 7)
    assert len(small) == 30
    assert set(small) < set(large)
    assert len(np.unique(patients[small])) == 10
    assert not np.array_equal(small, patient_fraction(patients, 0.1, 8))
    assert len(patient_fraction(patients, 1.0, 7)) == 300
    assert len(patient_fraction(patients, 0.0001, 7)) == 3, "at least one patient"


def test_pixel_ridge_fits_each_finding_on_its_known_labels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(200, 30))
    targets = np.stack([pixels[:, 0] > 0, pixels[:, 1] > 0, pixels[:, 2] > 0], axis=1).astype(float)
    targets[50:, 1], targets[:, 2] = np.nan, np.nan
    ridge = PixelRidge(pixels)
    predicted = ridge.fit(targets[:150], np.arange(150)).predict(pixels[150:])
    alone = ridge.fit(targets[:50, 1:2], np.arange(50)).predict(pixels[150:])
    np.testing.assert_allclose(predicted[:, 1], alone[:, 0])
    assert np.corrcoef(predicted[:, 0], pixels[150:, 0])[0, 1] > 0.8
    assert (predicted[:, 2] == 0).all()


def test_pixel_ridge_leaves_out_the_few_unknown_rows_and_keeps_its_fits() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(200, 30))
    targets = (pixels[:, :2] + rng.normal(size=(200, 2)) > 0).astype(float)
    targets[:10, 1] = np.nan
    ridge = PixelRidge(pixels)
    fitted = ridge.fit(targets)
    assert ridge.fit(targets.copy()) is fitted
    assert ridge.fit(targets[:100], np.arange(100)) is not fitted
    inputs = StandardScaler().fit_transform(pixels)
    whole = RidgeCV(ALPHAS).fit(inputs, targets[:, 0])
    np.testing.assert_allclose(fitted.predict(pixels)[:, 0], whole.predict(inputs))
    part = [Ridge(alpha).fit(inputs[10:], targets[10:, 1]).predict(inputs) for alpha in ALPHAS]
    assert any(np.allclose(fitted.predict(pixels)[:, 1], scores) for scores in part)


@pytest.mark.parametrize("newton_features", [512, 1])
def test_both_solvers_reach_the_solution_of_a_fit_from_scratch(
    newton_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_probe, "NEWTON_FEATURES", newton_features)
    rng = np.random.default_rng(2)
    features = rng.normal(size=(300, 6))
    labels = (features[:, :2] + rng.normal(size=(300, 2)) > 0).astype(float)
    fitted = linear_probe.fit((features[:200], labels[:200]), (features[200:], labels[200:]), features)
    for column in range(2):
        scratch = LogisticRegression(C=fitted.penalty, tol=1e-8).fit(features[:200], labels[:200, column])
        np.testing.assert_allclose(
            fitted.scores[:, column], scratch.decision_function(features), atol=0.02, rtol=0.02
        )


def test_report_embeddings_are_unit_vectors_that_share_a_space() -> None:
    split = make_split("train", 200, 3)
    images, texts = report_embeddings(
        split.ridge, np.arange(150), split.reports[:150], split.arrays.pixels[150:], split.reports[150:]
    )
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1)
    assert (images * texts).sum(axis=1).mean() > (images * np.roll(texts, 1, axis=0)).sum(axis=1).mean() + 0.1

"""Zero-shot classification on numbers whose answer is known: a perfect model, a blind one, own scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medvlp.evaluation.features import ModelArrays
from medvlp.evaluation.metrics.curves import confusion
from medvlp.evaluation.prompts import PromptBook
from medvlp.evaluation.splits import Split
from medvlp.evaluation.task import EvaluationError, TaskResult
from medvlp.evaluation.tasks.zero_shot import Ensemble, ZeroShot, ZeroShotConfig, finding_scores
from tests.evaluation.prepared import NAMES, Prepared, make_splits

BOOK = PromptBook(("{finding}", "some {finding}"), ("no {finding}",))
SENTENCES = ("edema", "some edema", "no edema", "mass", "some mass", "no mass")


def prompt_embeddings() -> np.ndarray:
    """Positive prompts point along the finding's axis, negative ones against it."""
    axes = np.eye(8)[:2]
    return np.stack([axes[0], axes[0], -axes[0], axes[1], axes[1], -axes[1]])


def run(
    splits: dict[str, Split],
    book: PromptBook = BOOK,
    names: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    **given: np.ndarray | None,
) -> TaskResult:
    """The task with these prompts; `given` are their embeddings by network (None: it has own scores)."""
    task = ZeroShot(ZeroShotConfig(**settings or {}))
    task.book = book
    embeddings = {"trained": prompt_embeddings(), "untrained": prompt_embeddings()} | given
    return Prepared(splits, embeddings, names).run(task)


@pytest.fixture
def splits() -> dict[str, Split]:
    return make_splits()


def test_zero_shot_tells_a_model_that_sees_from_one_that_does_not(splits: dict[str, Split]) -> None:
    result = run(splits)
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


def test_the_kept_scores_are_those_of_the_numbers(splits: dict[str, Split]) -> None:
    splits["test"].labels[3, 0] = np.nan
    result = run(splits)
    kept = result.scores
    assert kept is not None
    assert set(kept.models) == {"trained", "untrained", "pixels"}
    assert kept.findings == NAMES
    assert not kept.log_odds, "a difference of cosines is no probability"
    for model, of in kept.models.items():
        for column, name in enumerate(NAMES):
            known = ~np.isnan(kept.truth[:, column])
            assert known.all() == (name == "mass")
            truth, score = kept.truth[known, column], of[known, column]
            assert roc_auc_score(truth, score) == pytest.approx(result.models[model][f"auroc/{name}"].value)
            called = confusion(of[:, column], kept.truth[:, column], kept.thresholds[model][name])
            right = (called.present_called + called.absent_not_called) / sum(called)
            assert right == pytest.approx(result.models[model][f"accuracy/{name}"].value)


def test_the_threshold_does_not_look_at_the_evaluated_split(splits: dict[str, Split]) -> None:
    before = run(splits).notes["thresholds"]
    splits["test"].labels[:] = 1 - splits["test"].labels
    after = run(splits).notes["thresholds"]
    assert before == after


def test_a_finding_without_a_threshold_is_listed(splits: dict[str, Split]) -> None:
    """The macro value of F1 is over the others."""
    splits["valid"].labels[:, 0] = 0
    result = run(splits)
    assert "auroc/edema" in result.models["trained"]
    assert "f1/edema" not in result.models["trained"]
    reason = "F1 and accuracy: no positives in valid to choose a threshold by"
    assert result.notes["not_evaluable"] == [{"finding": "edema", "reason": reason}]
    seen = run(splits, settings={"threshold_source": "evaluated"})
    assert "f1/edema" in seen.models["trained"]
    assert not seen.notes["not_evaluable"]


def test_a_threshold_of_the_evaluated_split_raises_f1_and_a_strict_one_lowers_accuracy(
    splits: dict[str, Split],
) -> None:
    """The published ways: by how much, says the seed; in which direction, the definition."""
    sound = run(splits)
    seen = run(splits, settings={"threshold_source": "evaluated"})
    for model in ("trained", "untrained", "pixels"):
        for name in NAMES:
            assert seen.models[model][f"f1/{name}"].value >= sound.models[model][f"f1/{name}"].value
    assert seen.models["untrained"]["f1/macro"].value > sound.models["untrained"]["f1/macro"].value
    assert seen.notes["threshold_split"] == "test"
    assert "has seen the answers" in ZeroShot.reading.remarks(seen.notes)[0]
    strict = run(splits, settings={"threshold_source": "evaluated", "threshold_tie": "gt"})
    for name in NAMES:
        # The threshold with the best F1 is the score of a positive, which is then missed.
        lost = (
            seen.models["trained"][f"accuracy/{name}"].value
            - strict.models["trained"][f"accuracy/{name}"].value
        )
        assert lost == pytest.approx(1 / 160)
        assert strict.models["trained"][f"f1/{name}"] == seen.models["trained"][f"f1/{name}"]


def test_classes_are_compared_as_they_are_or_over_all_images_at_once(splits: dict[str, Split]) -> None:
    """A class whose scores lie higher takes all images, unless z-scores put both on one scale."""
    for split in splits.values():
        split.labels[:, 1] = 1 - split.labels[:, 0]
        seen = split.arrays.models["trained"].image
        seen[:, :2] = 0.1 * (2 * split.labels - 1)
        seen[:, 0] += 0.5
    plain, over = (
        run(splits, settings={"kind": "multi_class", "normalise": normalise}).models
        for normalise in ("none", "over_evaluated")
    )
    assert (
        plain["trained"]["balanced_accuracy/macro"].value
        == 0.5
        == plain["chance"]["balanced_accuracy/macro"].value
    )
    assert over["trained"]["balanced_accuracy/macro"].value == 1.0
    assert over["trained"]["auroc/macro"] == plain["trained"]["auroc/macro"]
    assert "balanced_accuracy/macro" not in run(splits).models["trained"]


def test_a_class_that_no_evaluated_image_has_competes_all_the_same(splits: dict[str, Split]) -> None:
    """Left out, it would leave the others fewer mistakes to make: the trained network calls nothing else."""
    for name, split in splits.items():
        mass = np.zeros(len(split.labels)) if name == "test" else (split.labels[:, 0] == 0).astype(float)
        split.labels = np.stack([1 - mass, mass], axis=1)
        split.arrays.models["trained"].image[:, :2] = [-1, 1]
    splits["test"].labels[:3] = [[np.nan, 0]] * 3
    splits["test"].labels[3:90, 0] = 0
    found = run(splits, settings={"kind": "multi_class"}).models["trained"]
    assert "auroc/mass" not in found
    assert found["class_accuracy/macro"].value == found["balanced_accuracy/macro"].value == 0


def test_classes_without_prompts_are_refused(splits: dict[str, Split]) -> None:
    task = ZeroShot(ZeroShotConfig(kind="multi_class"))
    task.book = BOOK
    for split in splits.values():
        split.labels = np.concatenate([split.labels, split.labels[:, :1]], axis=1)
    session = Prepared(splits, {}, [*NAMES, "Other"])
    reason = task.unavailable_on(session.facts(task))
    assert reason is not None
    assert "compares all classes, and Other has no prompts" in reason
    chosen = Prepared(splits, {}, [*NAMES, "Other"], findings=NAMES)
    assert task.unavailable_on(chosen.facts(task)) is None


def test_the_most_similar_prompt_decides_where_it_is_asked_to() -> None:
    """An image that is all of one prompt is nearer than one that is some of both; to their mean it is not."""
    images, sentences = np.array([[1.0, 0.0], [0.8, 0.6]]), ["left edema", "right edema"]
    ensemble = Ensemble(sentences, {"edema": (slice(0, 2), slice(2, 2))})
    embedded = ModelArrays(images)
    scored = ModelArrays(scores={tuple(sentences): images})
    for arrays, prompts in ((embedded, np.eye(2)), (scored, None)):
        mean = finding_scores(arrays, prompts, ensemble, ["edema"])[:, 0]
        most = finding_scores(arrays, prompts, ensemble, ["edema"], "max_similarity")[:, 0]
        assert mean[0] < mean[1]
        assert most.tolist() == [1.0, 0.8]


def test_without_a_selection_split_there_is_no_f1(splits: dict[str, Split]) -> None:
    result = run({"test": splits["test"]})
    assert result.notes["threshold_split"] is None
    assert {metric.split("/")[0] for metric in result.models["trained"]} == {"auroc", "pr_auc"}


def test_without_training_labels_the_pixel_baseline_says_so(splits: dict[str, Split]) -> None:
    result = run({name: splits[name] for name in ("valid", "test")})
    assert "pixels" not in result.models
    assert "not available" in result.notes["pixels"]


def test_a_method_with_its_own_score_has_its_scores_averaged(splits: dict[str, Split]) -> None:
    expected = run(splits).models["trained"]
    for split in splits.values():
        arrays = split.arrays.models["trained"]
        arrays.scores = {SENTENCES: arrays.image @ prompt_embeddings().T}
    found = run(splits, trained=None).models["trained"]
    assert found["auroc/macro"].value == pytest.approx(expected["auroc/macro"].value)


def test_a_finding_without_negative_prompts_has_the_score_of_its_positives(splits: dict[str, Split]) -> None:
    book = PromptBook(("{finding}", "some {finding}"), ())
    sentences = ("edema", "some edema", "mass", "some mass")
    axes = np.eye(8)[[0, 0, 1, 1]]
    embedded = run(splits, book, trained=axes, untrained=axes).models["trained"]
    assert embedded["auroc/macro"].value > 0.9
    for split in splits.values():
        arrays = split.arrays.models["trained"]
        arrays.scores = {sentences: arrays.image @ axes.T}
    scored = run(splits, book, trained=None, untrained=axes).models["trained"]
    assert scored["auroc/macro"].value == pytest.approx(embedded["auroc/macro"].value)


def test_findings_without_both_classes_or_prompts_are_listed(splits: dict[str, Split]) -> None:
    splits["test"].labels[:, 1] = 0
    splits["test"].labels[0, 1] = 1
    for split in splits.values():
        split.labels = np.concatenate([split.labels, split.labels[:, :1]], axis=1)
    result = run(splits, names=[*NAMES, "sex=M"])
    reasons = {item["finding"]: item["reason"] for item in result.notes["not_evaluable"]}
    assert reasons == {
        "sex=M": "no prompts",
        "mass": "1 positives and 159 negatives in test, needs 2 of each",
    }
    assert "auroc/mass" not in result.models["trained"]
    splits["test"].labels[:] = 1
    with pytest.raises(EvaluationError, match="no finding can be evaluated"):
        run(splits)


def test_uncertain_labels_do_not_enter_a_metric(splits: dict[str, Split]) -> None:
    whole = run(splits)
    splits["test"].labels[:50, 0] = -1
    part = run(splits)
    assert part.notes["counts"]["edema"]["excluded"] == 50
    assert part.models["trained"]["auroc/mass"] == whole.models["trained"]["auroc/mass"]
    assert part.models["trained"]["auroc/edema"] != whole.models["trained"]["auroc/edema"]

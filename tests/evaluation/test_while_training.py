"""The metrics of a validation are the numbers that `medvlp evaluate` gives of the same split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import Config
from medvlp.data.cache import open_reader
from medvlp.data.loader import evaluation_dataset
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.task import schemas
from medvlp.evaluation.while_training import MeasuredPretraining
from medvlp.runs import saved_run
from medvlp.training.predictions import Predictions, predict
from medvlp.training.recipe import TrainingSet
from tests.launcher.tiny_run import make_run, make_shards


def validated(run: Path) -> Mapping[str, float]:
    """What a training would measure with the weights of a run."""
    source = saved_run.locate(run)
    config = saved_run.load_config(source, [], tasks=schemas())
    tokenizer = saved_run.load_tokenizer(source, config)
    method, reader = saved_run.load_method(source, config, tokenizer), open_reader(config.data)
    dataset = evaluation_dataset(config, reader, tokenizer, "valid")
    recipe, learned = MeasuredPretraining(config), TrainingSet(config, reader, None, tokenizer)
    examine = recipe.examination(method, learned)
    positions = np.arange(len(dataset.store))
    found = predict(method, lambda batch: (None, examine(batch)), dataset, positions, 7, torch.device("cpu"))
    return recipe.measure(found, learned)


def test_validation_metrics_are_those_of_the_tasks(tmp_path: Path) -> None:
    run = make_run(make_shards(tmp_path / "data"), tmp_path / "run")
    words = ["evaluation.split=valid", "evaluation.bootstrap=2"]
    expected = evaluate(
        EvaluationOptions(run, tasks=["retrieval", "zero-shot"], overrides=words), lambda line: None
    )
    metrics = validated(run)
    retrieval, zero_shot = (expected.results[name]["trained"] for name in ("retrieval", "zero-shot"))
    for name, value in metrics.items():
        of = zero_shot if name.startswith("zero_shot/") else retrieval
        assert value == pytest.approx(of[name.removeprefix("zero_shot/")].value, abs=1e-6), name
    assert {"image_to_text/R@5", "text_to_image/median_rank", "zero_shot/auroc/macro"} <= metrics.keys()


def test_a_run_without_trained_embeddings_is_validated_and_evaluated(tmp_path: Path) -> None:
    """By its losses and probes: projections that no loss shapes are chance, whatever a table says of them."""
    data = make_shards(tmp_path / "data")
    run = make_run(data, tmp_path / "run", "method.instance_weight=0", "method.prototype_weight=0")
    found = evaluate(
        EvaluationOptions(run, tasks=["retrieval", "zero-shot"], overrides=["evaluation.split=valid"]),
        lambda line: None,
    )
    for task in ("retrieval", "zero-shot"):
        assert "not_available" in found.notes[task], task
    assert validated(run) == {}


def test_labels_that_nobody_gave_count_as_in_evaluation() -> None:
    """CheXpert's labels say nothing of what a report does not mention, which is absent then."""
    names = ["No Finding", "Edema", "Pleural Other", "Support Devices"]
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.85]]).repeat(4, axis=1)
    labels = np.array([[1.0], [1.0], [0.0], [0.0], [np.nan]]).repeat(4, axis=1)
    arrays = {"scores": scores, "labels": labels}
    found = {}
    for known in (names, ["Edema", "Mass", "Nodule", "Fracture"]):
        index = SimpleNamespace(label_names=known)
        data: Any = SimpleNamespace(reader=SimpleNamespace(index=index))
        predictions = Predictions(np.arange(5), arrays)
        found[known[0]] = MeasuredPretraining(Config()).measure(predictions, data)["zero_shot/auroc/macro"]
    assert found["No Finding"] == pytest.approx(5 / 6)
    assert found["Edema"] == 1.0

"""The metrics of a validation are the numbers that `medvlp evaluate` gives of the same split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medvlp.data.cache import open_reader
from medvlp.data.loader import evaluation_dataset
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.task import schemas
from medvlp.evaluation.while_training import MeasuredPretraining
from medvlp.runs import saved_run
from medvlp.training.predictions import predict
from medvlp.training.recipe import TrainingSet
from tests.launcher.tiny_run import make_run, make_shards


def test_validation_metrics_are_those_of_the_tasks(tmp_path: Path) -> None:
    run = make_run(make_shards(tmp_path / "data"), tmp_path / "run")
    words = ["evaluation.split=valid", "evaluation.bootstrap=2"]
    expected = evaluate(
        EvaluationOptions(run, tasks=["retrieval", "zero-shot"], overrides=words), lambda line: None
    )
    source = saved_run.locate(run)
    config = saved_run.load_config(source, [], tasks=schemas())
    tokenizer = saved_run.load_tokenizer(source, config)
    method, reader = saved_run.load_method(source, config, tokenizer), open_reader(config.data)
    dataset = evaluation_dataset(config, reader, tokenizer, "valid")
    recipe, learned = MeasuredPretraining(config), TrainingSet(config, reader, None, tokenizer)
    examine = recipe.examination(method, learned)
    found = predict(
        method,
        lambda batch: (None, examine(batch)),
        dataset,
        np.arange(len(dataset.store)),
        7,
        torch.device("cpu"),
    )
    metrics = recipe.measure(found, learned)
    retrieval, zero_shot = (expected.results[name]["trained"] for name in ("retrieval", "zero-shot"))
    for name, value in metrics.items():
        of = zero_shot if name.startswith("zero_shot/") else retrieval
        assert value == pytest.approx(of[name.removeprefix("zero_shot/")].value, abs=1e-6), name
    assert {"image_to_text/R@5", "text_to_image/median_rank", "zero_shot/auroc/macro"} <= metrics.keys()

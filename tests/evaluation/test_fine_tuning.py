"""Fine-tuning: protocols, what is trained in them, and how classes are scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score

from medvlp.config import OptimizerConfig
from medvlp.evaluation.heads.classification import Classification
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.labels import NotEvaluable
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.classification import score_classes
from medvlp.evaluation.supervised import finetuning_config, recipe_of
from medvlp.evaluation.task import Unit
from medvlp.evaluation.tasks.fine_tuning import Chosen, FineTuning, FineTuningConfig
from medvlp.evaluation.trained import Fitted
from medvlp.training.deepspeed_config import parameter_groups
from medvlp.training.predictions import Predictions
from medvlp.training.recipe import TrainingSet
from tests.launcher.tiny_run import make_run, make_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return make_run(make_shards(folder / "data"), folder / "run")


def made(run: Path, *words: str):  # type: ignore[no-untyped-def]
    """Config and objective of a fine-tuning."""
    from medvlp.data.cache import open_reader
    from medvlp.runs import saved_run

    config = finetuning_config(run, "fine-tuning", 1.0, 0, False, [], [f"run.dir={run}-tuned", *words])
    tokenizer = saved_run.load_tokenizer(saved_run.locate(run), config)
    recipe = recipe_of(config)
    return config, recipe.build(TrainingSet(config, open_reader(config.data), np.arange(4), tokenizer))


def protocol(name: str) -> str:
    return f"evaluation.tasks.fine-tuning.protocol={name}"


@pytest.mark.parametrize("name", FineTuning.protocols)
def test_every_protocol_is_a_config_and_trains_head_and_perhaps_encoder(run: Path, name: str) -> None:
    config, objective = made(run, protocol(name))
    assert isinstance(objective, SupervisedObjective)
    objective.train()
    trained = {
        part.split(".")[1]
        for part, p in objective.named_parameters()
        if p.requires_grad and part[:4] != "head"
    }
    frozen = name == "mgca-linear"
    assert trained == (set() if frozen else {"image_encoder"})
    assert all(p.requires_grad for p in objective.head.parameters())
    assert objective.method.image_encoder.backbone.training is not frozen  # type: ignore[union-attr]
    assert not objective.method.text_encoder.training  # type: ignore[union-attr]
    assert len(objective.head) == (1 if frozen else 2)
    assert config.optimizer.name == ("sgd" if name in ("mrm", "benchx") else "adamw")
    assert config.image.mean == 0.5, "a network keeps its own"


def test_what_the_user_says_stands_above_the_protocol(run: Path) -> None:
    config, _ = made(run, protocol("benchx"), "optimizer.lr=0.5", "train.steps=7")
    assert (config.optimizer.lr, config.optimizer.name, config.train.steps) == (0.5, "sgd", 7)
    assert (config.checkpoint.keep_best, config.checkpoint.best_mode) == ("valid/auroc/macro", "max")


@pytest.mark.parametrize(
    ("task", "words", "flip"),
    [
        ("vqa", [], 0.0),
        ("report", [], 0.0),
        ("fine-tuning", [], 0.0),
        ("fine-tuning", [protocol("mrm")], 0.5),
        ("fine-tuning", ["evaluation.tasks.fine-tuning.training={data: {transform: {flip: 0.25}}}"], 0.25),
    ],
)
def test_images_are_not_flipped_because_the_pre_training_flipped_them(
    run: Path, tmp_path: Path, task: str, words: list[str], flip: float
) -> None:
    """MeDSLIP's entities change sides with the image; questions, answers and reports do not."""
    flipped = shutil.copytree(run, tmp_path / "flipped")
    settings = yaml.safe_load((flipped / "config.yaml").read_text())
    settings["data"]["transform"] |= {"flip": 0.5, "scale_min": 0.75}
    (flipped / "config.yaml").write_text(yaml.safe_dump(settings))
    config = finetuning_config(flipped, task, 1.0, 0, False, [], [f"run.dir={tmp_path / 'tuned'}", *words])
    assert config.data.transform.flip == flip
    assert config.data.transform.scale_min == 0.75, "what moves no side is taken over"


def test_rates_fall_from_head_to_the_first_layer(run: Path) -> None:
    _, objective = made(run, protocol("ours"), "image.options={depth: 3}")
    config = OptimizerConfig(head_lr_scale=2.0, image_lr_scale=0.5, layer_decay=0.5)
    groups, scales = parameter_groups(objective, config)
    of = {id(p): scale for group, scale in zip(groups, scales, strict=True) for p in group["params"]}
    rates = {name: of[id(p)] for name, p in objective.named_parameters() if p.requires_grad}
    backbone = "method.image_encoder.backbone"
    assert rates["head.1.weight"] == 2.0
    # timm counts the last norm to the last block.
    assert rates[f"{backbone}.norm.weight"] == rates[f"{backbone}.blocks.2.attn.qkv.weight"] == 0.5
    assert rates[f"{backbone}.blocks.0.attn.qkv.weight"] == 0.125
    assert rates[f"{backbone}.patch_embed.proj.weight"] == rates[f"{backbone}.cls_token"] == 0.0625


class Shifted(torch.nn.Module):
    """Logits [B, 3], and a constant of each image in all of them."""

    def __init__(self, logits: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(logits + shift[:, None])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.weight


class Features(torch.nn.Module):
    """In place of a method."""

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(image), 1)


def test_images_are_ranked_by_what_is_said_of_a_class_not_by_a_constant_of_the_image() -> None:
    logits = torch.randn(5, 3)
    batch: Any = SimpleNamespace(image=torch.zeros(5), labels=torch.zeros(5, 3))
    given: Any = {"columns": [0, 1, 2], "uncertain": [float("nan")] * 3}
    for kind, same in (("multi_class", True), ("multi_label", False)):
        plain, shifted = (
            Classification(Features(), Shifted(logits, shift), kind=kind, **given).predict(batch)["scores"]
            for shift in (torch.zeros(5), torch.arange(5.0))
        )
        assert torch.allclose(plain, shifted, atol=1e-5) == same
    assert torch.allclose(plain, logits)


def test_a_class_without_a_number_of_its_own_competes_and_its_images_count() -> None:
    """Of class c the drawn patients hold nothing; the network calls nothing else."""
    rng = np.random.default_rng(0)
    truth = np.eye(3)[rng.integers(0, 3, 90)]
    logits = 2.0 * truth + 0.1 * rng.normal(size=truth.shape)
    logits[:, 2] = 5.0
    pixels = SimpleNamespace(
        patients=np.arange(90), arrays=SimpleNamespace(sample=np.arange(90), pixels=np.zeros((90, 1)))
    )
    facts = SimpleNamespace(roles={"evaluated": "test", "selection": "valid"})
    view: Any = SimpleNamespace(
        facts=facts, split=lambda role: pixels, bootstrap=lambda of: PatientBootstrap(of, 5, 0)
    )
    names = ["a", "b", "c"]
    ridge = SimpleNamespace(predict=lambda pixels: np.zeros((len(pixels), 3)))
    at = {model: dict.fromkeys(names, 0.0) for model in ("trained", "untrained", "pixels")}
    chosen = Chosen(at, ridge, [NotEvaluable("c", "the drawn part of train holds none")])  # type: ignore[arg-type]
    seen = Predictions(np.arange(90), {"scores": logits, "labels": truth})
    fitted = Fitted({}, names, chosen)
    for kind, accuracy in (("multi_class", (truth[:, 2] == 1).mean()), ("multi_label", None)):
        task = FineTuning(FineTuningConfig(kind=kind))
        found = task.score(view, Unit(1.0, 0), {"trained": seen, "untrained": seen}, fitted)
        assert "auroc/c" not in found.models["trained"]
        assert found.models["trained"]["auroc/a"].value == 1.0
        if accuracy is not None:
            assert found.models["trained"]["class_accuracy/macro"].value == pytest.approx(accuracy)
        assert found.scores is not None
        assert list(found.scores.findings) == (names if kind == "multi_class" else ["a", "b"])


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 30))
def test_scores_of_classes_are_those_of_sklearn(seed: int, classes: int, samples: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (samples, classes)).astype(float)  # with ties
    of = rng.integers(0, classes, samples)
    truth = np.eye(classes)[of]
    truth[rng.random(samples) < 0.2] = np.nan
    names = [str(number) for number in range(classes)]
    found = score_classes(scores, truth, names, PatientBootstrap(np.arange(samples), 5, 0))
    known = ~np.isnan(truth[:, 0])
    if not known.any():
        assert found == {}
        return
    of, called = of[known], scores[known].argmax(axis=1)
    present = np.unique(of)
    assert found["class_accuracy/macro"].value == pytest.approx(accuracy_score(of, called))
    recalls = recall_score(of, called, labels=present, average=None)
    assert found["balanced_accuracy/macro"].value == pytest.approx(recalls.mean())
    if set(called) <= set(present) and len(present) > 1:
        assert found["balanced_accuracy/macro"].value == pytest.approx(balanced_accuracy_score(of, called))
    expected = f1_score(of, called, labels=present, average="macro", zero_division=0)
    assert found["class_f1/macro"].value == pytest.approx(expected)

"""Visual question answering end to end on phantoms at toy size; its loss, its baselines, its vocabulary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from medvlp.config import Config, OptimizerConfig
from medvlp.data.batch import Batch
from medvlp.data.questions import asked, normalised, text_code
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.heads.vqa import QuestionObjective
from medvlp.evaluation.supervised import train_here
from medvlp.evaluation.task import EvaluationError, TaskResult
from medvlp.evaluation.tasks.vqa import VQA, Baselines, VQAConfig, _question_only, _right
from medvlp.training.deepspeed_config import parameter_groups
from medvlp.training.predictions import Predictions
from shards.reader import ShardReader
from tests.evaluation.leaky import Twice
from tests.launcher.tiny_run import build, make_run, make_shards
from tests.methods.small_mpma import SIZE, small_mpma

WHERE = "evaluation.tasks.vqa"
FAST = [
    "evaluation.bootstrap=10", "monitor.wandb=disabled", "monitor.progress=false", "zero.stage=0",
    f"{WHERE}.width=16",
    f"{WHERE}.training={{train: {{epochs: 1, min_steps: 0, global_batch: 16}}, optimizer: {{lr: 0.01}}}}",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "phantom")


def test_networks_and_baselines_answer_every_question(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path / "tiny")
    options = EvaluationOptions(run, tasks=["vqa"], overrides=FAST, train=train_here)
    found = evaluate(options, lambda line: None)
    result = TaskResult(found.results["vqa"], found.notes["vqa"])
    assert set(result.models) == {"trained", "untrained", "question-only", "majority"}
    groups = {"overall", "open", "closed", "presence", "plane", "position"}
    for metrics in result.models.values():
        assert {f"accuracy@100%/{name}" for name in groups} <= set(metrics)
    reader = ShardReader(shards)
    test = [asked(reader.metadata("test", i)) for i in range(reader.sample_count("test"))]
    train = [asked(reader.metadata("train", i)) for i in range(reader.sample_count("train"))]
    known = {normalised(item["answer"]) for of in train for item in of}
    every = [normalised(item["answer"]) for of in test for item in of]
    assert result.notes["questions"] == len(every)
    assert result.notes["answers"] == len(known)
    assert result.notes["ceiling"] == pytest.approx(np.mean([answer in known for answer in every])) != 1
    presence = [item["answer"] for of in test for item in of if item["topic"] == "presence"]
    share = np.mean([answer == "no" for answer in presence])
    assert result.models["majority"]["accuracy@100%/presence"].value in (
        pytest.approx(share), pytest.approx(1 - share),
    )  # fmt: skip


def test_the_published_vocabulary_puts_every_answer_within_reach(shards: Path) -> None:
    reader = ShardReader(shards)
    learned = [item for i in range(20) for item in asked(reader.metadata("train", i))]
    test = [item for i in range(reader.sample_count("test")) for item in asked(reader.metadata("test", i))]
    found = {
        vocabulary: VQA(VQAConfig(vocabulary=vocabulary))._answers(reader, learned)  # type: ignore[arg-type]
        for vocabulary in ("train", "all_splits")
    }
    assert found["train"] < found["all_splits"]
    reached = {
        name: np.mean([normalised(item["answer"]) in answers for item in test])
        for name, answers in found.items()
    }
    assert reached["train"] < reached["all_splits"] == 1


class Pair(nn.Module):
    """Two encoders of images of 2 x 2 pixels and of texts of 3 tokens."""

    fuses = False

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = Encoder(4, self._image), Encoder(3, self._text)

    @staticmethod
    def _image(image: torch.Tensor) -> Any:
        return SimpleNamespace(pooled=image.flatten(1).float())

    @staticmethod
    def _text(text: Any) -> Any:
        return SimpleNamespace(hidden=text.input_ids.float()[:, None])


class Encoder(nn.Module):
    def __init__(self, width: int, function: Any) -> None:
        super().__init__()
        self.width, self.function = width, function

    def forward(self, given: Any) -> Any:
        return self.function(given)

    def summary(self, features: Any) -> torch.Tensor:
        return features.pooled


def batch_of(counts: list[int], size: int = 2) -> Batch:
    """Images with so many questions each, in the order of one stream of random numbers."""
    generator = torch.Generator().manual_seed(1)
    most, images = max(counts), len(counts)
    image = torch.randint(0, 255, (images, 1, size, size), generator=generator, dtype=torch.uint8)
    questions = torch.randint(0, 9, (images, most, 4, 3), generator=generator)
    answers = torch.tensor([text_code("yes"), text_code("no"), text_code("unheard of")])
    answers = answers[torch.randint(0, 3, (images, most), generator=generator)]
    answers[torch.arange(most) >= torch.tensor(counts)[:, None]] = 0
    return Batch(
        image,
        None,  # type: ignore[arg-type]
        torch.arange(images),
        torch.zeros(images, 0),
        [""] * images,
        fields={"questions": questions, "answers": answers},
        counts={"answers": tuple(counts)},
    )


def test_the_loss_does_not_depend_on_how_a_batch_is_divided() -> None:
    torch.manual_seed(0)
    objective = QuestionObjective(Pair(), [text_code("yes"), text_code("no")], 2.0, 4)  # type: ignore[arg-type]
    batch = batch_of([3, 1, 2, 3])
    parts = []
    for start in (0, 2):
        parts.append(objective(batch.rows(start, start + 2)).loss)
    torch.testing.assert_close(sum(parts) / 2, objective(batch).loss)
    given = objective.predict(batch)
    assert given["answers"].shape == given["truth"].shape == (4, 64)
    assert ((given["answers"] != 0) == (given["truth"] != 0)).all()
    assert set(given["answers"].unique().tolist()) <= {0, text_code("yes"), text_code("no")}


def test_mpma_answers_from_its_fusion_at_the_rates_of_m3ae() -> None:
    objective = QuestionObjective(small_mpma(), [text_code("yes"), text_code("no")], 2.0)
    batch = batch_of([2, 1], SIZE)
    batch.fields["questions"][0, 1] = batch.fields["questions"][0, 0]
    batch.fields["questions"][0, 1, 0, 1] += 1  # one word of two questions about one image
    logits, _ = objective.eval()._logits(batch)
    assert not logits[0].equal(logits[1])
    objective(batch).loss.backward()
    assert objective.method.fusion is not None
    assert all(p.grad is not None for p in objective.head.parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.method.fusion.parameters())  # type: ignore[union-attr]
    values = VQA.protocols["m3ae"]["optimizer"]
    groups, scales = parameter_groups(objective, OptimizerConfig(**values))
    of = {id(p): scale for group, scale in zip(groups, scales, strict=True) for p in group["params"]}
    rates: dict[str, set[float]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            rates.setdefault(name.removeprefix("method.").split(".")[0], set()).add(of[id(parameter)])
    assert rates == {"image_encoder": {1.0}, "text_encoder": {1.0}, "fusion": {5.0}, "head": {50.0}}


def test_images_that_are_measured_are_left_out_of_training(tmp_path: Path) -> None:
    """As VQA-RAD's published split needs it."""
    reader = ShardReader(build(Twice(), tmp_path / "data", vocab_size=300))
    tokenizer, data = Tokenizer.load(None, tmp_path / "data"), Config().data
    learned = {}
    for name in ("official", "by_image"):
        task = VQA(VQAConfig(split=name))  # type: ignore[arg-type]
        for split in ("train", "test"):
            store = SampleStore.open_or_build(reader, split, data, tokenizer)
            learned[name, split] = int(task.learnable(reader, split, store).sum())
    assert learned == {
        ("official", "train"): 30, ("official", "test"): 10,
        ("by_image", "train"): 20, ("by_image", "test"): 10,
    }  # fmt: skip


def test_every_fraction_says_what_it_could_answer_and_had_seen() -> None:
    """The smallest fraction stood for all, which had seen more of the evaluated images."""
    task, parts = VQA(VQAConfig(fractions=[0.1, 1.0])), {}
    for unit, answers, ceiling, seen in zip(task.units(), (3, 40), (0.5, 0.9), (0, 7), strict=True):
        notes = {
            "questions": 20, "images": 10, "answers": answers, "vocabulary": "train", "ceiling": ceiling,
            "seen_images": seen, "training": {unit.name: {}},
        }  # fmt: skip
        parts[unit] = TaskResult({}, notes)
    small, large = (unit.name for unit in parts)
    assert VQA.reading.remarks(task.join(parts).notes) == [
        "20 questions about 10 images",
        f"{small}: 3 answers, with which 50.0 % can be right",
        f"{large}: 40 answers, with which 90.0 % can be right",
        f"{large}: 7 of the images were trained on; vqa.split=by_image leaves them out of training",
    ]
    alone = task.join({task.units()[1]: parts[task.units()[1]]}).notes
    assert VQA.reading.remarks(alone)[1] == "40 answers, with which 90.0 % can be right"


def test_both_encoders_are_needed() -> None:
    task, pair = VQA(VQAConfig()), Pair()
    assert task.unavailable_with(pair) is None  # type: ignore[arg-type]
    pair.text_encoder = None  # type: ignore[assignment]
    assert task.unavailable_with(pair) == "has no text encoder"  # type: ignore[arg-type]


def test_an_answer_out_of_vocabulary_is_wrong() -> None:
    by_image = [[{"answer": "Yes"}, {"answer": "Carina"}], [{"answer": "two."}]]
    codes = [[text_code("yes"), text_code("carina"), 0], [text_code("2"), 0, 0]]
    given = [[text_code("yes"), text_code("yes"), 0], [text_code("2"), 0, 0]]
    arrays = {"truth": np.array(codes), "answers": np.array(given)}
    assert _right(Predictions(np.arange(2), arrays), by_image).tolist() == [True, False, True]
    with pytest.raises(EvaluationError, match="have changed"):
        _right(Predictions(np.arange(2), arrays), [by_image[0], [{"answer": "three"}]])


def test_a_model_of_questions_alone_stays_at_the_majority_where_questions_tell_nothing() -> None:
    rng = np.random.default_rng(0)
    items = [
        {"question": f"is there {name} ?", "answer": answer, "kind": "closed", "topic": "presence"}
        for name, answer in zip(
            rng.choice(["edema", "mass"], 600), rng.choice(["yes", "no"], 600), strict=True
        )
    ]
    items += [{"question": "how many ?", "answer": "two", "kind": "open", "topic": "count"}] * 20
    words = _question_only(items[:300] + items[-10:], items[300:400])
    majority = {("closed", "presence"): "no", ("open", "count"): "2", ("", ""): "no"}
    baselines = Baselines(majority, words, frozenset())
    given = baselines.given(items[400:600] + items[-10:] + [{"question": "?", "kind": "", "topic": "new"}])
    assert given["question-only"][-11:-1] == given["majority"][-11:-1] == ["2"] * 10
    assert given["majority"][-1] == "no"
    right = np.mean(
        [one == item["answer"] for one, item in zip(given["question-only"], items[400:600], strict=False)]
    )
    assert 0.4 < right < 0.6
    assert _question_only(items[-3:], items) is None


def test_questions_asked_often_count_by_their_number() -> None:
    """As a fit to every single one of them."""
    rng = np.random.default_rng(1)
    said = [
        f"is there {name} in the {side} lung ?" for name in ("edema", "mass") for side in ("left", "right")
    ]
    likely = [["yes", "no", "no"], ["yes", "two", "yes"], ["no", "two"], ["two", "no", "no", "no"]]
    items = [
        {"question": said[n], "answer": rng.choice(likely[n]), "kind": "closed", "topic": "presence"}
        for n in rng.integers(0, 4, 300)
    ]
    words = _question_only(items, items)
    assert words is not None
    plain = clone(words).fit([of["question"] for of in items], [normalised(of["answer"]) for of in items])
    assert list(words.classes_) == list(plain.classes_) == ["2", "no", "yes"]
    np.testing.assert_allclose(words.predict_proba(said), plain.predict_proba(said), atol=1e-5)

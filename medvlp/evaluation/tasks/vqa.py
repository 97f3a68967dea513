"""Visual question answering: an answer of the training questions' vocabulary for every question about an
image.

Answers are compared as `medvlp.data.questions.normalised` leaves them; one that no training question has is
out of reach and counts as wrong. MPMA answers from its fusion of image and question; a method without fusion
from the two features, projected, and their product. The share of questions with a known answer is in the
notes: the ceiling.

Baselines, of the drawn training samples: `question-only`, logistic regression on the words of the question,
its penalty chosen on the selection split; `majority`, the most frequent answer to questions of the same kind
and topic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from medvlp.config import key
from medvlp.data.questions import asked, normalised, text_code
from medvlp.evaluation.metrics.answers import answer_accuracy, matches, reachable
from medvlp.evaluation.task import EvaluationError, Reading, TaskResult, Unit, register
from medvlp.evaluation.trained import Fitted, TrainedTask, TrainedTaskConfig, by_unit

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from medvlp.data.sample_store import SampleStore
    from medvlp.evaluation.heads.vqa import QuestionObjective
    from medvlp.evaluation.session import View
    from medvlp.evaluation.supervised import Network
    from medvlp.methods.base import Method
    from medvlp.training.predictions import Predictions
    from medvlp.training.recipe import TrainingSet
    from shards.reader import ShardReader

Question = Mapping[str, str]

#: Inverse penalties of the question-only model to choose from.
PENALTIES = (1.0, 10.0, 100.0)


@dataclass
class VQAConfig(TrainedTaskConfig):
    fractions: list[float] = key([1.0], "shares of the training patients", 1e-6, 1, (1, 100))
    vocabulary: Literal["train", "all_splits"] = key(
        "train", "answers to choose from; all_splits: also those of the evaluated questions (published M3AE)"
    )
    split: Literal["official", "by_image"] = key(
        "official",
        "by_image: images that the validation or test split has, too, are not learned from (VQA-RAD's "
        "published training split has all of its test images)",
    )
    width: int = key(256, "of the projections, for methods without fusion", 1, 1 << 14)


@dataclass(frozen=True)
class Baselines:
    """What questions alone tell.

    Attributes:
        majority: (kind, topic) -> answer; ("", "") is of all questions.
        words: logistic regression on the words of a question; None: all training answers are the same.
        answers: normalised answers that the networks can give.
        images: hashes of the images these have seen.
    """

    majority: Mapping[tuple[str, str], str]
    words: Pipeline | None
    answers: frozenset[str]
    images: frozenset[int] = frozenset()

    def given(self, questions: Sequence[Question]) -> dict[str, list[str]]:
        """Baseline -> its answers."""
        found = {"majority": [self.majority.get(_type(item), self.majority["", ""]) for item in questions]}
        if self.words is not None:
            found["question-only"] = list(self.words.predict([item["question"] for item in questions]))
        return found


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    if "questions" not in notes:
        return []
    lines = [f"{notes['questions']} questions about {notes['images']} images"]
    where = "" if notes["vocabulary"] == "train" else " of all splits (published; sees the evaluated answers)"
    for unit, of in by_unit(notes):
        lines.append(
            f"{unit}{of['answers']} answers{where}, with which {100 * of['ceiling']:.1f} % can be right"
        )
        if seen := of.get("seen_images"):
            lines.append(
                f"{unit}{seen} of the images were trained on; vqa.split=by_image leaves them out of training"
            )
    return lines


@register
class VQA(TrainedTask):
    """See the module."""

    name = "vqa"
    hedged = "answers are no labels"
    version = 2
    summary = "questions about images, answered from a vocabulary of answers"
    teaches = "a question that may be learned from"
    config = VQAConfig
    fields = frozenset({"questions", "answers"})
    reading = Reading(summary=lambda metric: metric.startswith("accuracy"), remarks=_remarks)
    chooses = "accuracy"
    chooses_mode: ClassVar[Literal["min", "max"]] = "max"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ours": {
            "optimizer": {
                "lr": 1e-3, "image_lr_scale": 0.3, "text_lr_scale": 0.3, "weight_decay": 0.05, "warmup": 0.05,
            },
            "train": {"global_batch": 32, "epochs": 40.0},
        },
        "m3ae": {
            "optimizer": {
                "lr": 5e-6, "head_lr_scale": 50.0, "fusion_lr_scale": 5.0, "betas": [0.9, 0.98],
                "weight_decay": 0.01, "warmup": 0.1,
            },
            "train": {"global_batch": 64, "epochs": 50.0},
        },
    }  # fmt: skip

    def unavailable_with(self, method: Method) -> str | None:
        for encoder in ("image_encoder", "text_encoder"):
            if getattr(method, encoder, None) is None:
                return f"has no {encoder.replace('_', ' ')}"
        return None

    def learnable(self, reader: ShardReader, split: str, store: SampleStore) -> NDArray[np.bool_]:
        """Samples with a question; with split=by_image not those whose image is measured on later."""
        unreadable = set(store.unreadable.tolist())
        kept: set[int] = set()
        if self.settings.split == "by_image":
            for other in _measured_after(split, list(reader.index.splits)):
                kept |= _images(reader, other, range(reader.sample_count(other)))
        return np.array(
            [
                i not in unreadable
                and bool(asked(reader.metadata(split, i)))
                and (not kept or not kept & _images(reader, split, [i]))
                for i in range(len(store))
            ],
            dtype=bool,
        )

    def objective(self, method: Method, data: TrainingSet) -> QuestionObjective:
        """See `TrainedTask.objective`."""
        from medvlp.evaluation.heads.vqa import QuestionObjective

        assert data.samples is not None
        questions = [
            item for of in _questions(data.reader, data.config.data.split, data.samples) for item in of
        ]
        answers = self._answers(data.reader, questions)
        codes = [text_code(answer) for answer in answers]
        return QuestionObjective(method, codes, len(questions) / len(data.samples), self.settings.width)

    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """Accuracy of all questions of the validation split."""
        truth = predictions.arrays["truth"]
        right = (predictions.arrays["answers"] == truth)[truth != 0]
        return {"accuracy": float(right.mean())} if len(right) else {}

    def choose(self, view: View, unit: Unit, networks: Mapping[str, Network]) -> Baselines:
        """Teach the baselines with the samples that the networks have seen."""
        from medvlp.evaluation.learned_samples import learnable

        network, dataset = networks["trained"], view.dataset("train")
        drawn = network.drawn(view)
        learned = [item for of in _questions(dataset.reader, dataset.split, drawn) for item in of]
        chooser = view.dataset("selection")
        positions = learnable(self, chooser.reader, chooser.split, chooser.store)
        choosing = [item for of in _questions(chooser.reader, chooser.split, positions) for item in of]
        types = {_type(item) for item in learned} | {("", "")}
        majority = {
            of: Counter(
                normalised(item["answer"]) for item in learned if of in (_type(item), ("", ""))
            ).most_common(1)[0][0]
            for of in types
        }
        answers = self._answers(dataset.reader, learned)
        seen = frozenset(_images(dataset.reader, dataset.split, drawn.tolist()))
        return Baselines(majority, _question_only(learned, choosing), answers, seen)

    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        """Accuracy overall (pooled), of closed and open questions, and by topic."""
        dataset, first, baselines = view.dataset("evaluated"), predictions["trained"], fitted.chosen
        by_image = list(_questions(dataset.reader, dataset.split, first.sample))
        questions = [item for of in by_image for item in of]
        if not questions:
            raise EvaluationError(f"{self.name}: no sample of {dataset.split} has a question")
        true = [item["answer"] for item in questions]
        right = {name: _right(of, by_image) for name, of in predictions.items()}
        right |= {name: matches(given, true) for name, given in baselines.given(questions).items()}
        patients = np.repeat(view.patients("evaluated", first.sample), [len(of) for of in by_image])
        bootstrap = view.bootstrap(patients)
        kinds, topics = [item["kind"] for item in questions], [item["topic"] for item in questions]
        result = TaskResult(
            {name: answer_accuracy(of, kinds, topics, bootstrap) for name, of in right.items()}
        )
        result.notes = {
            "questions": len(questions),
            "images": len(by_image),
            "answers": len(baselines.answers),
            "vocabulary": self.settings.vocabulary,
            "ceiling": reachable(true, baselines.answers),
            "seen_images": len(
                baselines.images & _images(dataset.reader, dataset.split, first.sample.tolist())
            ),
        }
        return result

    def _answers(self, reader: ShardReader, learned: Sequence[Question]) -> frozenset[str]:
        """The normalised answers to choose from."""
        known = list(learned)
        if self.settings.vocabulary == "all_splits":
            for split in reader.index.splits:
                every = np.arange(reader.sample_count(split))
                known += [item for of in _questions(reader, split, every) for item in of]
        return frozenset(normalised(item["answer"]) for item in known)


def _questions(
    reader: ShardReader, split: str, positions: NDArray[np.int64]
) -> Iterator[list[dict[str, str]]]:
    """The questions of each sample."""
    for position in positions:
        yield asked(reader.metadata(split, int(position)))


def _images(reader: ShardReader, split: str, positions: Iterable[int]) -> set[int]:
    """Hashes of the stored images of samples."""
    return {xxhash.xxh3_64_intdigest(reader.image(split, position)) for position in positions}


def _measured_after(split: str, splits: Sequence[str]) -> list[str]:
    """All others of train, all but train of valid, none of those that are evaluated."""
    order = ("train", "valid")
    before = order[: order.index(split) + 1] if split in order else splits
    return [name for name in splits if name not in before]


def _right(predictions: Predictions, by_image: Sequence[Sequence[Question]]) -> NDArray[np.bool_]:
    """[N] whether each question is answered right, in the order of `by_image`."""
    asked_there = np.arange(predictions.arrays["truth"].shape[1]) < np.array([[len(of)] for of in by_image])
    stored = [text_code(normalised(item["answer"])) for of in by_image for item in of]
    if predictions.arrays["truth"][asked_there].tolist() != stored:
        raise EvaluationError("vqa: the questions of a sample have changed since they were answered")
    found: NDArray[np.bool_] = predictions.arrays["answers"][asked_there] == np.array(stored)
    return found


def _type(question: Question) -> tuple[str, str]:
    return question["kind"].strip().lower(), question["topic"].strip().lower()


def _question_only(learned: Sequence[Question], choosing: Sequence[Question]) -> Pipeline | None:
    """Logistic regression on words and word pairs; its penalty has the best accuracy on `choosing`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = [item["question"] for item in learned]
    answers = [normalised(item["answer"]) for item in learned]
    if len(set(answers)) < 2:
        return None
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b").fit(texts)
    # A question counts by how often it has the answer: the same fit, of a tenth of the rows and less.
    counts = Counter(zip(texts, answers, strict=True))
    words = vectorizer.transform([text for text, _ in counts])
    given_answers, weights = [answer for _, answer in counts], list(counts.values())
    best, best_value = None, -1.0
    for penalty in PENALTIES:
        # To the optimum: where it stops before, answers that are about as likely change places.
        logistic = LogisticRegression(C=penalty, solver="newton-cg", tol=1e-6)
        fitted = logistic.fit(words, given_answers, weights)
        model = make_pipeline(vectorizer, fitted)
        given = model.predict([item["question"] for item in choosing])
        value = float(matches(list(given), [item["answer"] for item in choosing]).mean())
        if value > best_value:
            best, best_value = model, value
    return best

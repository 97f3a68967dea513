"""Visual question answering: which answer of a vocabulary, from the image and the question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.data.batch import Batch, Text
from medvlp.data.fields import Questions, question_text
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.methods.base import Method, StepOutput
from medvlp.prototypes.table import PrototypeTable

#: Parts of a method that learn with the head; a method without fusion has the encoders.
TRAINED = ("image_encoder", "text_encoder", "fusion")


class AnswerHead(nn.Sequential):
    """[N, F] features of pairs -> [N, C] logits (M3AE's head).

    Args:
        features: F. answers: C.
    """

    def __init__(self, features: int, answers: int) -> None:
        last = nn.Linear(features, answers)
        # Each answer begins at the probability of one among all: from 1/2, the first hundred steps go into
        # unlearning every answer.
        nn.init.constant_(last.bias, -math.log(max(answers - 1, 1)))
        super().__init__(nn.Linear(features, features), nn.LayerNorm(features), nn.GELU(), last)


class ProductHead(nn.Module):
    """Logits from image and question, both projected, beside each other and beside their product.

    Args:
        image: width of the image feature. question: of the question's first token.
        width: of the projections. answers: number of answers.
    """

    def __init__(self, image: int, question: int, width: int, answers: int) -> None:
        super().__init__()
        self.image, self.question = nn.Linear(image, width), nn.Linear(question, width)
        self.answer = AnswerHead(3 * width, answers)

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        """[N, image], [N, question] -> [N, answers]."""
        seen, asked = self.image(image), self.question(question)
        logits: Tensor = self.answer(torch.cat([seen, asked, seen * asked], dim=1))
        return logits


class QuestionObjective(SupervisedObjective):
    """Answers all questions about the images of a batch; each image is encoded once.

    The loss is M3AE's: binary cross-entropy of every answer, summed over answers and questions, and divided
    by B times the mean number of questions of a training image. So the mean over ranks and micro-batches is
    the loss of the whole batch.

    Args:
        method: fuses image and question (`Method.fuses`), or gives a feature of each.
        answers: `text_code` of the vocabulary's answers.
        mean_questions: of a training image.
        width: of the projections where the method fuses nothing.
    """

    def __init__(
        self, method: Method, answers: Sequence[int], mean_questions: float, width: int = 256
    ) -> None:
        image: Any = method.image_encoder
        text: Any = method.text_encoder
        head: nn.Module
        if method.fuses:
            head = AnswerHead(image.width + text.width, len(answers))
        else:
            head = ProductHead(image.width, text.width, width, len(answers))
        super().__init__(method, head, TRAINED)
        self.mean_questions = mean_questions
        codes = torch.from_numpy(np.array(sorted(answers), dtype=np.int64))
        # Not saved: made of the same samples again.
        self.register_buffer("codes", codes, persistent=False)

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        """The loss, and "accuracy" of the questions."""
        logits, (rows, columns) = self._logits(batch)
        truth = batch.fields["answers"][rows, columns]
        targets = (truth[:, None] == self._codes).to(logits.dtype)
        scale = len(batch.image) * self.mean_questions
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        right = (self._codes[logits.argmax(dim=1)] == truth).sum()
        return StepOutput(losses / scale, {"accuracy": right / scale})

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """[B, `Questions.MOST`] codes: "answers" that are given, "truth"; 0 where there is no question."""
        logits, (rows, columns) = self._logits(batch)
        truth = batch.fields["answers"]
        given = torch.zeros_like(truth)
        given[rows, columns] = self._codes[logits.argmax(dim=1)]
        padding = (0, Questions.MOST - truth.shape[1])
        return {"answers": F.pad(given, padding), "truth": F.pad(truth, padding)}

    @property
    def _codes(self) -> Tensor:
        return self.get_buffer("codes")

    def _logits(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[N, C] of all questions of the batch, and their images and numbers [N]."""
        rows, columns = _asked(batch)
        text = question_text(batch.fields["questions"][rows, columns])
        kind = next(self.head.parameters()).dtype
        if self.method.fuses:
            logits = self.head(self.method.fused_features(batch.image, text, rows).to(kind))
        else:
            logits = self.head(*(of.to(kind) for of in self._features(batch.image, text, rows)))
        return logits.float(), (rows, columns)

    def _features(self, image: Tensor, text: Text, rows: Tensor) -> tuple[Tensor, Tensor]:
        method: Any = self.method
        seen = method.image_encoder.summary(method.image_encoder(image))
        return seen[rows], method.text_encoder(text).hidden[:, 0]


def _asked(batch: Batch) -> tuple[Tensor, Tensor]:
    """Image and number [N] of each question, image by image."""
    asked = batch.fields["answers"] != 0
    # Questions first, in their order, and as many as the host knows of: `nonzero` waits for the device.
    order = (~asked).flatten().to(torch.uint8).argsort(stable=True)
    places = order[: sum(batch.counts["answers"])]
    return places // asked.shape[1], places % asked.shape[1]

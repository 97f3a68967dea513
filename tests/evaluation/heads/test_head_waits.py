"""Nothing in a step of a downstream task waits for the GPU, as nothing does in one of the pre-training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medvlp.config import ImageConfig
from medvlp.encoders.image import ImageEncoder
from medvlp.evaluation.heads import boxes, masks
from medvlp.evaluation.heads.classification import Classification, LinearHead
from medvlp.evaluation.heads.detection import Detection
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.heads.report import ReportObjective, WordVocabulary
from medvlp.evaluation.heads.report_decoder import ReportDecoder
from medvlp.evaluation.heads.segmentation import Segmentation
from medvlp.evaluation.heads.vqa import QuestionObjective
from tests.evaluation.heads.test_dense_objectives import RESNET, SIZE, batch
from tests.evaluation.tasks.test_report import batch_of as reports_of
from tests.evaluation.tasks.test_vqa import batch_of as questions_of
from tests.methods.small_mpma import SIZE as MPMA_SIZE
from tests.methods.small_mpma import small_mpma
from tests.training.test_host_waits import waits_of_a_pass

VIT = ImageConfig(
    name="vit_tiny_patch16_224", options={"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
)


class Seeing(nn.Module):
    """As much of a method as a head reads."""

    def __init__(self, config: ImageConfig = RESNET) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config, SIZE)

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        return self.image_encoder.summary(self.image_encoder(image))


@pytest.mark.parametrize(
    ("head", "loss"),
    [("unet", loss) for loss in ("ours", "mgca", "medslip", "mrm")]
    + [("resunet", "ours"), ("setr", "ours"), ("upernet", "ours")],
)
def test_segmentation(head: str, loss: Any) -> None:
    method: Any = Seeing(VIT if head in ("setr", "upernet") else RESNET)
    built = masks.build_head(head, method.image_encoder, 2)
    assert waits_of_a_pass(Segmentation(method, built, [0, 1], loss, [np.nan, 0.0]), batch()) == []


@pytest.mark.parametrize("head", ["yolo", "retinanet"])
def test_detection(head: str) -> None:
    """Not of faster-rcnn, whose documentation says why."""
    method: Any = Seeing()
    built = boxes.build_head(head, method.image_encoder, 2)
    assert waits_of_a_pass(Detection(method, built, [0, 1], boxes.Suppression()), batch()) == []


@pytest.mark.parametrize("kind", ["multi_label", "multi_class"])
def test_classification(kind: Any) -> None:
    method: Any = Seeing()
    head = LinearHead(24, 2)
    assert waits_of_a_pass(Classification(method, head, [0, 1], kind, [1.0, np.nan], 0.0), batch()) == []


def test_questions_about_images() -> None:
    objective: SupervisedObjective = QuestionObjective(small_mpma(), [3, 4], 2.0)
    assert waits_of_a_pass(objective, questions_of([2, 1], MPMA_SIZE)) == []


def test_reports() -> None:
    method: Any = Seeing()
    vocabulary = WordVocabulary(["effusion", "no", "."], "report_words")
    width, patches = method.image_encoder.local_width, int(np.prod(method.image_encoder.grid))
    decoder = ReportDecoder(width, patches, vocabulary.size, 0, 1, 2, 8, 16, 1, 2, 16, 0.0)
    objective = ReportObjective(method, decoder, vocabulary, 3.0)
    assert waits_of_a_pass(objective, reports_of([["no"], ["no", "effusion", "."]], SIZE)) == []

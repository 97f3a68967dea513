"""Detection: boxes of findings by a head on the image encoder, frozen or tuned.

What an image holds is `medvlp.evaluation.heads.detection.box_truth`: a finding without a box that is not
known to be absent may be anywhere, so nothing of it is missed or false there. Boxes are compared at the size
the network sees. Precision and FROC are those of `medvlp.evaluation.metrics.detection`.

Baselines: the same head on the untrained network; `pixels`, ridge regression from 32x32 pixels to whether a
finding is there and to its box, one box a finding; `mean-box`, the mean training box of each finding, scored
by how often it is there. Neither can find two boxes of a finding.

Published ways of measuring are switches: `skip_images`, `min_confidence=0.5`, `iou_plus_one` (MGCA, LoVT),
`frozen_bn=train` (MGCA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import key
from medvlp.evaluation.examples import (
    MOST,
    MOST_FOUND,
    BoxExample,
    Examples,
    by_finding,
    found_boxes,
    true_boxes,
)
from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap
from medvlp.evaluation.metrics.detection import BoxScores, Found, Held
from medvlp.evaluation.task import EvaluationError, Facts, Reading, TaskResult, Unit, register
from medvlp.evaluation.trained import Fitted, TrainedTask, TrainedTaskConfig

if TYPE_CHECKING:
    from medvlp.config import Config
    from medvlp.data.sample_store import SampleStore
    from medvlp.evaluation.box_baselines import Finds
    from medvlp.evaluation.heads.objective import SupervisedObjective
    from medvlp.evaluation.session import View
    from medvlp.evaluation.supervised import Network
    from medvlp.methods.base import Method
    from medvlp.training.predictions import Predictions
    from medvlp.training.recipe import TrainingSet
    from shards.reader import ShardReader

#: The image is seen whole, as when it is measured, and upright whatever its pre-training did: nothing turns
#: boxes and masks.
_WHOLE: dict[str, Any] = {"transform": {"crop": "none", "flip": 0.0, "rotate": 0.0, "rand_augment": 0}}


@dataclass
class DetectionConfig(TrainedTaskConfig):
    head: Literal["auto", "yolo", "retinanet", "faster-rcnn"] = key(
        "auto", "auto: the protocol's, else RetinaNet; yolo needs a backbone with stages at strides 8, 16, 32"
    )
    channels: int | None = key(None, "of the feature pyramid; null: 128; yolo has its own", 8, 1 << 14)
    smallest: float = key(2.0, "boxes with a side of fewer pixels are neither missed nor learned", 0, 1e4)
    min_confidence: float = key(
        0.001, "least score of a detection (published MGCA and LoVT: 0.5, which cuts the curve)", 0, 1
    )
    nms: float = key(0.5, "least IoU with a more certain detection of the finding that removes one", 0, 1)
    iou_plus_one: bool = key(False, "sides count one pixel more in that IoU (published; head yolo only)")
    skip_images: Literal["none", "no_prediction_or_no_box"] = key(
        "none", "images left out of precision and FROC (published MGCA: those without a detection or a box)"
    )
    frozen_bn: Literal["eval", "train"] = key(
        "eval", "train: batch norms of a frozen encoder follow the training batches (published MGCA)"
    )


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    boxes = notes.get("boxes", {})
    return [f"{sum(boxes.values())} boxes of {len(boxes)} findings"] if boxes else []


@register
class Detection(TrainedTask):
    """See the module."""

    name = "detection"
    version = 2
    hedged = "boxes of hedged findings are neither missed nor false"
    summary = "boxes of findings by a head on the image encoder, with a part of the training patients"
    packages = ("pycocotools",)
    teaches = "a box of one of the findings, or one that is known to be absent"
    config = DetectionConfig
    keeps_examples = True
    fields = frozenset({"boxes"})
    chooses = "map_40_75/macro"
    chooses_mode = "max"
    reading = Reading(
        names={
            "map_40_75": "mAP at IoU 0.40–0.75",
            "map_50_95": "mAP at IoU 0.50–0.95",
            "ap50": "AP at IoU 0.50",
            "ap75": "AP at IoU 0.75",
            "froc": "FROC",
        },
        remarks=_remarks,
        places=True,
    )
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ours": {
            "optimizer": {"lr": 1e-3, "image_lr_scale": 0.1, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 16, "epochs": 50.0, "min_steps": 500, "gradient_clip": 5.0},
            "data": _WHOLE,
        },
        "ours-frozen": {
            "image": {"frozen": True},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 16, "epochs": 50.0, "min_steps": 500, "gradient_clip": 5.0},
            "data": _WHOLE,
        },
        "mgca": {
            "image": {"frozen": True},
            "optimizer": {
                "lr": 5e-4,
                "weight_decay": 1e-6,
                "schedule": "constant",
                "warmup": 0.0,
                "decay_all": True,
            },
            "train": {"global_batch": 16, "epochs": 50.0},
            "data": _WHOLE,
        },
    }

    def objective(self, method: Method, data: TrainingSet) -> SupervisedObjective:
        """See `TrainedTask.objective`."""
        from medvlp.evaluation.heads import detection
        from medvlp.evaluation.heads.boxes import Suppression, build_head
        from medvlp.evaluation.heads.pyramids import encoder_of

        settings = self.settings
        default = "yolo" if settings.protocol == "mgca" else "retinanet"
        columns = self.columns(data.reader.index.label_names)
        name = default if settings.head == "auto" else settings.head
        head = build_head(name, encoder_of(method), len(columns), settings.channels)
        suppression = Suppression(settings.min_confidence, settings.nms, settings.iou_plus_one)
        drifting = settings.frozen_bn == "train"
        return detection.Detection(method, head, columns, suppression, settings.smallest, drifting)

    def unavailable_on(self, facts: Facts) -> str | None:
        if not facts.findings:
            return "the dataset has no labels, which name the boxes"
        return super().unavailable_on(facts)

    def learnable(self, reader: ShardReader, split: str, store: SampleStore) -> NDArray[np.bool_]:
        """Samples with a box of a finding that is learned, or where one is known to be absent."""
        names = reader.index.label_names
        findings = self.findings(names)
        found = (store.labels[:, self.columns(names)] == 0).any(axis=1)
        unreadable = set(store.unreadable.tolist())
        for i in np.flatnonzero(~found).tolist():
            if i not in unreadable:
                boxes = reader.metadata(split, i)["boxes"]
                found[i] = any(box["label"] in findings for box in boxes)
        return np.asarray(found)

    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """Precision of each finding with a box, without intervals."""
        names = self.findings(data.reader.index.label_names)
        none = PatientBootstrap(np.arange(len(predictions.sample)), 0, 0)
        found = self._metrics(_scores(names, predictions.arrays["found"], predictions.arrays["held"]), none)
        return {name: value.value for name, value in found.items()}

    def choose(self, view: View, unit: Unit, networks: Mapping[str, Network]) -> Finds:
        """Teach the baselines."""
        from medvlp.evaluation.box_baselines import taught

        network, columns = networks["trained"], self.columns(view.facts.index.label_names)
        batches = network.batches(view, "train", network.drawn(view))
        return taught(batches, columns, self.settings.smallest)

    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        """Precision and FROC of the networks and the baselines."""
        names, finds = fitted.findings, fitted.chosen
        first = predictions["trained"]
        held = first.arrays["held"]
        found = {model: of.arrays["found"] for model, of in predictions.items()}
        found |= _drawn(finds, fitted.networks["trained"].batches(view, "evaluated", first.sample))
        bootstrap = view.bootstrap(view.patients("evaluated", first.sample))
        result = TaskResult()
        for model, of in found.items():
            scores = _scores(names, of, held)
            result.models[model] = self._metrics(scores, bootstrap)
        boxes = scores.boxes()
        if not any(boxes.values()):
            raise EvaluationError(f"{self.name}: {view.facts.roles['evaluated']} holds no box to be found")
        result.notes = {
            "boxes": boxes,
            "not_evaluable": [
                {"finding": name, "reason": "no box in the evaluated split"}
                for name, count in boxes.items()
                if not count
            ],
        }
        result.examples = _examples(names, first, fitted.networks["trained"].config)
        return result

    def columns(self, label_names: Sequence[str]) -> list[int]:
        """Of the findings among the dataset's labels."""
        return [label_names.index(name) for name in self.findings(label_names)]

    def _metrics(self, scores: BoxScores, bootstrap: PatientBootstrap) -> dict[str, Estimate]:
        return scores.metrics(bootstrap, self.settings.min_confidence, self.settings.skip_images)


def _scores(names: Sequence[str], found: NDArray[Any], held: NDArray[Any]) -> BoxScores:
    """Of [N, n, 6] detections and [N, m, 6] boxes as `heads.detection.Detection.predict` gives them."""
    table = BoxScores(names)
    for row, (seen, there) in enumerate(zip(found.astype(np.float64), held.astype(np.float64), strict=True)):
        seen, there = seen[seen[:, 4] >= 0], there[there[:, 4] >= 0]
        table.add(
            row,
            Found(seen[:, :4], seen[:, 5], seen[:, 4].astype(np.int64)),
            Held(there[:, :4], there[:, 4].astype(np.int64), there[:, 5] > 0),
        )
    return table


def _examples(names: Sequence[str], predictions: Predictions, config: Config) -> Examples:
    """Boxes of the trained network and true ones, of images with a box of each finding in turn."""
    from medvlp.data.transforms import evaluation_crop

    found, held = predictions.arrays["found"], predictions.arrays["held"]
    certain = (held[:, :, 4] >= 0) & (held[:, :, 5] == 0)
    shows = np.stack([(certain & (held[:, :, 4] == column)).any(1) for column in range(len(names))], axis=1)
    rows, side = sorted(row for row, _ in by_finding(shows, MOST)), config.data.image_size
    return Examples(
        "The first images with a box of each finding in turn, chosen by what is true, not by what the "
        f"network says. Of its boxes the {MOST_FOUND} most certain ones are kept.",
        side,
        evaluation_crop(config.data.transform),
        boxes=[
            BoxExample(
                int(predictions.sample[row]),
                found_boxes(names, found[row], side),
                true_boxes(names, held[row], side),
            )
            for row in rows
        ],
    )


def _drawn(finds: Finds, batches: Any) -> dict[str, NDArray[Any]]:
    """[N, C, 6] detections of each baseline."""
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in finds}
    for batch in batches:
        for name, find in finds.items():
            rows[name].append(find(batch))
    return {name: np.concatenate(of) for name, of in rows.items()}

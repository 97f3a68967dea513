"""Segmentation: masks of findings by a head on the image encoder, frozen or tuned.

A mask is known where the dataset holds one (of zeros, too: the finding was looked for and is not there) and
the finding is not hedged; other pairs of an image and a finding teach nothing and have no number. Masks are
compared at the size the network sees. Each finding has a threshold of its own, chosen on the selection split
by the mean of `dice_pos` and `dice_neg`, unless `threshold` fixes one for all.

Baselines: the same head on the untrained network; `pixels`, ridge regression from 32x32 pixels to masks of
16x16; `mean-mask`, the mean of the training masks of each finding; `empty`, nothing called.

Published ways of measuring are switches (`medvlp.evaluation.metrics.segmentation`): `reduction=batch_mean`
(GLoRIA, MGCA), `last_batch=drop` and `smooth=1` (MedKLIP, MeDSLIP), `frozen_bn=train` (MGCA).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import Config, ConfigError, key
from medvlp.evaluation.examples import MOST, MOST_ABSENT, Examples, by_finding, mask_example
from medvlp.evaluation.labels import sides
from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap
from medvlp.evaluation.metrics.segmentation import THRESHOLDS, MaskCounts, best_thresholds, dice
from medvlp.evaluation.task import EvaluationError, Facts, Reading, TaskResult, Unit, register
from medvlp.evaluation.trained import Fitted, TrainedTask, TrainedTaskConfig
from shards.errors import NotFiniteError

if TYPE_CHECKING:
    from torch import Tensor

    from medvlp.data.batch import Batch
    from medvlp.data.sample_store import SampleStore
    from medvlp.evaluation.heads.objective import SupervisedObjective
    from medvlp.evaluation.mask_baselines import Draws, Truth
    from medvlp.evaluation.session import View
    from medvlp.evaluation.supervised import Network
    from medvlp.methods.base import Method
    from medvlp.training.predictions import Predictions
    from medvlp.training.recipe import TrainingSet
    from shards.reader import ShardReader

Counts = NDArray[np.int64]
Known = NDArray[np.bool_]

#: Head and loss that each protocol publishes, which "auto" means.
_PUBLISHED = {"mgca": ("auto", "mgca"), "medslip": ("resunet", "medslip"), "mrm": ("upernet", "mrm")}
_OURS = ("auto", "ours")

#: The image is seen whole, as when it is measured, and upright whatever its pre-training did: nothing turns
#: boxes and masks.
_WHOLE: dict[str, Any] = {"transform": {"crop": "none", "flip": 0.0, "rotate": 0.0, "rand_augment": 0}}


@dataclass
class SegmentationConfig(TrainedTaskConfig):
    head: Literal["auto", "unet", "setr", "upernet", "resunet"] = key(
        "auto", "auto: the protocol's, else U-Net on a backbone with stages and SETR-PUP on a transformer"
    )
    channels: int | None = key(
        None, "of the head's widest map; null: as published (unet 256, setr 512, upernet 256)", 16, 1 << 14
    )
    loss: Literal["auto", "ours", "mgca", "medslip", "mrm"] = key("auto", "auto: the protocol's")
    threshold: float | None = key(
        None,
        "probability above which a pixel is called, a multiple of 0.02 (published: 0.5); null: the best of "
        "each finding on the selection split",
        0,
        0.98,
    )
    reduction: Literal["image", "batch_mean"] = key(
        "image", "batch_mean: mean over batches of their means (published GLoRIA, MGCA)"
    )
    batch: int = key(16, "images of a batch of reduction and last_batch", 1, 1 << 16)
    last_batch: Literal["keep", "drop"] = key(
        "keep", "drop: leave out the images of an incomplete last batch (published MedKLIP, MeDSLIP)"
    )
    smooth: float = key(0.0, "added to both sides of IoU (published MedKLIP, MeDSLIP: 1)", 0, 1e6)
    frozen_bn: Literal["eval", "train"] = key(
        "eval", "train: batch norms of a frozen encoder follow the training batches (published MGCA)"
    )

    def check(self, config: Config) -> None:
        super().check(config)
        step = None if self.threshold is None else self.threshold * THRESHOLDS
        if step is not None and abs(step - round(step)) > 1e-6:
            raise ConfigError(
                f"evaluation.tasks.{Segmentation.name}.threshold={self.threshold}: masks are counted at "
                f"multiples of {1 / THRESHOLDS}"
            )


@dataclass
class Chosen:
    """What was taught and chosen beside the networks, without the evaluated split.

    Attributes:
        thresholds: model -> finding -> number of its threshold.
        draws: baseline -> its probabilities of a batch.
    """

    thresholds: dict[str, dict[str, int]]
    draws: Draws


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    lines = [f"thresholds {notes['threshold_from']}"] if "threshold_from" in notes else []
    if counts := notes.get("counts"):
        shown = sum(of["positives"] for of in counts.values())
        lines.append(f"{shown} masks of {len(counts)} findings; calling nothing gives dice_neg 1, dice_pos 0")
    return lines


@register
class Segmentation(TrainedTask):
    """See the module."""

    name = "segmentation"
    summary = "masks of findings by a head on the image encoder, with a part of the training patients"
    packages = ("segmentation_models_pytorch",)
    teaches = "a mask of one of the findings"
    config = SegmentationConfig
    version = 2
    keeps_examples = True
    fields = frozenset({"masks"})
    chooses = "dice/macro"
    chooses_mode = "max"
    reading = Reading(
        names={
            "dice_all": "Dice (all)",
            "dice_pos": "Dice (with the finding)",
            "dice_neg": "Dice (without it)",
            "iou_all": "IoU (all)",
            "iou_pos": "IoU (with the finding)",
        },
        remarks=_remarks,
        places=True,
    )
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ours": {
            "optimizer": {"lr": 1e-3, "image_lr_scale": 0.1, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 16, "epochs": 50.0, "min_steps": 500},
            "data": _WHOLE,
        },
        "ours-frozen": {
            "image": {"frozen": True},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 16, "epochs": 50.0, "min_steps": 500},
            "data": _WHOLE,
        },
        "mgca": {
            "image": {"frozen": True},
            "optimizer": {
                "lr": 5e-4,
                "weight_decay": 0.05,
                "schedule": "constant",
                "warmup": 0.0,
                "decay_all": True,
            },
            "train": {"global_batch": 16, "epochs": 50.0},
            "checkpoint": {"keep_best": "valid/loss", "best_mode": "min"},
            "data": _WHOLE,
        },
        "medslip": {
            "optimizer": {"lr": 1e-5, "weight_decay": 0.02, "schedule": "constant", "warmup": 0.0},
            "train": {"global_batch": 64, "epochs": 1000.0},
            "checkpoint": {"keep_best": "valid/loss", "best_mode": "min"},
            "data": {"transform": _WHOLE["transform"] | {"flip": 0.5}},
        },
        "mrm": {
            "optimizer": {"lr": 2e-5, "weight_decay": 0.05, "layer_decay": 0.65, "warmup_steps": 100},
            "train": {"global_batch": 16, "steps": 5000},
            "data": {"transform": _WHOLE["transform"] | {"flip": 0.5}},
        },
    }

    def objective(self, method: Method, data: TrainingSet) -> SupervisedObjective:
        """See `TrainedTask.objective`."""
        from medvlp.evaluation.heads import segmentation
        from medvlp.evaluation.heads.masks import build_head
        from medvlp.evaluation.heads.pyramids import encoder_of

        settings = self.settings
        published = _PUBLISHED.get(settings.protocol, _OURS)
        head = published[0] if settings.head == "auto" else settings.head
        loss: Any = published[1] if settings.loss == "auto" else settings.loss
        columns = self.columns(data.reader.index.label_names)
        built = build_head(head, encoder_of(method), len(columns), settings.channels)
        drifting = settings.frozen_bn == "train"
        uncertain = self._sides(data.reader.index.label_names)
        return segmentation.Segmentation(method, built, columns, loss, uncertain, drifting)

    def unavailable_on(self, facts: Facts) -> str | None:
        if not facts.findings:
            return "the dataset has no labels, which name the masks"
        return super().unavailable_on(facts)

    def learnable(self, reader: ShardReader, split: str, store: SampleStore) -> NDArray[np.bool_]:
        """Samples that hold a mask of a finding that is learned."""
        findings = set(self.findings(reader.index.label_names))
        found = np.zeros(len(store), dtype=bool)
        unreadable = set(store.unreadable.tolist())
        for i in range(len(store)):
            found[i] = i not in unreadable and not findings.isdisjoint(reader.metadata(split, i)["masks"])
        return found

    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """Mean of `dice_pos` and `dice_neg` of each finding at its best threshold, or the fixed one."""
        names = self.findings(data.reader.index.label_names)
        pixels, known = _counts(predictions)
        chosen = self._thresholds(names, pixels, known)
        found = {}
        for column, name in enumerate(names):
            of = known[:, column]
            shows = of & (pixels[:, column, 0, 1] > 0)
            if shows.any():
                scores = dice(pixels[:, column, chosen[name]])
                sides = [scores[side].mean() for side in (shows, of & ~shows) if side.any()]
                found[f"dice/{name}"] = float(np.mean(sides))
        return found | ({"dice/macro": float(np.mean(list(found.values())))} if found else {})

    def choose(self, view: View, unit: Unit, networks: Mapping[str, Network]) -> Chosen:
        """Teach the baselines; choose thresholds on the selection split."""
        from medvlp.evaluation.mask_baselines import taught

        network = networks["trained"]
        names = self.findings(view.facts.index.label_names)
        selection = {model: of.predict(view, "selection") for model, of in networks.items()}
        truth = partial(self._truth, view.facts.index.label_names)
        draws = taught(lambda: network.batches(view, "train", network.drawn(view)), truth)
        counts = {model: _counts(of) for model, of in selection.items()}
        batches = network.batches(view, "selection", selection["trained"].sample)
        counts |= _counted(draws, batches, truth)
        chosen = {model: self._thresholds(names, *of) for model, of in counts.items()}
        return Chosen(chosen, draws)

    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        """Dice and IoU of the networks and the baselines."""
        settings, names, chosen = self.settings, fitted.findings, fitted.chosen
        first = predictions["trained"]
        counts = {model: _counts(of) for model, of in predictions.items()}
        truth = partial(self._truth, view.facts.index.label_names)
        batches = fitted.networks["trained"].batches(view, "evaluated", first.sample)
        counts |= _counted(chosen.draws, batches, truth)
        bootstrap = view.bootstrap(view.patients("evaluated", first.sample))
        result = TaskResult()
        for model, (pixels, known) in counts.items():
            at = [chosen.thresholds[model][name] for name in names]
            of = MaskCounts(names, pixels[:, np.arange(len(names)), at], known)
            result.models[model] = self._metrics(of, bootstrap)
        nothing = of.pixels.copy()
        nothing[:, :, [0, 2]] = 0
        empty = MaskCounts(names, nothing, of.known)
        result.models["empty"] = self._metrics(empty, bootstrap)
        if not result.models["empty"]:
            raise EvaluationError(
                f"{self.name}: no finding has a mask in two images of {view.facts.roles['evaluated']}"
            )
        fixed = settings.threshold
        where = "best on the split " + view.facts.roles["selection"] if fixed is None else f"{fixed:g}"
        result.notes = {
            "threshold_from": where,
            "thresholds": {model: _probabilities(of) for model, of in chosen.thresholds.items()},
            "counts": {
                name: {"positives": int(shown), "known": int(known)}
                for name, shown, known in zip(names, empty.shows.sum(0), empty.known.sum(0), strict=True)
            },
            "not_evaluable": [
                {"finding": name, "reason": f"{count} masks in the evaluated split, needs 2"}
                for name, count in empty.few().items()
            ],
        }
        result.examples = self._examples(view, fitted, first.sample, empty)
        return result

    def _examples(self, view: View, fitted: Fitted, sample: NDArray[np.int64], truth: MaskCounts) -> Examples:
        """Masks by the trained network beside true ones, of findings in turn; of some absent ones, too."""
        import torch

        from medvlp.data.transforms import evaluation_crop
        from medvlp.evaluation.heads import segmentation

        network, names = fitted.networks["trained"], fitted.findings
        pairs = by_finding(truth.shows, MOST)
        absent = truth.known & ~truth.shows
        absent[[row for row, _ in pairs]] = False
        pairs += by_finding(absent, MOST_ABSENT)
        steps = torch.tensor([fitted.chosen.thresholds["trained"][name] for name in names])

        def look(objective: SupervisedObjective, batch: Batch) -> Mapping[str, Tensor]:
            assert isinstance(objective, segmentation.Segmentation)
            return objective.draw(batch, steps)

        positions = sample[[row for row, _ in pairs]]
        seen = network.predict(view, "evaluated", positions, look)
        place = {position: row for row, position in enumerate(seen.sample.tolist())}
        masks = [seen.arrays[kind].astype(bool) for kind in ("drawn", "truth")]
        return Examples(
            "The first images with a mask of each finding in turn, then some that are known not to show one; "
            "chosen by what is true, not by what the network says.",
            masks[0].shape[-1],
            evaluation_crop(network.config.data.transform),
            masks=[
                mask_example(position, names[column], *(of[place[position], column] for of in masks))
                for position, (_, column) in zip(positions.tolist(), pairs, strict=True)
            ],
        )

    def columns(self, label_names: Sequence[str]) -> list[int]:
        """Of the findings among the dataset's labels."""
        return [label_names.index(name) for name in self.findings(label_names)]

    def _sides(self, label_names: Sequence[str]) -> list[float]:
        return [float(side) for side in sides(self.settings.uncertain, self.findings(label_names))]

    def _truth(self, label_names: Sequence[str], batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        from medvlp.evaluation.heads.segmentation import mask_truth

        sides = torch.tensor(self._sides(label_names))
        return mask_truth(batch, torch.tensor(self.columns(label_names)), sides)

    def _thresholds(self, names: Sequence[str], pixels: Counts, known: Known) -> dict[str, int]:
        """Of every finding; the middle where nothing could choose."""
        fixed = self.settings.threshold
        if fixed is not None:
            return dict.fromkeys(names, round(fixed * THRESHOLDS))
        return dict.fromkeys(names, THRESHOLDS // 2) | best_thresholds(names, pixels, known)

    def _metrics(self, counts: MaskCounts, bootstrap: PatientBootstrap) -> dict[str, Estimate]:
        settings = self.settings
        dropped = settings.last_batch == "drop"
        return counts.metrics(bootstrap, settings.reduction, settings.batch, dropped, settings.smooth)


def _counts(predictions: Predictions) -> tuple[Counts, Known]:
    """Pixels [N, C, T, 3] and known [N, C]; booleans travel as bytes.

    Raises:
        NotFiniteError: of a mask nothing could be counted (see `mask_counts`).
    """
    pixels = predictions.arrays["pixels"].astype(np.int64)
    if (pixels < 0).any():
        raise NotFiniteError("masks")
    return pixels, predictions.arrays["known"].astype(bool)


def _counted(draws: Draws, batches: Iterable[Batch], truth: Truth) -> dict[str, tuple[Counts, Known]]:
    """The same of each baseline."""
    from medvlp.evaluation.heads.segmentation import mask_counts

    pixels: dict[str, list[Counts]] = {name: [] for name in draws}
    known = []
    for batch in batches:
        masks, of = truth(batch)
        known.append(of.numpy())
        for name, draw in draws.items():
            pixels[name].append(mask_counts(draw(batch), masks).numpy())
    return {name: (np.concatenate(of).astype(np.int64), np.concatenate(known)) for name, of in pixels.items()}


def _probabilities(numbers: Mapping[str, int]) -> dict[str, float]:
    return {name: number / THRESHOLDS for name, number in numbers.items()}

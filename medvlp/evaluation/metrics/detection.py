"""Boxes that were found against boxes that are there: average precision as COCO defines it, and FROC.

Matching is pycocotools' `COCOeval`, with thresholds of our own: detections of an image and class by falling
score, each to the free box of the highest IoU. Precision over recall is summed here, because `COCOeval`
cannot weigh images, which intervals by patient need; with equal weights the numbers are `COCOeval`'s.

Images without boxes stay (what is found there is false), images without detections stay (their boxes are
missed). Boxes of hedged findings are crowd regions: neither to be found nor false. Equal scores stand in the
order of the samples.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, estimate
from shards.errors import NotFiniteError

Floats = NDArray[np.float64]
Skipped = Literal["none", "no_prediction_or_no_box"]

#: IoU thresholds: MGCA's 0.40 to 0.75, and COCO's 0.50 to 0.95.
THRESHOLDS = np.round(np.arange(0.40, 0.96, 0.05), 2)
MEASURES = {
    "map_40_75": np.flatnonzero(THRESHOLDS <= 0.75),
    "map_50_95": np.flatnonzero(THRESHOLDS >= 0.50),
    "ap50": np.flatnonzero(THRESHOLDS == 0.50),
    "ap75": np.flatnonzero(THRESHOLDS == 0.75),
}
#: False positives an image at which FROC looks (Object-CXR).
FALSE_POSITIVES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
#: Detections of an image and class that count, the most certain ones.
MOST = 100
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Found:
    """Detections in an image: boxes [n, 4] (left, top, right, bottom), scores [n], classes [n] from 0."""

    boxes: Floats
    scores: Floats
    classes: NDArray[np.int64]

    def above(self, confidence: float) -> Found:
        """Those of at least this score."""
        kept = self.scores >= confidence
        return Found(self.boxes[kept], self.scores[kept], self.classes[kept])


@dataclass(frozen=True)
class Held:
    """What is in an image: boxes [m, 4], classes [m] from 0, and which boxes are of hedged findings [m]."""

    boxes: Floats
    classes: NDArray[np.int64]
    hedged: NDArray[np.bool_]


@dataclass(frozen=True)
class Ranked:
    """The detections of one class over all N images that decide a measure, by falling score.

    Attributes:
        image: [K] image of each right one; `worth`: [K] how many boxes it finds.
        false_at: [N, K + 1] wrong detections in each image before the first right one, and after each:
            whole numbers and few of them, for a dense table of a large split has billions of zeros.
        boxes: [N] boxes in each image that are to be found.
    """

    image: NDArray[np.int64]
    worth: Floats
    false_at: sparse.csr_array
    boxes: Floats

    @classmethod
    def of(
        cls, scores: Floats, image: NDArray[np.int64], worth: Floats, wrong: NDArray[np.bool_], boxes: Floats
    ) -> Ranked:
        """From [D] detections in the order of the images: score, image, boxes found, whether it is false."""
        order = np.argsort(-scores, kind="mergesort")
        right = worth[order] > 0
        # A false detection stands before all right ones from the next one on.
        following: NDArray[np.int64] = np.cumsum(right) - right
        chosen = wrong[order]
        ones, places = np.ones(int(chosen.sum())), (image[order][chosen], following[chosen])
        false_at = sparse.coo_array((ones, places), shape=(len(boxes), int(right.sum()) + 1)).tocsr()
        return cls(image[order][right], worth[order][right], false_at, boxes)

    def sums(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """With weights [R, N]: boxes found up to each right detection [R, K], false ones before it [R, K],
        and boxes there are [R]."""
        found = (weights[:, self.image] * self.worth).cumsum(1)
        wrong = np.asarray(self.false_at.T @ weights.T).T.cumsum(1)[:, :-1]
        return found, wrong, weights @ self.boxes


def average_precision(ranked: Ranked, weights: Floats) -> Floats:
    """[R] areas under precision over recall, by 101 points of recall; NaN without a box.

    Precision at a recall is the largest at this or any higher recall, 0 where recall does not come so far.
    """
    found, wrong, boxes = ranked.sums(weights)
    precision = np.divide(found, found + wrong, out=np.zeros_like(found), where=found > 0)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(found), 1))], axis=1)
    area = np.full(len(boxes), np.nan)
    for row in np.flatnonzero(boxes > 0):
        area[row] = precision[row, np.searchsorted(found[row] / boxes[row], _RECALLS)].mean()
    return area


def froc(ranked: Ranked, weights: Floats) -> Floats:
    """[R] mean sensitivities at so many false positives an image as `FALSE_POSITIVES` says; NaN without a
    box. Where there are fewer, the last sensitivity stands."""
    found, wrong, boxes = ranked.sums(weights)
    gains, images = np.diff(found, axis=1, prepend=0.0), weights.sum(1)
    hits = [(gains * (wrong <= level * images[:, None])).sum(1) for level in FALSE_POSITIVES]
    undefined = np.full(len(boxes), np.nan)
    sensitivity: Floats = np.divide(np.mean(hits, axis=0), boxes, out=undefined, where=boxes > 0)
    return sensitivity


class BoxScores:
    """Detections and boxes of every image of a split."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: the C classes."""
        self.names = list(names)
        self._images: dict[int, tuple[Found, Held]] = {}

    def add(self, row: int, found: Found, held: Held) -> None:
        """Add an image by the number of its sample in the split.

        Raises:
            ValueError: the image has been added.
            NotFiniteError: a score or box is NaN or infinite.
        """
        if row in self._images:
            raise ValueError(f"sample {row} is added twice")
        if not (np.isfinite(found.scores).all() and np.isfinite(found.boxes).all()):
            raise NotFiniteError(f"boxes or scores found in sample {row}")
        self._images[row] = found, held

    def boxes(self) -> dict[str, int]:
        """Class -> number of boxes that are to be found."""
        held = [of.classes[~of.hedged] for _, of in self._images.values()]
        counts = np.bincount(np.concatenate(held or [np.empty(0, np.int64)]), minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def metrics(
        self, bootstrap: PatientBootstrap, confidence: float = 0.0, skipped: Skipped = "none"
    ) -> dict[str, Estimate]:
        """Estimates by `<measure>/<class>` and "macro", the mean over classes; none of a class without a box.

        Args:
            bootstrap: resamples of the split's patients.
            confidence: least score of a detection that counts; above 0 it cuts the curve, so that values
                fall (published MGCA and LoVT: 0.5).
            skipped: images left out; "no_prediction_or_no_box" hides both misses and false detections
                (published MGCA).
        """
        images = {row: (found.above(confidence), held) for row, (found, held) in self._images.items()}
        rows = [
            row
            for row, (found, held) in sorted(images.items())
            if skipped == "none" or (len(found.scores) and (~held.hedged).any())
        ]
        found, held = [images[row][0] for row in rows], [images[row][1] for row in rows]
        result: dict[str, Estimate] = {}
        macros: dict[str, Macro] = {}
        classes = [name for name, count in self.boxes().items() if count]
        matched = _matched(found, held, len(self.names)) if rows else {}
        for number, name in enumerate(self.names):
            if name not in classes:
                continue
            of, area = matched.get(number, []), froc_ranking(found, held, number)
            statistics = (
                {
                    measure: partial(_mean_precision, [of[i] for i in chosen])
                    for measure, chosen in MEASURES.items()
                }
                if of
                else {}
            )
            for measure, statistic in {**statistics, "froc": partial(froc, area)}.items():
                value = float(statistic(np.ones((1, len(rows))))[0])
                if np.isnan(value):
                    continue
                draws = bootstrap.draws(statistic, np.array(rows))
                result[f"{measure}/{name}"] = estimate(value, draws)
                macros.setdefault(f"{measure}/macro", Macro()).add(value, draws)
        return {measure: macro.estimate() for measure, macro in macros.items()} | result


def _mean_precision(ranked: Sequence[Ranked], weights: Floats) -> Floats:
    mean: Floats = np.mean([average_precision(of, weights) for of in ranked], axis=0)
    return mean


def _matched(found: Sequence[Found], held: Sequence[Held], classes: int) -> dict[int, list[Ranked]]:
    """Class -> its detections, ranked, at each of `THRESHOLDS`; of classes with a box or a detection."""
    evaluated = coco_evaluation(found, held, classes)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluated.evaluate()
    images, result = len(found), {}
    for number in range(classes):
        items = evaluated.evalImgs[number * images : (number + 1) * images]
        known = [(image, item) for image, item in enumerate(items) if item is not None]
        if not known:
            continue
        boxes = np.zeros(images)
        for place, item in known:
            boxes[place] = (np.asarray(item["gtIgnore"]) == 0).sum()
        scores = np.concatenate([item["dtScores"] for _, item in known]).astype(np.float64)
        image = np.repeat([place for place, _ in known], [len(item["dtScores"]) for _, item in known])
        hits = np.concatenate([item["dtMatches"] for _, item in known], axis=1) > 0
        ignored = np.concatenate([item["dtIgnore"] for _, item in known], axis=1) > 0
        result[number] = [
            Ranked.of(scores, image, (hit & ~out).astype(np.float64), ~hit & ~out, boxes)
            for hit, out in zip(hits, ignored, strict=True)
        ]
    return result


def coco_evaluation(found: Sequence[Found], held: Sequence[Held], classes: int) -> Any:
    """A `COCOeval` of these images, at `THRESHOLDS`, all areas and `MOST` detections; not evaluated yet.

    Images and classes are numbered from 0, boxes and detections from 1: `COCOeval` takes a match with number
    0 for no match.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image, (seen, there) in enumerate(zip(found, held, strict=True)):
        for box, kind, hedged in zip(there.boxes, there.classes, there.hedged, strict=True):
            boxes.append(_annotation(len(boxes), image, box, kind) | {"iscrowd": int(hedged)})
        for box, kind, score in zip(seen.boxes, seen.classes, seen.scores, strict=True):
            item = _annotation(len(detections), image, box, kind)
            detections.append(item | {"iscrowd": 0, "score": float(score)})
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for annotations in (boxes, detections):
            side = COCO()
            side.dataset = {
                "images": [{"id": image} for image in range(len(found))],
                "categories": [{"id": number} for number in range(classes)],
                "annotations": annotations,
            }
            side.createIndex()
            sides.append(side)
        evaluated = COCOeval(*sides, "bbox")
    evaluated.params.iouThrs = THRESHOLDS
    evaluated.params.areaRng, evaluated.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluated.params.maxDets = [MOST]
    return evaluated


def _annotation(number: int, image: int, box: Floats, kind: Any) -> dict[str, Any]:
    left, top, right, bottom = (float(value) for value in box)
    return {
        "id": number + 1,
        "image_id": image,
        "category_id": int(kind),
        "bbox": [left, top, right - left, bottom - top],
        "area": (right - left) * (bottom - top),
    }


def froc_ranking(found: Sequence[Found], held: Sequence[Held], number: int) -> Ranked:
    """The detections of a class for `froc`: right is one whose centre lies in a box that none of a higher
    score lay in; one in a box that has been found, or in a hedged one, is neither right nor false."""
    scores, images, worth, wrong, boxes = [], [], [], [], np.zeros(len(found))
    for image, (seen, there) in enumerate(zip(found, held, strict=True)):
        own = there.classes == number
        sure, hedged = there.boxes[own & ~there.hedged], there.boxes[own & there.hedged]
        boxes[image] = len(sure)
        of = np.flatnonzero(seen.classes == number)
        hit = np.zeros(len(sure), dtype=bool)
        for i in of[np.argsort(-seen.scores[of], kind="mergesort")][:MOST]:
            x, y = (seen.boxes[i, 0] + seen.boxes[i, 2]) / 2, (seen.boxes[i, 1] + seen.boxes[i, 3]) / 2
            inside = _holds(sure, x, y)
            scores.append(seen.scores[i])
            images.append(image)
            worth.append(float((inside & ~hit).sum()))
            wrong.append(not inside.any() and not _holds(hedged, x, y).any())
            hit |= inside
    return Ranked.of(
        np.array(scores, dtype=np.float64),
        np.array(images, dtype=np.int64),
        np.array(worth, dtype=np.float64),
        np.array(wrong, dtype=bool),
        boxes,
    )


def _holds(boxes: Floats, x: float, y: float) -> NDArray[np.bool_]:
    """[m] whether each box [m, 4] holds the point."""
    return (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])

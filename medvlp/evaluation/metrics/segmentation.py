"""How well called pixels cover masks: Dice and IoU of pairs of an image and a finding, three counts each.

Hand-written, for packages disagree about empty masks: torchmetrics gives NaN, MONAI 1.0 or NaN by an option.
Here an image without the finding scores 1 if no pixel is called and 0 otherwise. Where nothing is known, the
pair has no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, Statistic, estimate
from medvlp.evaluation.metrics.pairs import weighted_mean

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Pixels = NDArray[np.bool_]
#: "image": mean over images; "batch_mean": mean over batches of their means (published).
Reduction = Literal["image", "batch_mean"]

#: Masks are counted at the thresholds k / THRESHOLDS of a probability.
THRESHOLDS = 50
#: Fewest images that show a finding for it to have a number.
FEWEST = 2


def pixel_counts(called: Pixels, truth: Pixels) -> Counts:
    """[..., H, W] called and true pixels -> [..., 3] numbers of called, true, and called and true pixels."""
    parts = (called, truth, called & truth)
    return np.stack([part.sum((-2, -1), dtype=np.int64) for part in parts], axis=-1)


def dice(counts: Counts) -> Floats:
    """[..., 3] pixel counts -> [...] Dice coefficients in [0, 1]; 1 where nothing is called or true."""
    called, true, both = np.moveaxis(counts.astype(np.float64), -1, 0)
    return np.where(called + true > 0, 2 * both / np.maximum(called + true, 1), 1.0)


def iou(counts: Counts, smooth: float = 0.0) -> Floats:
    """[..., 3] pixel counts -> [...] intersection over union in [0, 1]; 1 where both are empty.

    `smooth` is added to both sides (published MedKLIP: 1, which gives every image of empty overlap a number
    above 0).
    """
    called, true, both = np.moveaxis(counts.astype(np.float64), -1, 0)
    union = called + true - both
    return np.where(union > 0, (both + smooth) / np.maximum(union + smooth, 1), 1.0)


@dataclass(frozen=True)
class MaskCounts:
    """What is counted of masks: all that numbers need, so that memory does not grow with their pixels.

    Attributes:
        names: the C findings.
        pixels: [N, C, 3] called, true, and called and true pixels (`pixel_counts`), in the order of the
            split. known: [N, C] whether it is known where in the image the finding is.
    """

    names: Sequence[str]
    pixels: Counts
    known: NDArray[np.bool_]

    @property
    def shows(self) -> NDArray[np.bool_]:
        """[N, C] whether the image is known to show the finding."""
        return (self.pixels[:, :, 1] > 0) & self.known

    def few(self) -> dict[str, int]:
        """Findings that fewer than `FEWEST` images show, with the number of these."""
        counts = dict(zip(self.names, self.shows.sum(0).tolist(), strict=True))
        return {name: count for name, count in counts.items() if count < FEWEST}

    def metrics(
        self,
        bootstrap: PatientBootstrap,
        reduction: Reduction = "image",
        batch: int = 1,
        drop_last: bool = False,
        smooth: float = 0.0,
    ) -> dict[str, Estimate]:
        """Dice and IoU by `<measure>/<finding>`, and "macro", their mean over findings.

        `dice_all` is over all images in which the finding is known, `dice_pos` over those that show it,
        `dice_neg` over the others (the share without a called pixel: calling nothing gives 1); `iou_all` and
        `iou_pos` likewise. A finding of `few` has no number, nor has `dice_neg` where every image shows it.

        Args:
            bootstrap: resamples of the patients of the N images.
            reduction: "batch_mean" with `batch` images each: an incomplete last batch weighs too much
                (published GLoRIA and MGCA).
            drop_last: leave out the images of an incomplete last batch (published MedKLIP and MeDSLIP).
            smooth: see `iou`.
        """
        rows = np.arange(len(self.pixels))
        kept = rows < len(rows) - len(rows) % batch if drop_last else rows >= 0
        few = self.few()
        found: dict[str, Estimate] = {}
        macros: dict[str, Macro] = {}
        for column, name in enumerate(self.names):
            if name in few:
                continue
            pixels, known, shows = self.pixels[:, column], kept & self.known[:, column], self.shows[:, column]
            scores = {"dice": dice(pixels), "iou": iou(pixels, smooth)}
            measures = [
                (kind, group, of) for kind in scores for group, of in (("all", known), ("pos", known & shows))
            ]
            for kind, group, of in [*measures, ("dice", "neg", known & ~shows)]:
                if not of.any():
                    continue
                statistic: Statistic = partial(weighted_mean, scores[kind][of])
                if reduction == "batch_mean":
                    statistic = partial(_mean_of_batches, scores[kind][of], rows[of] // batch)
                value = float(statistic(np.ones((1, int(of.sum()))))[0])
                draws = bootstrap.draws(statistic, rows[of])
                found[f"{kind}_{group}/{name}"] = estimate(value, draws)
                macros.setdefault(f"{kind}_{group}/macro", Macro()).add(value, draws)
        return {metric: macro.estimate() for metric, macro in macros.items()} | found


def _mean_of_batches(values: Floats, batch: NDArray[np.int64], weights: Floats) -> Floats:
    """[R] means over batches of the means of their images; `batch` [n] ascending, `weights` [R, n]."""
    _, starts = np.unique(batch, return_index=True)
    total = np.add.reduceat(weights, starts, axis=1)
    sums = np.add.reduceat(weights * values, starts, axis=1)
    drawn = total > 0
    means = np.divide(sums, total, out=np.zeros_like(sums), where=drawn)
    number = drawn.sum(1)
    mean: Floats = np.divide(means.sum(1), number, out=np.full(len(number), np.nan), where=number > 0)
    return mean


def best_thresholds(names: Sequence[str], pixels: Counts, known: NDArray[np.bool_]) -> dict[str, int]:
    """Finding -> number of the threshold with the largest mean of `dice_pos` and `dice_neg`, the middle of
    several; a finding that no image shows has none.

    Of both, not of `dice_all`: where a finding is rare, calling nothing has the best `dice_all`.

    Args:
        names: the C findings.
        pixels: [N, C, T, 3] counts at each of T thresholds. known: [N, C] as in `MaskCounts`.
    """
    chosen, scores = {}, dice(pixels)
    for column, name in enumerate(names):
        shows = (pixels[:, column, 0, 1] > 0) & known[:, column]
        without = known[:, column] & ~shows
        if not shows.any():
            continue
        groups = [scores[of, column].mean(0) for of in (shows, without) if of.any()]
        mean = np.mean(groups, axis=0)
        best = np.flatnonzero(mean == mean.max())
        chosen[name] = int(best[len(best) // 2])
    return chosen

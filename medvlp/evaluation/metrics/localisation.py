"""How well a map shows a place: of one map [H, W] and the pixels [H, W] where something is; and thresholds.

A pixel is called when its value is above the threshold. All functions need at least one true pixel: where
something is not there, nothing can be shown, and the image has no number.

Hand-written, 80 lines of numpy: packages differ in what an empty call or a constant map is worth (NaN, 0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.binary import average_precision

Floats = NDArray[np.float64]
Pixels = NDArray[np.bool_]
Ties = Literal["expected", "any"]

#: Thresholds over which the mean IoU of MS-CXR's protocol is averaged.
MEAN_IOU_AT = (0.1, 0.2, 0.3, 0.4, 0.5)
#: Pixel values from which a threshold is chosen: these quantiles.
QUANTILES = 101
#: Steps of the value range at which a `ThresholdCurve` knows the IoU; a power of 2, so that no value of a map
#: in [0, 1] is rounded across a step.
_STEPS = 1 << 12


def pointing(heat: Floats, truth: Pixels, ties: Ties = "expected") -> float:
    """The pointing game: whether the highest pixel is a true one.

    Args:
        heat: [H, W]. truth: [H, W].
        ties: where several pixels are highest, "expected" is the share of them that is true, "any" is 1 if
            one of them is (published; a constant map then always hits).

    Returns:
        A number in [0, 1]; 0 for a constant map with "expected", which points at nothing.
    """
    highest = heat == heat.max()
    if ties == "any":
        return float((highest & truth).any())
    return 0.0 if highest.all() else float((highest & truth).sum() / highest.sum())


def overlap(heat: Floats, truth: Pixels, threshold: float) -> dict[str, float]:
    """IoU, Dice, pixel recall and precision of the called pixels, and whether there are none ("empty").

    Without a called pixel all are 0, precision too, which is not defined then.
    """
    called = heat > threshold
    hit, calls, true = int((called & truth).sum()), int(called.sum()), int(truth.sum())
    return {
        "iou": hit / (calls + true - hit),
        "dice": 2 * hit / (calls + true),
        "recall": hit / true,
        "precision": hit / calls if calls else 0.0,
        "empty": float(calls == 0),
    }


def mean_iou(heat: Floats, truth: Pixels) -> float:
    """Mean IoU over the thresholds 0.1, 0.2, ... 0.5 (MS-CXR)."""
    return float(np.mean([overlap(heat, truth, threshold)["iou"] for threshold in MEAN_IOU_AT]))


def contrast(heat: Floats, inside: Pixels, outside: Pixels) -> float:
    """Signed contrast-to-noise ratio: difference of the means inside and outside over the root of the summed
    population variances; 0 where both are 0, or where there is no inside or no outside.

    Its absolute value is MS-CXR's CNR, which rewards a map that shows everything but the place.
    """
    if not inside.any() or not outside.any():
        return 0.0
    within, without = heat[inside], heat[outside]
    noise = float(np.sqrt(within.var() + without.var()))
    return float(within.mean() - without.mean()) / noise if noise > 0 else 0.0


def localisation(
    heat: Floats,
    truth: Pixels,
    parts: Sequence[Pixels] = (),
    threshold: float | None = None,
    ties: Ties = "expected",
) -> dict[str, float]:
    """All measures of one map.

    Args:
        heat: [H, W] finite values. truth: [H, W], at least one true pixel.
        parts: places that are scored by themselves in "cnr" and "cnr_signed" (mean over them); all pixels
            outside one count as outside. None: the truth as a whole.
        threshold: of `overlap`; None: those measures are left out.
        ties: see `pointing`.

    Raises:
        ValueError: no true pixel.
    """
    if not truth.any():
        raise ValueError("nothing is there: no true pixel")
    contrasts = [contrast(heat, part, ~part) for part in parts or [truth]]
    found = {
        "point": pointing(heat, truth, ties),
        "auprc": float(average_precision(heat.ravel().astype(np.float64), truth.ravel())[0]),
        "miou": mean_iou(heat, truth),
        "cnr": float(np.mean(np.abs(contrasts))),
        "cnr_signed": float(np.mean(contrasts)),
    }
    return found | ({} if threshold is None else overlap(heat, truth, threshold))


def uniform(truth: Pixels) -> dict[str, float]:
    """What a map without any information gives, all pixels called: chance."""
    share = float(truth.mean())
    return {
        "point": share,
        "auprc": share,
        "miou": share,
        "cnr": 0.0,
        "cnr_signed": 0.0,
        "iou": share,
        "dice": 2 * share / (1 + share),
        "recall": 1.0,
        "precision": share,
        "empty": 0.0,
    }


def min_max(heat: Floats) -> Floats:
    """A map stretched to [0, 1]; a constant one becomes 0."""
    low, high = heat.min(), heat.max()
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


class ThresholdCurve:
    """Mean IoU over many maps at every threshold of a grid, in memory that does not grow with them."""

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        """All values lie in [low, high]."""
        self._low, self._range = low, high - low
        self._values = np.zeros(_STEPS + 1, dtype=np.int64)
        self._iou = np.zeros(_STEPS)
        self.maps = 0

    def add(self, heat: Floats, truth: Pixels) -> None:
        """Count a map [H, W] with its true pixels.

        Raises:
            ValueError: a value outside the range, or no true pixel.
        """
        if not truth.any():
            raise ValueError("nothing is there: no true pixel")
        # A value of step k lies above the thresholds 0 .. k - 1 of the grid; the lowest value has step 0.
        step = np.ceil((heat.astype(np.float64) - self._low) / self._range * _STEPS)
        if not ((step >= 0) & (step <= _STEPS)).all():
            raise ValueError(f"a value outside {self._low} to {self._low + self._range}")
        steps = step.astype(np.int64)
        values = np.bincount(steps.ravel(), minlength=_STEPS + 1)
        calls = values[::-1].cumsum()[::-1][1:]
        hits = np.bincount(steps[truth], minlength=_STEPS + 1)[::-1].cumsum()[::-1][1:]
        self._iou += hits / (calls + truth.sum() - hits)
        self._values += values
        self.maps += 1

    def best(self) -> float:
        """The threshold with the largest mean IoU among `QUANTILES` quantiles of all values (rounded down to
        the grid); the lowest one of several.

        Raises:
            ValueError: no map has been added.
        """
        if not self.maps:
            raise ValueError("a threshold needs at least one map")
        shares = self._values.cumsum() / self._values.sum()
        steps = np.searchsorted(shares, np.linspace(0, 1, QUANTILES))
        steps = np.unique(np.clip(steps - 1, 0, _STEPS - 1))
        best = int(steps[np.argmax(self._iou[steps])])
        return self._low + best * self._range / _STEPS

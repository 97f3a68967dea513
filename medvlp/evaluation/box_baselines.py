"""Boxes without a network: one of each finding in every image, the mean one or one guessed from pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medvlp.data.batch import Batch
from medvlp.evaluation.baselines import PixelRidge
from medvlp.evaluation.features import shrink
from medvlp.evaluation.heads.detection import box_truth

#: Baseline -> its detections [B, C, 6] in a batch: left, top, right, bottom, class, score.
Finds = dict[str, Callable[[Batch], NDArray[Any]]]


def taught(batches: Iterable[Batch], columns: list[int], smallest: float) -> Finds:
    """The baselines "pixels" and "mean-box".

    Args:
        batches: the training images, with the field "boxes".
        columns, smallest: see `box_truth`.
    """
    pixels, targets = [], []
    for batch in batches:
        pixels.append(shrink(batch.image))
        targets.append(_targets(batch, columns, smallest))
    told = np.concatenate(targets)  # [N, C, 5]: whether it is there, and its mean box
    seen = ~np.isnan(told).all(0)
    mean = np.array([[_mean(told[:, c, k]) for k in range(5)] for c in range(len(columns))])
    ridge = PixelRidge(np.concatenate(pixels)).fit(told.reshape(len(told), -1))

    def by_mean(batch: Batch) -> NDArray[Any]:
        return _rows(np.broadcast_to(mean, (len(batch.image), *mean.shape)), seen)

    def by_pixels(batch: Batch) -> NDArray[Any]:
        guessed = ridge.predict(shrink(batch.image)).reshape(len(batch.image), *mean.shape)
        return _rows(guessed, seen)

    return {"pixels": by_pixels, "mean-box": by_mean}


def _targets(batch: Batch, columns: list[int], smallest: float) -> NDArray[Any]:
    """[B, C, 5]: 1 or 0, NaN where it is not known, and the mean of the image's boxes of the finding."""
    result = np.full((len(batch.image), len(columns), 5), np.nan)
    truth = box_truth(batch, torch.tensor(columns), smallest)
    for image, row in enumerate(result):
        boxes, classes, hedged = (of.numpy() for of in truth.of(image))
        row[:, 0] = 0
        row[classes[hedged], 0] = np.nan
        for number in np.unique(classes[~hedged]):
            row[number] = [1.0, *boxes[(classes == number) & ~hedged].mean(0)]
    return result


def _mean(values: NDArray[Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _rows(told: NDArray[Any], seen: NDArray[np.bool_]) -> NDArray[Any]:
    """[B, C, 5] -> [B, C, 6]; class -1 of findings without a training box."""
    classes = np.where(seen[:, 1], np.arange(len(seen)), -1)
    result = np.zeros((*told.shape[:2], 6))
    result[:, :, :4] = np.nan_to_num(told[:, :, 1:])
    # A guess may be turned inside out or empty.
    result[:, :, 2:4] = np.maximum(result[:, :, 2:4], result[:, :, :2] + 1)
    result[:, :, 4], result[:, :, 5] = classes, np.clip(np.nan_to_num(told[:, :, 0]), 0.001, 1)
    return result
